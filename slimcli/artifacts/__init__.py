"""slim artifacts."""
