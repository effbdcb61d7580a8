"""The resrep algorithm; see method.py."""
