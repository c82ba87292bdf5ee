"""Computes a graph: whole, or tile by tile."""
