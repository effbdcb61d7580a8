"""slim: make a trained PyTorch network smaller, and prove that it still works."""

from __future__ import annotations

__version__ = "0.1.0"
