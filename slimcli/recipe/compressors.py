"""The Compressor class of a stage; for a user's own class its keys are checked here."""

from __future__ import annotations

from dataclasses import replace

from slimcli.compressor import AlgorithmConfig, AlgorithmInfo, Compressor
from slimcli.errors import HookError, Problem, RecipeError
from slimcli.recipe import keys
from slimcli.recipe.binding import location
from slimcli.recipe.hooks import import_target
from slimcli.recipe.model import Recipe, Stage
from slimcli.recipe.validate import Section, validate
from slimcli.solver.config import TrainingConfig


def load_compressor(recipe: Recipe, stage: Stage) -> tuple[type[Compressor], Stage]:
    """The class, and the stage with its keys checked; imports torch.

    Raises:
        HookError: The user's class cannot be imported, or is no Compressor.
        RecipeError: Its keys are wrong.
    """
    if isinstance(stage.algorithm, AlgorithmInfo):
        return stage.algorithm.load(), stage
    assert stage.place is not None
    cls, _ = import_target(recipe, stage.algorithm, str(stage.place))
    if not isinstance(cls, type) or not issubclass(cls, Compressor):
        what = f"{stage.algorithm} is not a subclass of slimcli.compressor.Compressor"
        raise HookError(Problem("E-HOOK-COMPRESSOR", what, location(cls) or str(stage.place)))
    info = getattr(cls, "info", None)
    if not isinstance(info, AlgorithmInfo):
        what = f"{cls.__name__} has no `info`, which says its name and its keys"
        fix = "add the class attribute info = AlgorithmInfo(...)"
        raise HookError(Problem("E-HOOK-COMPRESSOR", what, location(cls), fix=fix))
    return cls, _checked(stage, info)


def _checked(stage: Stage, info: AlgorithmInfo) -> Stage:
    """The stage under the keys of a user's class."""
    assert stage.place is not None
    problems: list[Problem] = []
    entries = keys.rename(keys.config_table(info), dict(stage.entries), "config.", problems)
    training = {key: each for key, each in entries.items() if key in keys.TRAINING_KEYS}
    own = {key: each for key, each in entries.items() if key not in keys.TRAINING_KEYS}
    loop = validate(
        TrainingConfig,
        Section("config", training, stage.place, info.training_defaults),
        problems,
    )
    config: AlgorithmConfig | None = validate(
        info.config, Section("config", own, stage.place, {}), problems
    )
    if problems or loop is None or config is None:
        raise RecipeError(*problems)
    return replace(stage, algorithm=info, training=loop, config=config)
