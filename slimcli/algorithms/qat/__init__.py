"""The qat algorithm; see method.py."""
