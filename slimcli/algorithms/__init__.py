"""One algorithm, one folder: ``config.py`` (schema, texts, no torch) and ``method.py``."""
