"""``slim plan``: what would be done, and whether it can work; writes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slimcli import console
from slimcli.cli.arguments import RecipeCommand, overrides_argument, recipe_argument
from slimcli.errors import GoalError

if TYPE_CHECKING:
    from slimcli.compressor import Plan
    from slimcli.recipe import Recipe
    from slimcli.solver.forecast import StageForecast


@click.command(name="plan", cls=RecipeCommand)
@recipe_argument
@overrides_argument
@click.option("--layers", is_flag=True, help="One row a layer, with the reason where frozen.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Steps an epoch, as in slim run.")
def command(recipe: Path, overrides: tuple[str, ...], layers: bool, max_steps: int | None) -> None:
    """Say what a recipe would do to the model, from one batch. Exit 4 if it can't work.

    \b
    Examples:
      slim plan recipe.yaml                        groups, reachable MACs, budget
      slim plan recipe.yaml config.prune_rate=0.7  would this be possible?
      slim plan recipe.yaml --layers               which layers, and why not the others
    """
    from slimcli.recipe import load

    show_plan(load(recipe, overrides), trial=False, layers=layers, max_steps=max_steps)


def show_plan(
    recipe: Recipe, *, trial: bool, layers: bool = False, max_steps: int | None = None
) -> None:
    """Print the plan of every stage; with ``trial`` also a step and a deployment on a copy.

    Raises:
        GoalError: A stage that is certain to fail.
    """
    from slimcli.recipe.job import job_of
    from slimcli.solver.forecast import forecast

    stages = forecast(job_of(recipe, max_steps=max_steps), trial=trial)
    if console.settings().json:
        console.document({"version": 1, "stages": [_as_json(each) for each in stages]})
    else:
        for stage in stages:
            _tell(stage, layers)
    problems = [each for stage in stages if stage.is_certain for each in stage.refusals]
    if problems:
        raise GoalError(*problems)
    if trial:
        console.say(f"Nothing was written. Start it: {console.command('run', recipe.path)}")
    else:
        console.say(f"Next: {console.command('run', recipe.path)}")


def _as_json(stage: StageForecast) -> dict[str, Any]:
    plan = {
        each.name: getattr(stage.plan, each.name)
        for each in dataclasses.fields(stage.plan)
        if each.name != "private"
    }
    for name in ("layers", "refusals"):
        plan[name] = [dataclasses.asdict(each) for each in plan[name]]
    plan["goal"] = dataclasses.asdict(stage.plan.goal) if stage.plan.goal else None
    return {
        "name": stage.name,
        "algorithm": stage.algorithm,
        "epochs": stage.schedule.epochs,
        "steps_per_epoch": stage.schedule.steps_per_epoch,
        "is_certain": stage.is_certain,
        "metrics_of_one_batch": stage.metrics,
        "trial": stage.trial,
        "notices": list(stage.notices),
        **plan,
    }


def _tell(stage: StageForecast, layers: bool) -> None:
    """The plan as a person reads it."""
    from slimcli.artifacts.event_lines import large, numbers

    plan, say = stage.plan, console.result
    rates = stage.schedule.learning_rates
    say(
        f"stage      {stage.name}: {stage.algorithm}, {stage.schedule.epochs} epochs x "
        f"{stage.schedule.steps_per_epoch} steps"
        + (f", lr {rates[0]:.4g} to {rates[-1]:.4g}" if rates else "")
    )
    say(f"model      {large(plan.params)} params · {large(plan.macs, 'MACs')} a sample")
    if plan.layers:
        _tell_layers(stage, layers)
    _tell_goal(plan)
    for title, values in (("budget", plan.budget), ("settings", plan.settings)):
        for name, value in values.items():
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            say(f"{title:<11}{name} {shown}")
    say(f"one batch  ok  {numbers(stage.metrics)}")
    for name, text in stage.trial.items():
        say(f"{name:<11}{text}")
    for text in (*stage.notices, *plan.notes):
        say(f"note       {text}")
    for text in (*stage.schedule.warnings, *plan.warnings):
        say(f"warning    {text}")
    for refusal in plan.refusals:
        if not stage.is_certain:
            fix = f"; fix: {refusal.fix}" if refusal.fix else ""
            say(f"warning    on today's model this stage would be refused: {refusal.what}{fix}")


def _tell_goal(plan: Plan) -> None:
    """What is asked for and what can be reached."""
    from slimcli.artifacts.event_lines import large

    if plan.goal:
        share = f" ({plan.goal.target / plan.macs:.1%})" if plan.goal.name == "macs" else ""
        console.result(f"goal       {plan.goal.name} <= {large(plan.goal.target)}{share}")
    if plan.reachable_macs is not None:
        share = f" ({plan.reachable_macs / plan.macs:.1%})" if plan.macs else ""
        console.result(f"reachable  {large(plan.reachable_macs, 'MACs')}{share}")


def _tell_layers(stage: StageForecast, layers: bool) -> None:
    """How many layers are cut or changed, and why the others aren't."""
    plan = stage.plan
    cuts = _cuts(plan)
    console.result(f"layers     {len(plan.layers)}{_counts(plan, cuts)}")
    if layers:
        console.table(*_table(plan, cuts))
        return
    if not cuts and not plan.targets:
        return
    reasons: dict[str, list[str]] = {}
    for row in plan.layers:
        if row.frozen_reason:
            reasons.setdefault(row.frozen_reason, []).append(row.name)
    for reason, names in reasons.items():
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
        console.result(f"  {'frozen' if cuts else 'left out':<9}{listed}: {reason}")


def _cuts(plan: Plan) -> bool:
    """Whether the algorithm removes channels, even if here it can remove none."""
    narrower = any(row.channels_minimum < row.channels for row in plan.layers)
    return narrower or plan.reachable_macs is not None


def _counts(plan: Plan, cuts: bool) -> str:
    """What happens to how many layers; empty if nothing happens to any."""
    from slimcli.artifacts.event_lines import counted

    targets = counted(len(plan.targets), "target")
    out = sum(bool(row.frozen_reason) for row in plan.layers)
    if cuts:
        prunable = sum(row.channels_minimum < row.channels for row in plan.layers)
        shown = f": {prunable} can be cut, {out} frozen"
        return f"{shown} · {targets}" if plan.targets else shown
    if not plan.targets:
        return ""
    return f": {targets}, {out} left out" if out else f": {targets}"


def _table(plan: Plan, cuts: bool) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Head and rows, one a layer; without cuts no widths to reach."""
    if cuts:
        return ("layer", "type", "channels", "at least", "group", "frozen because"), [
            (r.name, r.type, r.channels, r.channels_minimum, r.group, r.frozen_reason)
            for r in plan.layers
        ]
    return ("layer", "type", "channels", "group", "left out because"), [
        (r.name, r.type, r.channels, r.group, r.frozen_reason) for r in plan.layers
    ]
