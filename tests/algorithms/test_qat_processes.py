"""Two processes with gloo: they calibrate together, and their scales never part."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from slimcli.algorithms.qat.config import QATConfig
from slimcli.algorithms.qat.method import QATCompressor
from slimcli.compressor import GroupDefaults, Progress, Schedule
from slimcli.network.example import Example
from slimcli.network.quantize.fake_quant import quantizers

from .qat_networks import conv, predict

STEPS = 3
# A convolution of four images may sum in another order than the same one of eight.
REORDERED_SUM = 1e-6
CALIBRATIONS = ("max", "ema", "percentile", "mse", "entropy")


def network() -> nn.Module:
    """Without batch norm: halves of a batch then compute what the whole one does."""
    torch.manual_seed(0)
    return nn.Sequential(
        conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)
    )


def batches(rank: int, processes: int) -> list[torch.Tensor]:
    """What one of the processes sees; the second half is four times as large."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(STEPS + 1, 8, 3, 8, 8, generator=generator)
    images[:, 4:] *= 4
    return list(images.chunk(processes, dim=1)[rank])


def trained(keys: dict, rank: int, processes: int) -> dict[str, torch.Tensor]:
    """State of the quantizers after calibration, after one forward pass and at the end."""
    calibration, *steps = batches(rank, processes)
    model, compressor = network(), QATCompressor(QATConfig(**keys))
    model(torch.randn(2, 3, 8, 8))
    example = Example(calibration, predict)
    schedule = Schedule(1, STEPS, (0.01,) * STEPS)
    model = compressor.prepare(model, example, compressor.plan(model, example, schedule))
    compressor.calibrate(model, [example])
    states = {f"calibrated {name}": each.scale.detach().clone()
              for name, each in quantizers(model).items()}  # fmt: skip
    shared = nn.parallel.DistributedDataParallel(model) if processes > 1 else model
    groups = compressor.param_groups(model, GroupDefaults(lr=0.01))
    optimizer = torch.optim.SGD(groups, lr=0.01)
    for number, batch in enumerate(steps):
        progress = Progress(0, number, 0.01, schedule)
        optimizer.zero_grad()
        shared.train()(batch).square().mean().backward()
        if number == 0:
            states |= {
                f"seen {name}": each.amax.clone() for name, each in quantizers(model).items()
            }
        compressor.after_backward(model, progress)
        optimizer.step()
        compressor.after_step(model, progress, False)
    return states | {f"end {name}": each for name, each in model.state_dict().items()}


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=2)
    variants = [{"scale": "ema"}, {"scale": "lsq", "weight_granularity": "channel"}]
    variants += [{"calibration": each} for each in CALIBRATIONS]
    torch.save([trained(keys, rank, 2) for keys in variants], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes ended with: ema, lsq, then each calibration."""
    folder = tmp_path_factory.mktemp("processes")
    root = Path(__file__).parents[2]
    commands = [[sys.executable, "-m", __name__, str(rank), str(folder)] for rank in (0, 1)]
    running = [subprocess.Popen(each, cwd=root) for each in commands]
    assert [each.wait(timeout=120) for each in running] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
def test_scales_and_weights_are_the_same_in_both_processes(found):
    for first, second in zip(*found, strict=True):
        assert first.keys() == second.keys()
        assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@pytest.mark.slow
def test_two_processes_find_the_ranges_that_one_finds(found):
    ema, alone = found[0][0], trained({"scale": "ema"}, 0, 1)
    names = [name for name in ema if not name.startswith("end")]
    assert len(names) == 12
    for name in names:
        assert torch.allclose(ema[name], alone[name], rtol=REORDERED_SUM, atol=0), name


@pytest.mark.slow
def test_a_learned_scale_learns_from_both_halves(found):
    learned = found[0][1]
    name = "2.input_quantizer"
    assert not torch.equal(learned[f"calibrated {name}"], learned[f"end {name}.scale"])


if __name__ == "__main__":
    process(int(sys.argv[1]), Path(sys.argv[2]))
