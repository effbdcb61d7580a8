"""``slim inspect``: which channels belong together, what they cost, what may be cut and why not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slimcli import console
from slimcli.cli.arguments import RecipeCommand, overrides_argument, recipe_argument

if TYPE_CHECKING:
    from slimcli.network.inspection import GroupFacts
    from slimcli.solver.inspection import Inspection

VERSION = 1


@click.command(name="inspect", cls=RecipeCommand)
@recipe_argument
@overrides_argument
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw channels and MACs per layer into FILE.svg or FILE.png.",
)
def command(recipe: Path, overrides: tuple[str, ...], picture: Path | None) -> None:
    """Show the coupled groups of a model, learnt from one batch. Writes nothing but the picture.

    \b
    Examples:
      slim inspect recipe.yaml                          every group, and why some are frozen
      slim inspect recipe.yaml --json                   the same for scripts
      slim inspect recipe.yaml --picture channels.svg   with the fewest channels the plan reaches
    """
    from slimcli.recipe import load
    from slimcli.recipe.job import job_of
    from slimcli.solver.inspection import inspect

    if picture is not None and picture.suffix not in (".svg", ".png"):
        raise click.BadParameter("expected a name ending in .svg or .png", param_hint="--picture")
    found = inspect(job_of(load(recipe, overrides)), with_plan=picture is not None)
    if picture is not None:
        from slimcli.report.layers import draw_layers

        draw_layers([dataclasses.asdict(each) for each in found.layers], picture)
    if console.settings().json:
        console.document(_as_json(found))
    else:
        _tell(found)
    if picture is not None:
        console.say(f"drawn  {picture}")


def _as_json(found: Inspection) -> dict[str, Any]:
    return {
        "version": VERSION,
        "macs": found.macs,
        "params": found.params,
        "groups": [dataclasses.asdict(each) for each in found.groups],
        "layers": [dataclasses.asdict(each) for each in found.layers],
        "notes": list(found.notes),
    }


def _tell(found: Inspection) -> None:
    from slimcli.artifacts.event_lines import large

    prunable = [each for each in found.groups if each.is_prunable]
    frozen = [each for each in found.groups if not each.is_prunable]
    console.result(
        f"model    {large(found.params)} params · {large(found.macs, 'MACs')} a sample · "
        f"{len(found.layers)} layers in {len(found.groups)} groups of channels"
    )
    if prunable:
        console.table(
            ("group", "channels", "MACs a channel", "made by", "with it", "read by", "selected by"),
            [_row(each) for each in prunable],
        )
    else:
        console.result("nothing can be pruned in this model")
    for each in prunable:
        for text in _remarks(each):
            console.result(f"  {each.name}: {text}")
    for each in frozen:
        console.result(
            f"  frozen   {each.name} ({each.channels} channels, "
            f"{large(each.macs_per_channel, 'MACs')} each): {each.frozen_reason}"
        )
    outside = [each for each in found.layers if not each.group and each.frozen_reason]
    for layer in outside:
        console.result(f"  frozen   {layer.name}: {layer.frozen_reason}")
    for note in found.notes:
        console.result(f"note     {note}")


def _row(group: GroupFacts) -> tuple[object, ...]:
    from slimcli.artifacts.event_lines import large

    return (
        group.name,
        group.channels,
        large(group.macs_per_channel),
        _listed(group.producers),
        _listed(group.followers),
        _listed(group.consumers),
        " ".join(group.strategies),
    )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


def _remarks(group: GroupFacts) -> list[str]:
    """What the table has no column for, because it is seldom so."""
    found = []
    if not group.is_zero_removal_exact:
        reason = f": {group.zero_reason}" if group.zero_reason else ""
        found.append(f"removing channels that are zero is not exact{reason}")
    if not group.is_duplicate_merging_exact:
        reason = f": {group.duplicate_reason}" if group.duplicate_reason else ""
        found.append(f"merging equal channels is not exact{reason}")
    if group.constants:
        found.append(f"a zero channel becomes a constant, taken up by {_listed(group.constants)}")
    if group.channels_least > 1:
        found.append(f"{group.channels_least} channels must stay: your code asks for the width")
    if not group.strategies:
        found.append("no strategy selects it: nothing can be put behind its producers")
    return found
