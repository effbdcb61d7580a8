"""Which keys there are, and what to say about one that is not among them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from slimcli.compressor import AlgorithmInfo, registry
from slimcli.errors import Problem
from slimcli.recipe.model import ExportConfig
from slimcli.recipe.nodes import Entry, Place, problem
from slimcli.recipe.validate import suggest
from slimcli.solver.config import TrainingConfig

TOP_KEYS = {
    "task_name": "name of the task and of its folder below save_dir; default: the file's name",
    "algorithm": "a name (slim list algorithms), or a dotted path to your own Compressor class",
    "model": "function that builds the model: file.py:function or package.module.function",
    "hooks": "your functions, by name (slim explain hooks)",
    "config": "keys of the training loop and of the algorithm",
    "stages": "several algorithms one after the other, instead of algorithm and config",
    "export": "artifacts to make",
    "code": "a folder, or a list of folders, to import your code from",
    "init_from": "run folder or weights file the model starts from",
    "teacher": "function that builds a teacher model",
}
STAGE_KEYS = ("name", "algorithm", "config")
REQUIRED_HOOKS = {
    "dataset_generator": "() -> train_set, validation_set[, test_set]",
    "predict_function": "(model, data) -> prediction",
    "calculate_loss_function": "(prediction, data) -> loss",
    "evaluate_function": "(prediction, data) -> {name: number}, or an object with update, compute",
}
OPTIONAL_HOOKS = {
    "optimizer_generator": "(config, params) -> optimizer; default: SGD",
    "scheduler_generator": "(config, optimizer) -> scheduler; default: cosine over all epochs",
    "collate_fn": "(samples) -> data; default: torch's",
}
HOOKS = {**REQUIRED_HOOKS, **OPTIONAL_HOOKS}
HOOK_ALIASES = {"schduler_generator": "scheduler_generator"}
TRAINING_KEYS = tuple(TrainingConfig.model_fields)
EXPORT_KEYS = tuple(ExportConfig.model_fields)


@cache
def algorithms() -> dict[str, AlgorithmInfo]:
    """The registry, read once."""
    return registry()


def find_algorithm(name: str) -> AlgorithmInfo | None:
    """The algorithm of that name or alias."""
    for info in algorithms().values():
        if name == info.name or name in info.aliases:
            return info
    return None


def own_keys(info: AlgorithmInfo) -> tuple[str, ...]:
    """Names of the algorithm's own keys."""
    return tuple(info.config.model_fields)


def owners(key: str) -> list[AlgorithmInfo]:
    """The algorithms that have a key of that name or alias."""
    return [
        info
        for info in algorithms().values()
        if key in info.config.model_fields or key in info.key_aliases
    ]


@dataclass(frozen=True)
class Table:
    """The keys one mapping may have.

    Attributes:
        name: What the mapping is called (``config``, ``hooks``); empty for the top level.
        keys: Their names.
        aliases: Other spellings.
        algorithm: Name of the algorithm whose keys they are, for messages; may be empty.
        stages: Name and algorithm of the stages that share these keys.
    """

    name: str
    keys: tuple[str, ...]
    aliases: dict[str, str]
    algorithm: str = ""
    stages: tuple[tuple[str, str], ...] = ()

    def canonical(self, key: str) -> str | None:
        """The proper name of a key, or None."""
        key = self.aliases.get(key, key)
        return key if key in self.keys else None


TOP_TABLE = Table("", tuple(TOP_KEYS), {})
HOOK_TABLE = Table("hooks", tuple(HOOKS), HOOK_ALIASES)
EXPORT_TABLE = Table("export", EXPORT_KEYS, {})
STAGE_TABLE = Table("stages", STAGE_KEYS, {})


def config_table(info: AlgorithmInfo) -> Table:
    """The keys of ``config:`` under one algorithm."""
    return Table("config", (*TRAINING_KEYS, *own_keys(info)), info.key_aliases, info.name)


def rename(
    table: Table, entries: dict[str, Entry], prefix: str, problems: list[Problem]
) -> dict[str, Entry]:
    """The entries under their proper names; unknown and doubled ones are reported and left out."""
    found: dict[str, Entry] = {}
    for key, entry in entries.items():
        entry.spelled = entry.spelled or prefix + key
        name = table.canonical(key)
        if name is None:
            problems.append(unknown_key(key, table, prefix, entry.place))
        elif name in found:
            first = found[name]
            what = f"{entry.spelled} is given twice: it is the same key as {first.spelled}"
            fix = f"keep one of them (the other is at {first.place})"
            problems.append(problem("E-RECIPE-DUPLICATE-KEY", what, entry.place, fix=fix))
        else:
            found[name] = entry
    return found


def unknown_key(key: str, table: Table, prefix: str, place: Place) -> Problem:
    """Why a key is not accepted here, and what was probably meant."""
    belongs = _belongs_elsewhere(key, table, prefix)
    if belongs:
        code, what, fix = belongs
        return problem(code, what, place, fix=fix)
    close = suggest(key, (*table.keys, *table.aliases))
    if close:
        fix = f"did you mean {table.canonical(close)}?"
    elif len(table.keys) <= len(TOP_KEYS):
        fix = f"one of {', '.join(table.keys)}"
    else:
        own = f", slim explain {table.algorithm}" if table.algorithm else ""
        fix = f"all keys: slim explain recipe{own}"
    return problem("E-RECIPE-UNKNOWN-KEY", f"unknown key {prefix}{key}", place, fix=fix)


def _belongs_elsewhere(key: str, table: Table, prefix: str) -> tuple[str, str, str] | None:
    """Code, sentence and fix for a key that exists, but not in this mapping."""
    home = _home(key)
    here = table.name or "the top level"
    if home and home != here:
        what = f"{key} is a key of {home}, not of {here}"
        fix = f"move it to the beginning of a line: {key}: ..."
        if home != "the top level":
            fix = f"move it below {home}:"
        return "E-RECIPE-MISPLACED-KEY", what, fix
    others = [info.name for info in owners(key) if info.name != table.algorithm]
    if not others:
        return None
    if table.algorithm:
        what = f"{prefix}{key} is a key of {_and(others)}, this recipe uses {table.algorithm}"
        return "E-RECIPE-OTHER-ALGORITHM", what, f"leave it out, or write algorithm: {others[0]}"
    what = (
        f"{prefix}{key} is a key of {_and(others)}; what all stages share has only keys of the loop"
    )
    stages = [stage for stage, algorithm in table.stages if algorithm in others]
    fix = f"write it in the config of stage {_and(stages)}" if stages else "leave it out"
    return "E-RECIPE-OTHER-ALGORITHM", what, fix


def _home(key: str) -> str:
    """The mapping a key belongs to; empty if there is none."""
    if HOOK_TABLE.canonical(key):
        return "hooks"
    if key in TOP_KEYS:
        return "the top level"
    if key in EXPORT_KEYS:
        return "export"
    return "config" if key in TRAINING_KEYS or owners(key) else ""


def _and(names: Iterable[str]) -> str:
    listed = list(names)
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
