"""The JSON schema of a recipe, for editors: keys depend on ``algorithm``."""

from __future__ import annotations

from typing import Any

from slimcli.compressor import AlgorithmInfo
from slimcli.recipe import keys
from slimcli.recipe.model import ExportConfig
from slimcli.solver.config import TrainingConfig

_HOOK = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"target": {"type": "string"}},
            "required": ["target"],
        },
    ]
}


def json_schema() -> dict[str, Any]:
    """A JSON schema (2020-12) that knows every key of every algorithm."""
    infos = keys.algorithms().values()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "slim recipe",
        "type": "object",
        "properties": {**_top(), "algorithm": _algorithm()},
        "required": ["model", "hooks"],
        "additionalProperties": False,
        "oneOf": [{"required": ["algorithm"]}, {"required": ["stages"]}],
        "allOf": [_when(info) for info in infos],
        "$defs": {"hook": _HOOK, "training": _fields(TrainingConfig.model_json_schema())},
    }


def _top() -> dict[str, Any]:
    hook: dict[str, Any] = {"$ref": "#/$defs/hook"}
    stage = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "algorithm": _algorithm(),
            "config": {"type": "object"},
        },
        "required": ["algorithm"],
        "additionalProperties": False,
        "allOf": [_when(info) for info in keys.algorithms().values()],
    }
    types: dict[str, Any] = {
        "task_name": {"type": "string"},
        "model": hook,
        "teacher": hook,
        "hooks": {
            "type": "object",
            "properties": dict.fromkeys((*keys.HOOKS, *keys.HOOK_ALIASES), hook),
            "required": list(keys.REQUIRED_HOOKS),
            "additionalProperties": False,
        },
        "config": {"type": "object"},
        "stages": {"type": "array", "minItems": 1, "items": stage},
        "export": _fields(ExportConfig.model_json_schema()),
        "code": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
        "init_from": {"type": "string"},
    }
    return {name: {"description": keys.TOP_KEYS[name], **each} for name, each in types.items()}


def _algorithm() -> dict[str, Any]:
    names = list(keys.algorithms())
    return {
        "description": keys.TOP_KEYS["algorithm"],
        "anyOf": [{"enum": names}, {"type": "string", "pattern": "\\."}],
    }


def _when(info: AlgorithmInfo) -> dict[str, Any]:
    """The keys of ``config`` under one algorithm."""
    training = TrainingConfig.model_json_schema()["properties"]
    own = info.config.model_json_schema()["properties"]
    properties = {**training, **own}
    for name, default in info.training_defaults.items():
        properties[name] = {**properties[name], "default": default}
    for alias, name in info.key_aliases.items():
        properties[alias] = properties[name]
    names = [info.name, *info.aliases]
    config = {"properties": properties, "additionalProperties": False}
    return {
        "if": {"properties": {"algorithm": {"enum": names}}, "required": ["algorithm"]},
        "then": {"properties": {"config": config}},
    }


def _fields(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": schema["properties"],
        "additionalProperties": False,
    }
