"""Reads conversations from files in any of the usual formats."""
