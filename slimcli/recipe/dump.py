"""Plain values to the YAML that :mod:`slimcli.recipe.nodes` reads back as the same values."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import yaml

from slimcli.recipe.nodes import PLAIN_RESOLVERS

DEFAULT_MARK = "# default"


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either our reader or a YAML 1.1 reader takes for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """A recipe is written without anchors."""
        return True


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    """Numbers and words in one line, mappings below each other."""
    flow = not any(isinstance(each, dict) for each in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _represent_list)
for _tag, _pattern, _first in PLAIN_RESOLVERS:
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def dump(values: dict[str, Any]) -> str:
    """YAML in the order of the keys.

    >>> print(dump({"lr": 1e-05, "save_keyword": "1e-4", "note": "yes", "devices": [0, 1]}))
    lr: 1.0e-05
    save_keyword: '1e-4'
    note: 'yes'
    devices: [0, 1]
    <BLANKLINE>
    """
    text: str = yaml.dump(
        values,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=100,
    )
    return text


def mark_defaults(values: dict[str, Any], changed: Collection[str]) -> str:
    """The same with ``# default`` behind every key of ``config:`` that has its default.

    Args:
        values: What :meth:`Recipe.resolved` gives.
        changed: Full names (``config.lr``, ``stages.0.config.lr``) that differ from the defaults.
    """
    parts = []
    for key, value in values.items():
        if key in ("config", "export"):
            parts.append(f"{key}:\n" + _marked(value, f"{key}.", changed, "  "))
        elif key == "stages":
            parts.append("stages:\n" + _marked_stages(value, changed))
        else:
            parts.append(dump({key: value}))
    return "".join(parts)


def _marked_stages(stages: list[dict[str, Any]], changed: Collection[str]) -> str:
    parts = []
    for index, stage in enumerate(stages):
        parts.append(f"- name: {stage['name']}\n  algorithm: {stage['algorithm']}\n  config:\n")
        parts.append(_marked(stage["config"], f"stages.{index}.config.", changed, "    "))
    return "".join(parts)


def _marked(values: dict[str, Any], prefix: str, changed: Collection[str], indent: str) -> str:
    lines = []
    for key, value in values.items():
        text = dump({key: value}).rstrip("\n")
        block = "\n".join(indent + line for line in text.splitlines())
        is_default = prefix + key not in changed and "\n" not in block
        lines.append(f"{block:<40} {DEFAULT_MARK}\n" if is_default else block + "\n")
    return "".join(lines)
