"""Releases of Python, torch and its hosts: which are tested, and what Python 3.10 lacks."""
