"""Our description of TensorRT against what 10.x, 11.x and TensorRT-RTX really offer.

What the wheels of the full package offer is recorded (see bindings.py); TensorRT-RTX is asked
itself where it is installed.
"""

import importlib.util
import inspect
import json
import os
import re
from pathlib import Path

import pytest

from slimcli.artifacts.tensorrt import api

from . import bindings

ALL = json.loads(bindings.RECORDED.read_text(encoding="utf-8"))
if importlib.util.find_spec("tensorrt_rtx"):
    import tensorrt_rtx

    ALL["rtx"] = bindings.described(tensorrt_rtx)
VERSIONS = sorted(ALL)

# To build for a GPU that is not there is what the full package cannot do; only RTX is asked.
ONLY_RTX = {"num_compute_capabilities", "set_compute_capability"}
PLAIN = {"int": r"int|SupportsInt|SupportsIndex", "str": "str", "bool": "bool", "bytes": "Buffer"}


def annotation(function, name) -> str:
    return str(function.__annotations__.get(name, ""))


def fits(ours, overload) -> bool:
    """Whether a call with our arguments is a call of this overload, as far as plain types tell."""
    mine = [each for each in inspect.signature(ours).parameters if each != "self"]
    theirs = overload["parameters"]
    needed = [each for each in theirs if not each[2]]
    if not len(needed) <= len(mine) <= len(theirs):
        return False
    kinds = [(annotation(ours, name), each[1]) for name, each in zip(mine, theirs, strict=False)]
    kinds.append((annotation(ours, "return"), overload["result"]))
    return all(re.search(PLAIN[mine], theirs) for mine, theirs in kinds if mine in PLAIN)


def deviations(description) -> list[str]:
    """Each member of ours that a real class has not, or not like that."""
    found = []
    for name, protocol in bindings.CLASSES.items():
        for member in bindings.members(protocol):
            real = description[name].get(member)
            ours = vars(protocol).get(member)
            if real is None:
                wrong = "is missing"
            elif inspect.isfunction(ours):
                told = [each for each in real if each != "value"] if real != "value" else []
                wrong = "" if any(fits(ours, each) for each in told) else f"is called {real}"
            elif not isinstance(ours, property) and real != "value":
                wrong = f"cannot be set: {real}"
            else:
                wrong = "" if "value" in real else f"is called {real}"
            if wrong:
                found.append(f"{name}.{member} {wrong}")
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_our_description_of_the_api_is_true(version):
    allowed = ONLY_RTX if version != "rtx" else set()
    assert [
        each
        for each in deviations(ALL[version])
        if each.split()[0].partition(".")[2] not in allowed
    ] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_used_of_the_module_exists(version):
    found = ALL[version]
    assert set(bindings.members(api.TensorRT)) - set(found["module"]) == set()
    assert found["enums"] == bindings.ENUMS
    for name, arguments in (("Builder", 1), ("OnnxParser", 2), ("Runtime", 1)):
        (made,) = found[name]["__init__"]
        assert len(made["parameters"]) == arguments


def test_the_full_package_is_known_in_the_oldest_and_newest_major_version():
    assert [each.split(".")[0] for each in VERSIONS if each != "rtx"] == ["10", "11"]


def test_a_wrong_description_would_be_noticed():
    wrong = json.loads(json.dumps(ALL[VERSIONS[0]]))
    del wrong["Builder"]["create_network"]
    wrong["ITensor"]["name"] = [{"parameters": [], "result": "str"}]
    wrong["IExecutionContext"]["execute_async_v3"][0]["parameters"].append(["more", "int", False])
    wrong["OnnxParser"]["parse_from_file"][0]["parameters"][0][1] = "bytes"
    wrong["IBuilderConfig"]["builder_optimization_level"] = "read-only value"
    found = {each.split()[0] for each in deviations(wrong)} - {
        f"IBuilderConfig.{each}" for each in ONLY_RTX
    }
    assert found == {
        "Builder.create_network", "ITensor.name", "IExecutionContext.execute_async_v3",
        "OnnxParser.parse_from_file", "IBuilderConfig.builder_optimization_level",
    }  # fmt: skip


WHEELS = os.environ.get("SLIM_TENSORRT_WHEELS", "")


@pytest.mark.skipif(not WHEELS, reason="SLIM_TENSORRT_WHEELS names no folder with the wheels")
def test_what_was_recorded_is_what_the_wheels_say():
    found = dict(bindings.of_wheel(each) for each in sorted(Path(WHEELS).glob("*.whl")))
    assert found
    assert {version: ALL[version] for version in found} == found
