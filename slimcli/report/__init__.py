"""slim report."""
