"""From a YAML file and ``key=value`` words to a checked recipe and the user's functions.

``load`` imports neither torch nor anything of the user; :mod:`slimcli.recipe.hooks` imports both.
"""

from __future__ import annotations

from slimcli.recipe.load import load
from slimcli.recipe.model import Change, ExportConfig, HookSpec, Recipe, Stage

__all__ = ["Change", "ExportConfig", "HookSpec", "Recipe", "Stage", "load"]
