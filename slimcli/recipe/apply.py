"""Where each override of the command line goes in the draft of a recipe."""

from __future__ import annotations

from slimcli.compressor import AlgorithmInfo
from slimcli.recipe import keys
from slimcli.recipe.draft import Draft, StageDraft, value_for
from slimcli.recipe.nodes import Entry, Node
from slimcli.recipe.overrides import Override
from slimcli.recipe.validate import suggest

SCALAR_TOP_KEYS = ("task_name", "algorithm", "model", "code", "init_from", "teacher")


def apply(draft: Draft, overrides: list[Override]) -> None:
    """Puts every override into the draft; what has no place, or no effect, is reported."""
    for override in overrides:
        first, *rest = override.steps
        if first == "stages":
            _into_stage(draft, override)
        elif first == "config" and rest:
            _into_config(draft, override, ".".join(rest))
        elif first == "hooks" and rest:
            _into_hooks(draft, override, rest)
        elif first == "export" and rest:
            _into_export(draft, override, ".".join(rest))
        elif first in ("model", "teacher") and len(rest) == 1:
            _keyword(draft.top, first, rest[0], override)
        elif first in SCALAR_TOP_KEYS and not rest:
            _into_top(draft, override)
        else:
            _bare(draft, override)


def _into_top(draft: Draft, override: Override) -> None:
    if override.key == "algorithm" and draft.is_staged:
        names = ", ".join(f"stages.{each.name}.algorithm" for each in draft.stages)
        what = "algorithm: this recipe has stages"
        draft.complain("E-OVERRIDE-AMBIGUOUS", what, override.place, fix=f"name one: {names}")
        return
    draft.top[override.key] = override.entry(override.key)


def _into_hooks(draft: Draft, override: Override, rest: list[str]) -> None:
    name = keys.HOOK_TABLE.canonical(rest[0])
    if name is None:
        draft.problems.append(keys.unknown_key(rest[0], keys.HOOK_TABLE, "hooks.", override.place))
    elif len(rest) == 1:
        draft.hooks[name] = override.entry(override.key)
    else:
        _keyword(draft.hooks, name, ".".join(rest[1:]), override)


def _keyword(entries: dict[str, Entry], name: str, keyword: str, override: Override) -> None:
    """``model.width=2``: one keyword of a function, beside its target."""
    old = entries.get(name)
    known = dict(old.node.entries) if old else {}
    if old and isinstance(old.node.value, str):
        known["target"] = Entry(old.place, old.node, f"{name}.target")
    known[keyword] = override.entry(override.key)
    place = old.node.place if old else override.place
    entries[name] = Entry(old.place if old else override.place, Node(place, known), name)


def _into_export(draft: Draft, override: Override, key: str) -> None:
    if keys.EXPORT_TABLE.canonical(key):
        draft.export[key] = override.entry(f"export.{key}")
    else:
        draft.problems.append(keys.unknown_key(key, keys.EXPORT_TABLE, "export.", override.place))


def _into_config(draft: Draft, override: Override, key: str) -> None:
    """``config.KEY``: the only stage, or what all stages share."""
    if not draft.is_staged:
        _set(draft, draft.stages[0], key, override)
        return
    table = draft.shared_table
    if table.canonical(key) is None:
        draft.problems.append(keys.unknown_key(key, table, "config.", override.place))
        return
    own = [stage.name for stage in draft.stages if key in stage.config]
    if draft.stages and len(own) == len(draft.stages):
        what = f"{override.key} has no effect: every stage sets its own {key}"
        fix = "name the stage: " + _spellings(draft.stages, key)
        draft.complain("E-OVERRIDE-NO-EFFECT", what, override.place, fix=fix)
        return
    entry = override.entry(f"config.{key}")
    entry.node = value_for(key, entry.node, None)
    draft.shared[key] = entry


def _into_stage(draft: Draft, override: Override) -> None:
    """``stages.WHICH.config.KEY``; names and algorithms were applied before."""
    stage = draft.stage_of(override) if draft.is_staged else None
    if stage is None:
        shown = ", ".join(f"stages.{each.name}" for each in draft.stages)
        fix = f"one of {shown}, then .config.KEY" if draft.is_staged else "write config.KEY=value"
        what = f"{override.key} names no stage of this recipe"
        draft.complain("E-OVERRIDE-STAGE", what, override.place, fix=fix)
    elif override.steps[2] == "config" and len(override.steps) > 3:
        _set(draft, stage, ".".join(override.steps[3:]), override)
    elif override.steps[2:] not in (("algorithm",), ("name",)):
        key, prefix = override.steps[2], ".".join(override.steps[:2]) + "."
        draft.problems.append(keys.unknown_key(key, keys.STAGE_TABLE, prefix, override.place))


def _set(draft: Draft, stage: StageDraft, key: str, override: Override) -> None:
    table = stage.table
    name = table.canonical(key) if table else key
    if name is None:
        assert table is not None
        draft.problems.append(keys.unknown_key(key, table, stage.prefix, override.place))
        return
    entry = override.entry(stage.prefix + name)
    info = stage.algorithm if isinstance(stage.algorithm, AlgorithmInfo) else None
    entry.node = value_for(name, entry.node, info)
    stage.config[name] = entry


def _bare(draft: Draft, override: Override) -> None:
    """A key without the name of its mapping, where only one mapping can be meant."""
    key = override.key
    if keys.HOOK_TABLE.canonical(key):
        _into_hooks(draft, override, [key])
    elif key in keys.EXPORT_KEYS:
        _into_export(draft, override, key)
    elif key in keys.TRAINING_KEYS:
        _bare_training(draft, override)
    else:
        _bare_own(draft, override)


def _bare_training(draft: Draft, override: Override) -> None:
    own = [stage for stage in draft.stages if override.key in stage.config]
    if not draft.is_staged or not own:
        _into_config(draft, override, override.key)
        return
    what = f"{override.key} is set by {len(own)} of {len(draft.stages)} stages"
    fix = "name the stage: " + _spellings(draft.stages, override.key)
    draft.complain("E-OVERRIDE-AMBIGUOUS", what, override.place, fix=fix)


def _bare_own(draft: Draft, override: Override) -> None:
    """A key of one algorithm."""
    key = override.key
    having = [stage for stage in draft.stages if stage.table and stage.table.canonical(key)]
    if len(having) == 1:
        _set(draft, having[0], key, override)
    elif having:
        what = f"{key} is a key of {len(having)} stages"
        fix = "name the stage: " + _spellings(having, key)
        draft.complain("E-OVERRIDE-AMBIGUOUS", what, override.place, fix=fix)
    elif not draft.is_staged and draft.stages[0].table and "." not in key and keys.owners(key):
        _set(draft, draft.stages[0], key, override)
    else:
        _unknown(draft, override)


def _unknown(draft: Draft, override: Override) -> None:
    names: dict[str, str] = {key: key for key in SCALAR_TOP_KEYS}
    names |= {key: f"hooks.{key}" for key in keys.HOOKS}
    names |= {key: f"export.{key}" for key in keys.EXPORT_KEYS}
    for stage in draft.stages:
        table = stage.table
        names |= {key: stage.prefix + key for key in (table.keys if table else keys.TRAINING_KEYS)}
    names |= {full: full for full in list(names.values())}
    close = suggest(override.key, names)
    fix = f"did you mean {names[close]}?" if close else "all keys: slim explain recipe"
    if override.key in ("config", "hooks", "export", "stages"):
        fix = f"name one key, such as {override.key}.KEY=value"
    if any(stage.algorithm and not stage.table for stage in draft.stages) and not close:
        fix = f"write config.{override.key} for a key of your own class"
    what = f"unknown key {override.key}"
    draft.complain("E-RECIPE-UNKNOWN-KEY", what, override.place, fix=fix)


def _spellings(stages: list[StageDraft], key: str) -> str:
    return ", ".join(f"stages.{stage.name}.config.{key}" for stage in stages)
