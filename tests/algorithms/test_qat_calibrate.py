"""How ranges are chosen, against plain references."""

import numpy as np
import pytest
import torch

from slimcli.errors import RunError
from slimcli.network.quantize.calibrate import (
    BINS,
    HistogramCollector,
    collector,
    entropy_amax,
    mse_amax,
    percentile_amax,
)

# A histogram of 8,192 bins whose range was doubled at most once resolves 1/4096 of it.
BIN_SHARE = 1 / 4096


def amax_of(method, *batches, percentile=99.9):
    made = collector(method, "input of here", percentile)
    for batch in batches:
        made.update(torch.as_tensor(batch))
    return float(made.amax())


def samples(seed=0, count=40_000):
    return np.random.default_rng(seed).laplace(size=count).astype(np.float32)


def test_max_is_the_largest_magnitude_of_all_batches():
    assert amax_of("max", [1.0, -3.0], [2.0, 0.5]) == 3.0


def test_ema_is_the_mean_of_the_batches_largest_magnitudes():
    assert amax_of("ema", [1.0, -3.0], [2.0, 0.5], [-4.0, 0.0]) == pytest.approx(3.0)


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 100.0])
def test_percentile_agrees_with_numpy(percentile):
    x = samples()
    expected = np.percentile(np.abs(x), percentile)
    found = amax_of("percentile", x[:10_000], x[10_000:], percentile=percentile)
    assert abs(found - expected) <= 2 * BIN_SHARE * np.abs(x).max()


def squared_error(x, amax):
    scale = amax / 127
    return np.mean((x - np.clip(np.round(x / scale), -128, 127) * scale) ** 2)


def test_mse_finds_the_best_range_that_a_search_on_the_samples_finds():
    x = samples()
    found = amax_of("mse", x)
    candidates = np.linspace(0.2, 1.0, 400) * np.abs(x).max()
    best = min(squared_error(x, amax) for amax in candidates)
    # 256 candidate ranges are at most 0.4 % of the range apart: the error is flat there.
    assert squared_error(x, found) <= best * 1.01
    assert squared_error(x, found) < squared_error(x, np.abs(x).max()) * 0.95


def test_mse_cuts_off_an_outlier_that_is_one_in_forty_million():
    counts, edges = np.histogram(np.abs(samples()), BINS, (0, 60.0))
    counts = counts * 1000.0
    counts[-1] += 1
    centres = (edges[1:] + edges[:-1]) / 2

    def error(amax):
        scale = amax / 127
        return np.dot(counts, (centres - np.minimum(np.round(centres / scale), 127) * scale) ** 2)

    found = mse_amax(counts, edges[1])
    assert found < 20
    assert error(found) <= 1.01 * min(error(amax) for amax in np.linspace(4.0, 60.0, 500))


def test_entropy_is_not_outvoted_by_the_zeros_behind_a_relu():
    x = np.maximum(samples(), 0)
    some = amax_of("entropy", x)
    assert amax_of("entropy", np.append(x, np.zeros(1_000_000, np.float32))) == some


def divergence_reference(counts, edge, levels=128):
    """Bin by bin and level by level, as the method is usually told."""
    wanted = counts[:edge].copy()
    wanted[-1] += counts[edge:].sum()
    spread = np.zeros(edge)
    for level in range(levels):
        members = [b for b in range(edge) if b * levels // edge == level]
        filled = [b for b in members if counts[b] > 0]
        for b in filled:
            spread[b] = sum(counts[m] for m in members) / len(filled)
    p, q = wanted / wanted.sum(), spread / spread.sum()
    return sum(np.inf if q[b] == 0 else p[b] * np.log(p[b] / q[b]) for b in range(edge) if p[b] > 0)


def test_entropy_agrees_with_a_plain_search():
    counts, edges = np.histogram(np.abs(samples()), 512)
    counts = counts.astype(float)
    plain = counts.copy()
    plain[0] = plain[1]
    candidates = range(128, 513, 2)
    best = min(candidates, key=lambda edge: divergence_reference(plain, edge))
    assert entropy_amax(counts, edges[1]) == pytest.approx(best * edges[1])
    assert best < 512


def test_the_histogram_grows_without_losing_values():
    made = HistogramCollector("input of here", "percentile", 100.0)
    made.update(torch.tensor([0.5, -1.0]))
    made.update(torch.tensor([7.0, 0.1]))
    assert made.top == 8.0
    assert made.counts.sum() == 4
    assert made.amax().item() == pytest.approx(7.0, abs=8.0 / BINS)


@pytest.mark.parametrize("method", ["max", "ema", "percentile", "mse", "entropy"])
def test_zeros_have_range_zero_and_do_not_stop_the_next_batch(method):
    assert amax_of(method, np.zeros(100, np.float32)) == 0.0
    later = amax_of(method, np.zeros(100, np.float32), samples())
    assert later > 0


@pytest.mark.parametrize("method", ["max", "ema", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_or_inf_stops_with_the_name_of_the_tensor(method, bad):
    with pytest.raises(RunError, match="the input of here is not finite"):
        amax_of(method, [1.0, bad])


def test_a_tensor_that_no_batch_reached_is_an_error():
    with pytest.raises(RunError, match="no calibration batch reached the input of here"):
        amax_of("max")


def test_ranges_are_never_wider_than_the_data():
    counts, edges = np.histogram(np.abs(samples()), 2048)
    top = edges[-1] * (1 + 1e-9)
    counts = counts.astype(float)
    assert 0 < mse_amax(counts, edges[1]) <= top
    assert 0 < entropy_amax(counts, edges[1]) <= top
    assert 0 < percentile_amax(counts, edges[1], 99.0) <= top
