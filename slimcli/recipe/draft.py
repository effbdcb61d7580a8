"""A recipe on its way from nodes to a checked :class:`~slimcli.recipe.model.Recipe`.

The draft knows which mapping each key belongs to, and puts the command line's values there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from slimcli.compressor import AlgorithmInfo
from slimcli.errors import Problem
from slimcli.recipe import keys
from slimcli.recipe.expected import accepts_list
from slimcli.recipe.keys import Table
from slimcli.recipe.nodes import Entry, Node, Place, problem
from slimcli.recipe.overrides import Override, as_list
from slimcli.recipe.validate import received, suggest
from slimcli.solver.config import TrainingConfig

STAGE_NAME = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9][A-Za-z0-9_-]*")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+|.*\.py:[A-Za-z_]\w*")


@dataclass
class StageDraft:
    """One algorithm and the keys written for it.

    Attributes:
        place: Where the stage begins.
        prefix: What its keys begin with in messages (``config.``, ``stages.1.config.``).
        given: ``name`` and ``algorithm`` as written.
        raw_config: Its config as written.
        config: Its config under proper names.
        name: Unique name.
        algorithm: Registry entry, path of a user's class, or None if neither.
        is_broken: It is no mapping, which was reported.
    """

    place: Place
    prefix: str
    given: dict[str, Entry]
    raw_config: dict[str, Entry] = field(default_factory=dict)
    config: dict[str, Entry] = field(default_factory=dict)
    name: str = ""
    algorithm: AlgorithmInfo | str | None = None
    is_broken: bool = False

    @property
    def table(self) -> Table | None:
        """The keys it may have; None where they are not known."""
        if isinstance(self.algorithm, AlgorithmInfo):
            return keys.config_table(self.algorithm)
        return None


class Draft:
    """The mappings of a recipe, keys under their proper names.

    Args:
        root: The whole file.
        problems: Everything that is wrong is added here.
    """

    def __init__(self, root: Node, problems: list[Problem]) -> None:
        self.root = root
        self.problems = problems
        self.top = keys.rename(keys.TOP_TABLE, root.entries, "", problems)
        self.hooks = keys.rename(keys.HOOK_TABLE, self.mapping("hooks"), "hooks.", problems)
        self.export = keys.rename(keys.EXPORT_TABLE, self.mapping("export"), "export.", problems)
        self.is_staged = "stages" in self.top
        self.shared: dict[str, Entry] = {}
        self.stages = self._staged() if self.is_staged else self._single()

    def complain(self, code: str, what: str, place: Place, **parts: str) -> None:
        """Adds a problem."""
        self.problems.append(problem(code, what, place, **parts))

    def mapping(self, key: str) -> dict[str, Entry]:
        """The entries below a top-level key; anything but a mapping is reported."""
        if key not in self.top:
            return {}
        return self._entries(self.top[key].node, key)

    def _entries(self, node: Node, name: str) -> dict[str, Entry]:
        if node.value is None or isinstance(node.value, dict) or node.broken:
            return node.entries
        found = received(node.value)
        self.complain("E-RECIPE-TYPE", name, node.place, expected="a mapping", received=found)
        return {}

    def _single(self) -> list[StageDraft]:
        given = {key: self.top[key] for key in ("algorithm",) if key in self.top}
        place = self.top["config"].place if "config" in self.top else self.root.place
        return [StageDraft(place, "config.", given, self.mapping("config"))]

    def _staged(self) -> list[StageDraft]:
        entry = self.top["stages"]
        if "algorithm" in self.top:
            what = "algorithm and stages are both given"
            fix = "move algorithm and its keys into the list of stages"
            self.complain("E-RECIPE-BOTH", what, self.top["algorithm"].place, fix=fix)
        if not isinstance(entry.node.value, list) or not entry.node.value:
            self.complain(
                "E-RECIPE-TYPE",
                "stages",
                entry.node.place,
                expected="a list of mappings with algorithm and config",
                received=received(entry.node.value) if entry.node.value != [] else "an empty list",
            )
            return []
        return [self._stage(index, node) for index, node in enumerate(entry.node.value)]

    def _stage(self, index: int, node: Node) -> StageDraft:
        prefix = f"stages.{index}."
        given = keys.rename(
            keys.STAGE_TABLE, self._entries(node, prefix[:-1]), prefix, self.problems
        )
        config = given.pop("config", None)
        raw = self._entries(config.node, f"{prefix}config") if config else {}
        place = config.place if config else node.place
        is_broken = not isinstance(node.value, dict)
        return StageDraft(place, f"{prefix}config.", given, raw, is_broken=is_broken)

    def identify(self, overrides: list[Override]) -> None:
        """Finds every stage's algorithm and brings its keys under their proper names.

        Only the overrides that name an algorithm matter here.
        """
        for override in overrides:
            if override.key == "algorithm" and not self.is_staged:
                self.stages[0].given["algorithm"] = override.entry("algorithm")
            stage = self.stage_of(override)
            if stage and override.steps[2:] in (("algorithm",), ("name",)):
                stage.given[override.steps[2]] = override.entry(override.key)
        for index, stage in enumerate(self.stages):
            if not stage.is_broken:
                self._identify(index, stage)
            table = stage.table
            if table:
                stage.config = keys.rename(table, stage.raw_config, stage.prefix, self.problems)
            else:
                stage.config = dict(stage.raw_config)
                for key, entry in stage.config.items():
                    entry.spelled = stage.prefix + key
        if self.is_staged:
            raw = self.mapping("config")
            self.shared = keys.rename(self.shared_table, raw, "config.", self.problems)

    @property
    def shared_table(self) -> Table:
        """The keys that all stages may share."""
        infos = [(each.name, each.algorithm) for each in self.stages]
        named = [(name, info.name) for name, info in infos if isinstance(info, AlgorithmInfo)]
        return Table("config", keys.TRAINING_KEYS, {}, stages=tuple(named))

    def _identify(self, index: int, stage: StageDraft) -> None:
        entry = stage.given.get("algorithm")
        prefix = f"stages.{index}." if self.is_staged else ""
        names = ", ".join(keys.algorithms())
        if entry is None:
            fix = f"add algorithm: one of {names}"
            place = stage.place if self.is_staged else self.root.place
            self.complain("E-RECIPE-MISSING-KEY", f"{prefix}algorithm is required", place, fix=fix)
        elif not isinstance(entry.node.value, str):
            found = received(entry.node.value)
            self.complain(
                "E-RECIPE-TYPE",
                f"{prefix}algorithm",
                entry.node.place,
                expected=f"one of {names}, or a dotted path to a Compressor class",
                received=found,
            )
        else:
            stage.algorithm = self._algorithm(entry.node.value, f"{prefix}algorithm", entry.node)
        stage.name = self._name(index, stage)

    def _algorithm(self, text: str, key: str, node: Node) -> AlgorithmInfo | str | None:
        info = keys.find_algorithm(text)
        if info:
            return info
        aliases = [alias for each in keys.algorithms().values() for alias in each.aliases]
        is_path = bool(DOTTED.fullmatch(text))
        close = suggest(text, aliases if is_path else keys.algorithms())
        if is_path and not text.startswith("torchslim."):
            return text
        fix = f"did you mean {close}?" if close else f"one of {', '.join(keys.algorithms())}"
        self.complain("E-RECIPE-UNKNOWN-ALGORITHM", f"unknown {key} {text}", node.place, fix=fix)
        return None

    def _name(self, index: int, stage: StageDraft) -> str:
        entry = stage.given.get("name")
        label = (
            stage.algorithm
            if isinstance(stage.algorithm, str)
            else (stage.algorithm.name if stage.algorithm else "unknown")
        )
        default = f"{index + 1}-{re.split('[.:]', label)[-1].lower()}"
        if entry is None:
            return default
        name = entry.node.value
        if not isinstance(name, str) or not STAGE_NAME.fullmatch(name):
            self.complain(
                "E-RECIPE-VALUE",
                f"stages.{index}.name",
                entry.node.place,
                expected="letters, digits, - and _, at least one letter",
                received=received(name),
            )
            return default
        if name in [each.name for each in self.stages[:index]]:
            what = f"two stages are called {name}"
            self.complain("E-RECIPE-DUPLICATE-KEY", what, entry.node.place, fix="rename one")
        return name

    def stage_of(self, override: Override) -> StageDraft | None:
        """The stage that ``stages.1...`` or ``stages.NAME...`` names."""
        if override.steps[0] != "stages" or len(override.steps) < 3:
            return None
        which = override.steps[1]
        if which.isdigit():
            return self.stages[int(which)] if int(which) < len(self.stages) else None
        for index, stage in enumerate(self.stages):
            entry = stage.given.get("name")
            name = stage.name or (str(entry.node.value) if entry else "")
            if which in (name, self._name_by_default(index, stage)):
                return stage
        return None

    def _name_by_default(self, index: int, stage: StageDraft) -> str:
        entry = stage.given.get("algorithm")
        if "name" in stage.given or entry is None or not isinstance(entry.node.value, str):
            return ""
        info = keys.find_algorithm(entry.node.value)
        return f"{index + 1}-{info.name}" if info else ""


def value_for(key: str, node: Node, info: AlgorithmInfo | None) -> Node:
    """The value of an override; ``1,2`` becomes a list where the key takes a list."""
    fields = {**TrainingConfig.model_fields, **(info.config.model_fields if info else {})}
    return as_list(node) if key in fields and accepts_list(fields[key].annotation) else node
