"""Cost of a QAT training step: ResNet-18 with quantizers against ResNet-18 without.

    python benchmarks/qat_step.py            # about ten minutes on one core
    python benchmarks/qat_step.py --pairs 5 --variants frozen

A round is one plain step and one step of every variant, so that whatever else the machine does
meets all. What is compared is CPU time of this process (user and system), one thread. The result is
the median of the ratios with a 95 % bootstrap interval; the goal of 1.2 is missed when the lower
bound exceeds it. Writes ``qat_step.json`` and ``qat_step.md`` next to this file.
"""

import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torchvision
from torch import nn

from slimcli.algorithms.qat.config import QATConfig
from slimcli.algorithms.qat.method import QATCompressor
from slimcli.compressor import GroupDefaults, Progress, Schedule
from slimcli.network.example import Example

LIMIT = 1.2
SETTINGS = {"cifar": (32, 32, True), "imagenet": (16, 112, False)}
VARIANTS = {
    "frozen": {"scale": "frozen"},
    "ema": {"scale": "ema"},
    "lsq": {"scale": "lsq"},
    "frozen, channel": {"scale": "frozen", "weight_granularity": "channel"},
}
PEERS = ("modelopt", "torch.ao")


def base_model(small_stem):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    if small_stem:
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    return model


def predict(model, batch):
    return model(batch[0])


class Step:
    """One model with its optimizer; calling it is one training step."""

    def __init__(self, model, batches, compressor=None):
        self.model, self.compressor = model.train(), compressor
        self.batches = itertools.cycle(batches[1:])
        defaults = GroupDefaults(lr=0.001)
        groups = (compressor or QATCompressor(QATConfig())).param_groups(model, defaults)
        self.optimizer = torch.optim.SGD(groups, lr=0.001, momentum=0.9)
        self.progress = Progress(0, 0, 0.001, Schedule(1, 1, (0.001,)))

    def __call__(self):
        """CPU seconds of one step."""
        images, labels = next(self.batches)
        start = time.process_time()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        if self.compressor:
            self.compressor.after_backward(self.model, self.progress)
        self.optimizer.step()
        if self.compressor:
            self.compressor.after_step(self.model, self.progress, False)
        return time.process_time() - start


def ours(model, batches, keys):
    compressor, example = QATCompressor(QATConfig(**keys)), Example(batches[0], predict)
    plan = compressor.plan(model, example, Schedule(1, 1, (0.001,)))
    model = compressor.prepare(model, example, plan)
    compressor.calibrate(model, [example])
    return Step(model, batches, compressor)


def peer(name, model, batches):
    """A step of another library's QAT on the same model; ImportError where it is missing."""
    if name == "modelopt":
        import modelopt.torch.quantization as quantization

        config = copy.deepcopy(quantization.INT8_DEFAULT_CFG)
        model = quantization.quantize(model, config, lambda each: each(batches[0][0]))
        return Step(model, batches)
    import warnings

    from torch.ao.quantization import QConfigMapping, get_default_qat_qconfig, quantize_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = QConfigMapping().set_global(get_default_qat_qconfig("fbgemm"))
        model = quantize_fx.prepare_qat_fx(model.train(), mapping, (batches[0][0],))
        return Step(model, batches)


def interval(ratios):
    """Median and its 95 % bootstrap interval."""
    generator = np.random.default_rng(0)
    resampled = np.median(generator.choice(ratios, (4000, len(ratios))), axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {
        "median_ratio": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "pairs": len(ratios),
    }


def steps_of(setting, variants):
    """The plain step and one step a variant, on the same batches; missing peers are left out."""
    batch_size, size, small_stem = SETTINGS[setting]
    torch.manual_seed(1)
    batches = [
        (torch.randn(batch_size, 3, size, size), torch.randint(10, (batch_size,))) for _ in range(5)
    ]
    steps = {"plain": Step(base_model(small_stem), batches)}
    for name in variants:
        model = base_model(small_stem)
        try:
            own = name in VARIANTS
            step = ours(model, batches, VARIANTS[name]) if own else peer(name, model, batches)
        except ImportError as error:
            print(f"{setting}: {name} is not installed ({error})")
            continue
        steps[name] = step
    return steps


def run(setting, variants, pairs):
    """Rounds of one step each; every variant is compared with the plain step of its round."""
    steps = steps_of(setting, variants)
    rounds = [{name: step() for name, step in steps.items()} for _ in range(pairs + 2)][2:]
    rows = []
    for name in list(steps)[1:]:
        row = {"setting": setting, "variant": name}
        row |= interval([each[name] / each["plain"] for each in rounds])
        row["plain_seconds"] = statistics.median(each["plain"] for each in rounds)
        row["met"] = row["low"] <= LIMIT
        rows.append(row)
        print(f"{setting}: {name} {row['median_ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
    return rows


def page(document):
    lines = [
        "# Cost of a QAT training step",
        "",
        "ResNet-18, one thread, CPU time of a training step with quantizers over one without: "
        f"{document['cpu']}, torch {document['torch']}. Made by `python benchmarks/qat_step.py`.",
        "`cifar`: batch 32 of 3x32x32, small stem. `imagenet`: batch 16 of 3x112x112. Ranges come",
        "from one batch; the steps see others.",
        "",
        "| network | quantizers | ratio, median of pairs | 95 % interval | pairs | plain step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['setting']} | {row['variant']} | {row['median_ratio']:.3f} "
        f"| {row['low']:.3f} to {row['high']:.3f} | {row['pairs']} "
        f"| {row['plain_seconds']:.2f} s |"
        for row in document["rows"]
    ]
    own = [row for row in document["rows"] if row["variant"] not in PEERS]
    missed = [f"{row['variant']} ({row['setting']})" for row in own if not row["met"]]
    verdict = f"missed by {', '.join(missed)}" if missed else "met by all of ours"
    lines += [
        "",
        f"Goal: at most {LIMIT} times the plain step: **{verdict}**.",
        "",
        "`frozen` is the default. modelopt has one weight scale a channel (`frozen, channel`) and",
        "no quantizers on residual skips; torch.ao folds batch norms while it trains.",
        "",
    ]
    return "\n".join(lines)


def processor():
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(
            line.split(":")[1].strip() for line in text.splitlines() if "model name" in line
        )
    except (OSError, StopIteration):
        return platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--variants", nargs="*", default=[*VARIANTS, *PEERS])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row for setting in options.settings for row in run(setting, options.variants, options.pairs)
    ]
    document = {"limit": LIMIT, "cpu": processor(), "torch": torch.__version__, "rows": rows}
    options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(page(document), encoding="utf-8")


if __name__ == "__main__":
    main()
