"""The csgd algorithm; see method.py."""
