"""Where the recipes and templates that come with slim lie: in a checkout, and after an install."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
PAGES = PACKAGE / "cli" / "pages"


def folder(name: str) -> Path:
    """The folder ``recipes`` or ``hooks_templates``.

    A wheel has it inside the package, a checkout beside it.
    """
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name
