"""slim cli."""
