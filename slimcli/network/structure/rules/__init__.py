"""What each operator does to the channels that pass it, one file a family.

Some of them, like ``reshape`` or ``selu``, are made of others, and arrive only where a forward
switches to inference mode, in which torch takes nothing apart.
"""

from slimcli.network.structure.rules import (
    conv,
    fourier,
    index,
    joining,
    matmul,
    movement,
    norm,
    pointwise,
    scatter,
    spatial,
    turning,
    weights,
)
from slimcli.network.structure.trace import Rule

RULES: dict[str, Rule] = {
    **pointwise.RULES,
    **joining.RULES,
    **spatial.RULES,
    **norm.RULES,
    **matmul.RULES,
    **conv.RULES,
    **movement.RULES,
    **index.RULES,
    **scatter.RULES,
    **turning.RULES,
    **fourier.RULES,
    **weights.RULES,
}

__all__ = ["RULES"]
