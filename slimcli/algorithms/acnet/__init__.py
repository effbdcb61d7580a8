"""The acnet algorithm; see method.py."""
