"""Reports of a run: report.html and card.md. Reads results; knows no recipe and no solver."""
