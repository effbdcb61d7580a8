"""Products of activations are not computed while a model is followed, unless numbers are asked."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimcli.network.example import Example
from slimcli.network.structure import analyze
from slimcli.network.structure.record import Record
from slimcli.network.structure.run import run_traced
from slimcli.network.structure.skipping import NumbersAsked, Skipping
from slimcli.network.structure.sources import Sources


class Products(TorchDispatchMode):
    """Inside, products that an operator computes are counted."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if name in ("convolution", "mm", "addmm", "bmm", "baddbmm"):
            self.names.append(func.name())
        return output


def example(*shape):
    torch.manual_seed(0)
    return Example(torch.randn(*shape), lambda model, batch: model(batch))


class Doing(nn.Module):
    """Two convolutions with some code of a user's between them."""

    def __init__(self, code):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.code = code
        self.register_buffer("kept", torch.zeros(()))

    def forward(self, x):
        return self.last(self.code(self, self.first(x)))


class Meeting(nn.Module):
    def __init__(self, added=False):
        super().__init__()
        self.added = added

    def forward(self, x):
        return torch.baddbmm(x, x.tanh() @ x.mT, x) if self.added else x @ x.mT


LAYERS = {
    "strides and borders": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "holes": (nn.Conv2d(4, 6, (3, 2), padding=(2, 0), dilation=(2, 1)), (2, 4, 9, 8)),
    "groups": (nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 9, 8)),
    "one axis": (nn.Conv1d(4, 6, 5, stride=3), (2, 4, 17)),
    "three axes": (nn.Conv3d(4, 6, 2, padding=1), (2, 4, 5, 6, 7)),
    "transposed": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (2, 4, 5, 6),
    ),
    "border as wide as needed": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 9, 8)),
    "rows": (nn.Linear(4, 6), (5, 4)),
    "rows without bias": (nn.Linear(4, 6, bias=False), (2, 5, 4)),
    "rows of images": (nn.Linear(4, 6), (2, 3, 5, 4)),
    "rows that meet": (Meeting(), (2, 5, 8)),
    "rows that meet, and one is added": (Meeting(added=True), (2, 5, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_not_computed_has_the_shape_and_the_memory_of_what_would_be(name):
    layer, shape = LAYERS[name]
    layer = layer.double().eval()
    x = torch.randn(*shape, dtype=torch.float64)
    seen = Products()
    with torch.no_grad(), seen:
        expected = layer(x)
    record, skipping = Record(Sources(layer)), Skipping()
    skipped = Products()
    with skipped:
        given = Example(x, lambda model, batch: model(batch))
        made = run_traced(layer, given, record, skipping=skipping).output
    assert seen.names
    assert skipped.names == []
    assert skipping.has_skipped
    assert made.shape == expected.shape
    assert made.stride() == expected.stride()
    assert made.dtype == expected.dtype


LAYOUTS = {
    "channels last": (nn.Conv2d(4, 6, 3), torch.channels_last, (2, 4, 9, 8)),
    "weights with channels last": (
        nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
        *(torch.contiguous_format, (2, 4, 9, 8)),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_in_another_layout_the_memory_is_that_of_what_is_computed(name):
    layer, layout, shape = LAYOUTS[name]
    x = torch.randn(*shape).contiguous(memory_format=layout)
    with torch.no_grad():
        expected = layer(x)
    given = Example(x, lambda model, batch: model(batch))
    made = run_traced(layer, given, Record(Sources(layer)), skipping=Skipping()).output
    assert made.stride() == expected.stride()


def rectified(self, x):
    return torch.relu(x)


def on_a_canvas(self, x):
    return x * (x.new_zeros((1, 1, 6)) == 0)


@pytest.mark.parametrize("code", [rectified, on_a_canvas], ids=lambda code: code.__name__)
def test_a_model_whose_code_asks_for_no_number_is_followed_without_products(code):
    model = Doing(code).eval()
    counted = Products()
    with counted:
        structure = analyze(model, example(2, 3, 8, 8), trial=False)
    assert counted.names == []
    assert [group.size for group in structure.groups if group.exact_zero] == [8]


def chosen(self, x):
    return x * (1.0 if x.mean() > 0 else 2.0)


def picked(self, x):
    seen.append(float(x[:, x.mean((0, 2, 3)).argmax()].sum()))
    return x


def ordered(self, x):
    seen.append(torch.arange(8).gather(0, x.mean((0, 2, 3)).argsort()))
    return x


def masked(self, x):
    seen.append(x[x > 0].numel())
    return x


def as_numbers(self, x):
    seen.append(x.tolist())
    return x


def as_array(self, x):
    seen.append(x.numpy().sum())
    return x


def copied(self, x):
    seen.append(copy.deepcopy(x))
    return x


def printed(self, x):
    print(x.mean(), file=(stream := io.StringIO()))
    seen.append(stream.getvalue())
    return x


def stored(self, x):
    torch.save(x, stream := io.BytesIO())
    stream.seek(0)
    seen.append(torch.load(stream))
    return x


def swallowed(self, x):
    try:
        seen.append(float(x.sum()))
    except BaseException:
        seen.append("swallowed")
    return x


def decomposed(self, x):
    rows = x[0].flatten(1)
    seen.append(torch.linalg.cholesky(rows @ rows.T))  # of zeros there is none
    return x


def painted(self, x):
    canvas = torch.zeros(2, 8, 6, 6)
    part = canvas[:, :8]
    part.copy_(x)
    places = (canvas.abs() * 10).long().clamp(max=7).flatten()
    seen.append(torch.arange(8)[places])
    return x


def renamed(self, x):
    places = nn.Parameter((x.abs() * 10).long(), requires_grad=False).clamp(max=7)
    seen.append(torch.arange(8)[places.flatten()])
    return x


def renamed_as_array(self, x):
    seen.append(nn.Parameter(x, requires_grad=False).numpy().sum())
    return x


def kept(self, x):
    self.kept.add_(x.mean().detach())
    seen.append(float(self.kept))
    return x


def kept_as_attribute(self, x):
    if not self.training:
        self.last_mean = x.mean()
    seen.append(self.last_mean.clone() if hasattr(self, "last_mean") else torch.zeros(()))
    return x


@torch.library.custom_op("products::direction", mutates_args=())
def direction(x: torch.Tensor) -> torch.Tensor:
    seen.append(x.sum())
    return torch.sign(x.sum())


def foreign(self, x):
    return x * direction(x)


seen = []
ASKING = [
    *(
        picked,
        ordered,
        masked,
        as_numbers,
        as_array,
        copied,
        printed,
        stored,
        swallowed,
        decomposed,
    ),
    *(painted, renamed, renamed_as_array, kept_as_attribute, foreign),
]


@pytest.mark.parametrize("code", ASKING, ids=lambda code: code.__name__)
def test_code_that_asks_for_numbers_gets_those_of_the_model(code):
    model, given = Doing(code).eval(), example(2, 3, 8, 8)
    with torch.no_grad():
        seen.clear()
        model(given.batch)
    expected = seen[-1]
    vars(model).pop("last_mean", None)
    seen.clear()
    analyze(model, given, trial=False)
    assert seen
    assert same(seen[-1], expected)


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    return left == right


def test_a_branch_on_numbers_is_the_one_that_the_model_takes():
    ran = []

    def noted(self, x):
        ran.append(bool(x.mean() > 0))
        return x

    model = Doing(noted).eval()
    with torch.no_grad():
        model.first.bias += 10
    analyze(model, example(2, 3, 8, 8), trial=False)
    assert ran == [True]


def test_numbers_that_a_buffer_keeps_are_computed_and_it_is_as_before():
    model, given = Doing(kept).eval(), example(2, 3, 8, 8)
    with torch.no_grad():
        expected = float(model.first(given.batch).mean())
    seen.clear()
    analyze(model, given, trial=False)
    assert seen[-1] == expected
    assert model.kept == 0


CACHE = {}


BATCHES = {
    "tensors": example(2, 3, 8, 8),
    "lists": Example([0.5] * 384, lambda net, row: net(torch.tensor(row).view(2, 3, 8, 8))),
}


@pytest.mark.parametrize("batch", BATCHES)
def test_what_hangs_on_weights_alone_is_computed(batch):
    def scaled(self, x):
        rows = self.last.weight.flatten(1)
        return x * CACHE.setdefault("product", rows @ rows.T).sum()

    model = Doing(scaled).eval()
    CACHE.clear()
    analyze(model, BATCHES[batch], trial=False)
    rows = model.last.weight.detach().flatten(1)
    torch.testing.assert_close(CACHE["product"], rows @ rows.T)


def test_what_fails_for_want_of_numbers_is_followed_with_them():
    def drawn(self, x):
        torch.multinomial(x[0].flatten(1).abs(), 1)  # of zeros nothing can be drawn
        return x

    structure = analyze(Doing(drawn).eval(), example(2, 3, 8, 8), trial=False)
    assert structure.notes == ()
    assert [group.size for group in structure.groups] == [8, 4]


def test_a_run_without_numbers_ends_where_they_are_asked_for():
    model, given = Doing(chosen).eval(), example(2, 3, 8, 8)
    with pytest.raises(NumbersAsked):
        run_traced(model, given, Record(Sources(model)), skipping=Skipping())


def test_an_error_of_the_model_is_the_models():
    def broken(self, x):
        raise ValueError(f"mean {x.mean().item():.6f}")

    model, given = Doing(broken).eval(), example(2, 3, 8, 8)
    with torch.no_grad():
        mean = model.first(given.batch).mean().item()
    with pytest.raises(ValueError, match=f"mean {mean:.6f}"):
        analyze(model, given, trial=False)


MISFITS = {
    "channels": lambda x: nn.functional.conv2d(x[:, :5], torch.zeros(4, 8, 1, 1)),
    "bias": lambda x: nn.functional.conv2d(x, torch.zeros(4, 8, 1, 1), torch.zeros(5)),
    "dtype": lambda x: nn.functional.conv2d(x, torch.zeros(4, 8, 1, 1, dtype=torch.float64)),
    "kernel": lambda x: nn.functional.conv2d(x, torch.zeros(4, 8, 7, 7)),
    "groups": lambda x: nn.functional.conv2d(x, torch.zeros(3, 4, 1, 1), groups=2),
    "transposed": lambda x: nn.functional.conv_transpose2d(x, torch.zeros(7, 4, 1, 1)),
    "rows": lambda x: x.flatten(2)[0] @ torch.zeros(35, 4),
    "added": lambda x: torch.addmm(torch.zeros(5), x.flatten(2)[0], torch.zeros(36, 4)),
    "samples": lambda x: torch.bmm(x.flatten(2), torch.zeros(3, 36, 4)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_products_that_do_not_fit_fail_as_they_do_without_us(name):
    model, given = Doing(lambda self, x: MISFITS[name](x)).eval(), example(2, 3, 8, 8)
    model.last = nn.Identity()
    with pytest.raises(RuntimeError) as expected, torch.no_grad():
        model(given.batch)
    with pytest.raises(RuntimeError) as raised:
        analyze(model, given, trial=False)
    assert str(raised.value) == str(expected.value)
