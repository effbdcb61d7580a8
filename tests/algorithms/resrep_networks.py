"""Targets made by hand and small networks for the tests of ResRep."""

from slimcli.algorithms.resrep.targets import Place, Target
from slimcli.network.cuts import Slot
from slimcli.network.structure import Group


def one_layer_target(conv: str, size: int) -> Target:
    """One conv without a norm whose channels nobody shares."""
    rows = tuple((channel,) for channel in range(size))
    place = Place(conv, conv, None, False, False, 2, size)
    group = Group(
        name=conv,
        size=size,
        producers=(Slot(f"{conv}.weight", 0, rows),),
        followers=(),
        consumers=(),
        sites=(),
    )
    return Target(group, (place,), (rows,))
