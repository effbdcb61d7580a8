"""From a checked recipe to a job of the solver. Imports torch and the user's code."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimcli.recipe import Recipe
    from slimcli.recipe.model import Change
    from slimcli.solver.job import Job


def job_of(recipe: Recipe, **changes: Any) -> Job:
    """The job a recipe describes.

    Args:
        recipe: A checked recipe.
        changes: Further fields of the job.

    Raises:
        HookError: The user's code can't be imported, or a hook has the wrong form.
    """
    from slimcli.recipe.compressors import load_compressor
    from slimcli.recipe.hooks import resolve
    from slimcli.solver.job import Export, Job, JobHooks, StageJob

    hooks = resolve(recipe)
    names = [each.name for each in dataclasses.fields(JobHooks)]
    stages = []
    for stage in recipe.stages:
        compressor, checked = load_compressor(recipe, stage)
        stages.append(
            StageJob(
                name=stage.name,
                algorithm=stage.algorithm_name,
                compressor=compressor,
                config=checked.config,  # type: ignore[arg-type]  # checked by load_compressor
                training=checked.training,
                places={
                    key: (str(entry.node.place), entry.node.place.excerpt())
                    for key, entry in stage.entries.items()
                },
            )
        )
    return Job(
        task_name=recipe.task_name,
        stages=tuple(stages),
        hooks=JobHooks(**{name: getattr(hooks, name) for name in names}),
        export=Export(onnx=recipe.export.onnx, trt=recipe.export.trt),
        recipe=recipe.to_yaml,
        recipe_source=recipe.source_text,
        changes=tuple(_plain(each) for each in recipe.changes),
        init_from=recipe.init_from,
        code=hooks.files,
        started_in=recipe.started_in,
        **changes,
    )


def _plain(change: Change) -> dict[str, Any]:
    """The change as it stands in files: paths and other objects as text."""
    found: dict[str, Any] = json.loads(json.dumps(change._asdict(), default=str))
    return found
