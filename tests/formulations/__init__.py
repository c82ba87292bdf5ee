"""Attention as other people formulate it, re-written small: ``python -m tests.formulations`` runs each of them.

Every file of this package that ``table.FILES`` names is data: modules and inputs.
"""
