"""What was asked of scores, written down: nodes, axes, views."""
