"""Sweeps over every architecture of transformers and every model class of diffusers, built small: ``python -m tests.compat``."""
