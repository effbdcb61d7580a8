"""Which channels of a network belong together, learnt by running it.

``analyze`` is the entry; ``Structure`` and ``Group`` are what it finds; ``zero_channels`` does what
a compactor row of zero does.
"""

from slimcli.network.structure.analyze import analyze
from slimcli.network.structure.edits import zero_channels
from slimcli.network.structure.strategies import STRATEGIES, select_groups
from slimcli.network.structure.structure import (
    ConvBatchNorm,
    Group,
    LayerRow,
    Site,
    Structure,
)

__all__ = [
    "STRATEGIES",
    "ConvBatchNorm",
    "Group",
    "LayerRow",
    "Site",
    "Structure",
    "analyze",
    "select_groups",
    "zero_channels",
]
