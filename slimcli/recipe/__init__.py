"""slim recipe."""
