"""What is known of a model that runs, but can't be followed: its layers, and that all stay."""

from __future__ import annotations

import torch
from torch import nn

from slimcli.network.copying import deep_copy
from slimcli.network.count import count_macs
from slimcli.network.example import Example
from slimcli.network.structure import user_line
from slimcli.network.structure.left_alone import outputs_of
from slimcli.network.structure.modes import preserved_randomness
from slimcli.network.structure.producing import MIXING
from slimcli.network.structure.structure import LayerRow, Structure


def nothing_followed(
    model: nn.Module, example: Example, samples: int, error: Exception
) -> Structure:
    """A structure without groups; every layer says what went wrong when the model was followed.

    Args:
        model: Is run once more, to be sure that the error isn't its own.
        example: The batch.
        samples: In the batch.
        error: What following the model raised.

    Raises:
        Exception: What the model raises by itself.
    """
    twin = deep_copy(model).eval()  # of its own: nobody hears what is written into parameters
    with torch.no_grad(), preserved_randomness(twin):
        example.run(twin)
    lines = str(error).splitlines()
    where = user_line.of_error(error)
    what = f"the model could not be followed: {type(error).__name__}: {lines[0] if lines else ''}"
    reason = f"{what} at {where}" if where else what
    rows = tuple(
        LayerRow(path, type(module).__name__, outputs_of(model, path), "", reason)
        for path, module in model.named_modules()
        if isinstance(module, MIXING)
    )
    notes = [reason]
    try:
        with preserved_randomness(twin):
            macs = count_macs(twin, example, samples).total
    except Exception as uncounted:
        macs = 0
        notes.append(f"its MACs can't be counted: {type(uncounted).__name__}: {uncounted}")
    return Structure((), rows, (), macs, tuple(notes), samples=samples)
