"""Computing a graph: whole, or tile by tile."""
