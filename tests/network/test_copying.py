"""A deep copy of a model is a model of its own, its hooks and other functions included."""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimcli
from slimcli.network.copying import deep_copy
from slimcli.network.structure import analyze
from slimcli.network.structure.modes import share_copy
from slimcli.network.structure.precision import copy_as
from tests.solver import toys

from . import proving

BATCH = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Tapped(nn.Module):
    """Reads the features of two layers, which hooks write down."""

    def __init__(self, inputs: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.ReLU(),
        )
        self.seen: dict[int, Tensor] = {}
        self.heads = nn.ModuleList([nn.Conv2d(8, 5, 1), nn.Conv2d(6, 5, 1)])
        self.handles = [self.body[each].register_forward_hook(self.tap(each)) for each in (1, 3)]
        self.last = nn.Linear(5, 3)

    def tap(self, layer: int) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            self.seen[layer] = output

        return hook

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        features = self.heads[0](self.seen[1]) + self.heads[1](self.seen[3])
        return self.last(torch.relu(features).mean((2, 3)))


class Holder(nn.Module):
    """A scale, and attributes that a test sets."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.__dict__.update(attributes)

    def times(self, x: float) -> Tensor:
        return self.scale * x


def copied(model: Any) -> Any:
    """A copy, whose scale is 7 while the original's stays 2."""
    twin = deep_copy(model)
    with torch.no_grad():
        twin.scale.fill_(7.0)
    return twin


def ten(*_: Any) -> int:
    return 10


def check_structure(ran_before: bool) -> None:
    torch.manual_seed(0)
    model, example = proving.prepared(Tapped(), BATCH)
    if ran_before:
        proving.outputs(model, example)
    before = {name: id(each) for name, each in model.seen.items()}
    structure = analyze(model, example)
    assert {name: id(each) for name, each in model.seen.items()} == before
    first = next(each for each in structure.groups if each.size == 8)
    assert {each.tensor for each in first.consumers} == {"body.2.weight", "heads.0.weight"}
    found = proving.prunable(structure)
    assert [each.size for each in found] == [8, 6, 5]
    for seed in range(3):
        wrong, changed = proving.zeroed_and_cut(model, example, found, seed)
        assert wrong < proving.EXACT < 1e-6 < changed


def test_what_hooks_of_a_fresh_model_read_is_followed_in_the_copy_alone() -> None:
    check_structure(ran_before=False)


def test_what_hooks_of_a_model_that_ran_read_is_followed_in_the_copy_alone() -> None:
    check_structure(ran_before=True)


def test_a_network_that_reads_its_hooks_is_pruned_by_a_solver_and_left_alone(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = Tapped(inputs=1)
    keys = {"epoch": 9, "prune_rate": 0.3, "min_channels": 1, "lasso_decay": "auto"}
    hooks = {
        "dataset_generator": toys.datasets,
        "predict_function": toys.predict,
        "calculate_loss_function": toys.loss,
        "evaluate_function": toys.accuracy,
    }
    run = {"batch_size": 8, "devices": "cpu", "save_dir": str(tmp_path), "export": {"onnx": False}}
    found = {"auto_find_module_strategy": "all_conv", "task_name": "tapped"}
    done = slimcli.ResRepSolver(model, {**hooks, **run, **found, **keys}).run()
    assert done.exit_code == 0
    assert done.summary["final"]["params"] < sum(each.numel() for each in model.parameters())
    assert model.seen == {}


def test_a_lambda_as_an_attribute_reads_the_copy() -> None:
    model = Holder()
    model.scaled = lambda x: model.scale * x
    twin = copied(model)
    assert (twin.scaled(3.0), model.scaled(3.0)) == (21.0, 6.0)


def test_functions_in_lists_tuples_and_dictionaries_read_the_copy() -> None:
    model = Holder()
    model.held = [{"a": (lambda: model.scale, 5)}, lambda: model.scale + 1]
    same = model.held
    twin = copied(model)
    assert (twin.held[0]["a"][0](), twin.held[0]["a"][1], twin.held[1]()) == (7.0, 5, 8.0)
    assert (model.held[0]["a"][0](), model.held[1]()) == (2.0, 3.0)
    assert model.held is same is not twin.held


def test_a_list_of_functions_in_a_tuple_stays_the_one_that_is_an_attribute_too() -> None:
    model = Holder(held=[])
    model.held.append(lambda: model.scale)
    model.pair = (model.held, lambda: model.scale)
    twin = copied(model)
    assert (twin.held[0](), twin.pair[1](), model.held[0](), model.pair[1]()) == (
        7.0,
        7.0,
        2.0,
        2.0,
    )
    assert twin.pair[0] is twin.held is not model.held


def test_a_partial_of_a_closure_and_with_the_model_as_argument_reads_the_copy() -> None:
    model = Holder()

    def scaled(factor: float, other: Holder, *, add: Holder) -> Tensor:
        return model.scale * factor + other.scale + add.scale

    model.call = functools.partial(scaled, 10.0, model, add=model)
    model.again, model.call.note = model.call, "kept"
    twin = copied(model)
    assert (twin.call(), model.call()) == (84.0, 24.0)
    assert twin.again is twin.call
    assert twin.call.note == "kept"


def test_defaults_of_a_function_hold_the_copy() -> None:
    model = Holder()

    def scaled(x: float, net: Any = model, *, more: Any = model) -> Tensor:
        return net.scale * x + more.scale

    model.scaled = scaled
    twin = copied(model)
    assert (twin.scaled(3.0), model.scaled(3.0)) == (28.0, 8.0)


def test_a_closure_over_a_closure_reads_the_copy() -> None:
    model = Holder()

    def outermost() -> Callable[[], Tensor]:
        def inner() -> Tensor:
            return model.scale

        def middle() -> Tensor:
            return inner() + 1

        return lambda: middle() + 1

    model.call = outermost()
    twin = copied(model)
    assert (twin.call(), model.call()) == (9.0, 4.0)


def test_a_function_that_calls_itself_calls_its_copy() -> None:
    model = Holder()

    def power(times: int) -> Any:
        return model.scale * power(times - 1) if times else 1.0

    def itself() -> Any:
        return power, itself

    model.power, model.itself = power, itself
    twin = copied(model)
    assert (twin.power(3), model.power(3)) == (343.0, 8.0)
    assert twin.itself() == (twin.power, twin.itself)
    assert model.itself() == (model.power, model.itself)


def test_functions_that_share_a_variable_share_the_copy_of_it() -> None:
    model, count = Holder(), 0

    def step() -> Tensor:
        nonlocal count
        count += 1
        return model.scale

    def reset() -> None:
        nonlocal count
        count = 100

    def read() -> int:
        return count

    model.read, model.reset, model.step = read, reset, step  # the model is seen by the last alone
    twin = copied(model)
    twin.reset()
    twin.step()
    model.step()
    assert (twin.read(), model.read(), count) == (101, 1, 1)


def test_a_variable_without_a_value_still_has_none() -> None:
    model = Holder()

    def read() -> Any:
        return model.scale, later

    model.read = read
    twin = copied(model)
    with pytest.raises(NameError, match="later"):
        twin.read()
    later = 3
    assert model.read() == (2.0, 3)


def test_a_rebound_function_keeps_its_names_notes_and_attributes() -> None:
    model = Holder()

    @functools.wraps(ten)
    def named(x: int = 4) -> Tensor:
        return model.scale * x

    named.__doc__, named.note, named.owner = "Says it.", [1], model  # type: ignore[attr-defined]
    model.named = named
    twin = copied(model)
    kept = ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__", "__defaults__")
    assert [getattr(twin.named, each) for each in kept] == [getattr(named, each) for each in kept]
    assert twin.named.__wrapped__ is ten
    assert twin.named.note is named.note  # type: ignore[attr-defined]
    assert (twin.named.owner, named.owner) == (twin, model)  # type: ignore[attr-defined]
    assert not hasattr(copied(Holder(call=lambda: twin)).call, "__wrapped__")


def test_a_function_that_leads_to_nothing_copied_stays_the_same() -> None:
    other, pool = Holder(), nn.functional.max_pool2d  # closes over functions of torch
    model = Holder(plain=ten, pool=pool, apart=lambda: other, both=(ten, pool))
    twin = copied(model)
    assert pool.__closure__
    assert (twin.plain, twin.pool, twin.apart) == (ten, pool, model.apart)
    assert twin.both is model.both
    assert twin.apart() is other


def test_a_bound_method_is_one_of_the_copy() -> None:
    model = Holder()
    model.call = model.times
    model.held = {"a": [model.times]}
    twin = copied(model)
    assert (twin.call(3.0), twin.held["a"][0](3.0), model.call(3.0)) == (21.0, 21.0, 6.0)
    assert twin.call.__self__ is twin
    assert twin.call.__func__ is Holder.times


def test_a_forward_that_was_replaced_calls_the_old_one_of_the_copy() -> None:
    model = Holder(child=nn.ReLU())
    old = model.times

    def more(self: Any, x: float) -> Tensor:
        return old(x) + self.scale + model.scale

    model.times = MethodType(more, model)
    twin = copied(model)
    assert (twin.times(3.0), model.times(3.0)) == (35.0, 10.0)


def test_a_method_of_a_list_adds_to_the_list_of_the_copy() -> None:
    model = Holder(seen=[])
    add, put = model.seen.append, model.seen.__iadd__
    model.add, model.hook = add, lambda x: (add(x), put([model.scale]))
    twin = copied(model)
    twin.hook(1)
    twin.add(2)
    assert (twin.seen, model.seen) == ([1, 7.0, 2], [])


def test_a_weak_reference_leads_to_the_copy() -> None:
    model = Holder()
    ref = weakref.ref(model)
    model.ref, model.call = ref, lambda: ref().scale
    twin = copied(model)
    assert (twin.ref() is twin, model.ref() is model) == (True, True)
    assert (twin.call(), model.call()) == (7.0, 2.0)


def test_containers_that_only_a_function_holds_hold_the_copies() -> None:
    model, apart = Holder(), []
    numbers, order, all_of_it = {model: 1}, [model], {model}
    order.append(order)  # type: ignore[arg-type]
    model.number = lambda net: (numbers[net], order[0].scale, net in all_of_it)
    model.order, model.apart = (lambda: order), (lambda: (model, apart))
    twin = copied(model)
    assert twin.number(twin) == (1, 7.0, True)
    assert model.number(model) == (1, 2.0, True)
    assert twin.order()[1] is twin.order()
    assert twin.apart()[1] is apart
    assert (numbers, order[0], all_of_it) == ({model: 1}, model, {model})


def test_tensors_that_a_function_closes_over_are_those_of_the_copy() -> None:
    model = Holder()
    model.register_buffer("offset", torch.tensor(1.0))
    scale, offset = model.scale, model.offset
    model.call = lambda: (scale, offset)
    twin, wide, shared = deep_copy(model), copy_as(model, torch.float64), share_copy(model)
    for each in (twin, wide):
        assert each.call()[0] is each.scale is not scale
        assert each.call()[1] is each.offset is not offset
    assert wide.call()[0].dtype == torch.float64
    assert shared.call()[0] is shared.scale is scale
    assert shared.call()[1] is shared.offset is not offset
    assert model.call() == (scale, offset)


def test_what_is_copied_beside_a_model_has_functions_that_lead_to_the_copy() -> None:
    model = Holder()
    tap = type("Tap", (), {})()
    tap.call = lambda: model.scale
    twin, held = deep_copy((model, tap))
    with torch.no_grad():
        twin.scale.fill_(7.0)
    assert (held.call(), tap.call()) == (7.0, 2.0)


def test_removing_a_hook_removes_it_from_its_own_model_alone() -> None:
    model, example = proving.prepared(Tapped(), BATCH)
    twin, other = deep_copy(model), deep_copy(model)
    model.handles[0].remove()
    twin.handles[1].remove()
    for each in (model, twin, other):
        with torch.no_grad():
            each.body(example.batch)
    assert [list(each.seen) for each in (model, twin, other)] == [[3], [1], [1, 3]]


def test_empty_containers_of_a_copy_are_its_own_and_shared_as_before() -> None:
    model = Holder(seen={}, names=set())
    model.again, model.add = model.seen, lambda: model.seen.update(a=1)
    twin = copied(model)
    twin.add()
    twin.names.add("b")
    assert (twin.seen, twin.again is twin.seen, twin.names) == ({"a": 1}, True, {"b"})
    assert (model.seen, model.names) == ({}, set())


@dataclasses.dataclass
class Losses:
    balance: Tensor
    parts: tuple[Tensor, ...]


def with_history() -> tuple[Holder, Tensor]:
    model = Holder()
    return model, model.scale * torch.arange(3.0)


def test_a_tensor_with_a_history_is_copied_without_it_wherever_it_lies() -> None:
    model, feature = with_history()
    model.feature, model.seen, model.parts = feature, {"a": [feature]}, (feature, [feature])
    model.losses = Losses(feature, (feature.sum(), feature))
    twin = deep_copy(model)
    assert twin.feature.tolist() == [0.0, 2.0, 4.0]
    assert (twin.feature.is_leaf, twin.feature.requires_grad) == (True, False)
    assert twin.losses.parts[0].item() == 6.0
    held = [twin.seen["a"][0], twin.parts[0], twin.parts[1][0], twin.losses.balance]
    assert all(each is twin.feature for each in [*held, twin.losses.parts[1]])
    assert model.feature is feature
    assert feature.grad_fn is not None


def test_tensors_with_a_history_that_share_memory_share_it_in_the_copy() -> None:
    model, feature = with_history()
    model.feature, model.first = feature, feature[:2]
    twin = deep_copy(model)
    twin.feature.fill_(9.0)
    assert twin.first.tolist() == [9.0, 9.0]
    assert feature.tolist() == [0.0, 2.0, 4.0]


def test_functions_of_a_model_with_a_history_lead_to_the_copy() -> None:
    model, feature = with_history()
    model.feature, model.call = feature, lambda: (model.scale, model.feature)
    twin = copied(model)
    assert twin.call() == (twin.scale, twin.feature)
    assert twin.call()[0].item() == 7.0


def test_what_has_no_copy_at_all_is_refused_as_before() -> None:
    model, feature = with_history()
    model.feature, model.lock = feature, threading.Lock()
    with pytest.raises(TypeError, match="pickle"):
        deep_copy(model)


@pytest.mark.parametrize("make", [deep_copy, share_copy, lambda each: copy_as(each, torch.float64)])
def test_a_tapped_model_that_ran_with_gradients_is_analyzed_and_copied(make: Any) -> None:
    model, example = proving.prepared(Tapped(), BATCH)
    before = analyze(model, example)
    example.run(model.train())
    assert model.seen[1].grad_fn is not None
    assert not make(model).seen[1].requires_grad
    assert [each.name for each in analyze(model, example).groups] == [
        each.name for each in before.groups
    ]
