"""The graph of the operations that were called on scores: nodes, axes, views."""
