"""Which filters become one: clusters of the channels of a coupled group. Pure functions on arrays.

Differs from the authors' code: k-means sees the kernels of *every* layer of a coupled group, each
filter scaled by the batch norm behind it (two filters that differ by a factor which the norm takes
back are the same filter), and it is seeded; a cluster is never empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Clusters = tuple[tuple[int, ...], ...]
"""Channels of each cluster; channels ascend within one, clusters by their first channel."""

RESTARTS = 10
"""Starts of k-means; the tightest result counts."""

FEW_RESTARTS = 2
"""Starts for more than 512 channels, where one takes seconds."""


def cluster(features: NDArray[np.float64], count: int, method: str, seed: int) -> Clusters:
    """Splits the channels into exactly ``count`` clusters, none of them empty.

    Args:
        features: (channels, numbers); ``even`` only looks at how many channels there are.
        count: Clusters to make, from 1 to the number of channels.
        method: ``kmeans`` or ``even``.
        seed: Seed of k-means.

    Raises:
        ValueError: ``count`` is out of range.

    >>> cluster(np.array([[0.0], [9.0], [0.1], [9.1]]), 2, "kmeans", seed=0)
    ((0, 2), (1, 3))
    >>> cluster(np.zeros((5, 1)), 2, "even", seed=0)
    ((0, 1, 2), (3, 4))
    """
    channels = len(features)
    if not 1 <= count <= channels:
        raise ValueError(f"expected 1 to {channels} clusters, received {count}")
    if count == channels:
        return tuple((channel,) for channel in range(channels))
    if count == 1:
        return (tuple(range(channels)),)
    if method == "even":
        runs = np.array_split(np.arange(channels), count)
        return tuple(tuple(run.tolist()) for run in runs)
    return _in_order(_k_means(features, count, seed), count)


def _k_means(features: NDArray[np.float64], count: int, seed: int) -> NDArray[np.int64]:
    """Cluster number of each channel; duplicate filters may leave numbers unused."""
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    restarts = RESTARTS if len(features) <= 512 else FEW_RESTARTS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct filters than clusters
        labels: NDArray[np.int64] = KMeans(
            n_clusters=count, n_init=restarts, random_state=seed
        ).fit_predict(compact(features))
    return labels


def compact(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same distances between channels in as few numbers as there are channels.

    An orthogonal change of coordinates, so k-means finds the same clusters and is faster.

    >>> compact(np.ones((2, 100))).shape
    (2, 2)
    """
    channels, numbers = features.shape
    if numbers <= channels:
        return features
    upper = np.asarray(np.linalg.qr(features.T, mode="r"), dtype=np.float64)
    coordinates: NDArray[np.float64] = upper.T
    return coordinates


def _in_order(labels: NDArray[np.int64], count: int) -> Clusters:
    """Clusters in canonical order; missing ones are split off the largest."""
    clusters = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    while len(clusters) < count:
        largest = max(clusters, key=len)
        clusters.append([largest.pop()])
    return tuple(sorted(tuple(sorted(members)) for members in clusters))


def duplicates(features: NDArray[np.float64]) -> Clusters:
    """Clusters of channels that are equal already, number for number.

    >>> duplicates(np.array([[1.0], [2.0], [1.0]]))
    ((0, 2), (1,))
    """
    members: dict[bytes, list[int]] = {}
    for channel, row in enumerate(features + 0.0):  # + 0.0: minus zero is zero
        members.setdefault(row.tobytes(), []).append(channel)
    return tuple(sorted(tuple(each) for each in members.values()))


def labels_of(clusters: Sequence[Sequence[int]]) -> list[int]:
    """Cluster number of each channel.

    >>> labels_of(((0, 2), (1,)))
    [0, 1, 0]
    """
    labels: dict[int, Any] = {}
    for number, members in enumerate(clusters):
        labels.update(dict.fromkeys(members, number))
    return [labels[channel] for channel in range(len(labels))]
