"""Which groups get compactors, and what is said of the others."""

from __future__ import annotations

from slimcli.algorithms.resrep.targets import find_targets
from slimcli.network.example import Example
from slimcli.network.structure import analyze

from .csgd_networks import build, images


def test_a_group_that_can_only_be_merged_gets_no_compactor_and_its_reason_is_told() -> None:
    model = build("preactivated")
    structure = analyze(model, Example(images(), lambda net, data: net(data)))
    targets, reasons = find_targets(model, structure, "all_bn", None, ())
    assert [target.name for target in targets] == ["inner_norm"]
    assert reasons == {
        "stem": "a removed channel would arrive at inner as a constant that no bias can take up"
    }
