"""Hierarchical clustering of a graph: merge neighbors by Ward's rule until a given number of groups is left."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray


def merge(
    features: NDArray[np.float64], sizes: NDArray[np.float64], edges: NDArray[np.int64], n: int
) -> NDArray[np.int64]:
    """Return groups of a graph's nodes by Ward's rule: always merge the two neighbors with the smallest merge cost.

    Example:
        >>> features = np.array([[0.0], [1.0], [5.0], [0.0]])  # the last equals the first, but they are not neighbors
        >>> groups = merge(features, np.ones(4), np.array([[0, 1], [1, 2], [2, 3]]), 3)
        >>> bool(groups[0] == groups[1]), len(set(groups.tolist()))
        (True, 3)

    Args:
        features: ``(N, D)``, the mean features of each node.
        sizes: ``(N,)``, the number of points of each node.
        edges: ``(E, 2)``, pairs of neighbors. Only neighbors are merged.
        n: number of groups to leave. More are left if the graph has more connected components.

    Returns:
        ``(N,)`` labels, equal within a group.

    Reference:
        Ward, "Hierarchical Grouping to Optimize an Objective Function", JASA 1963: merging a and b adds
        ``|a| |b| / (|a| + |b|) * |mean(a) - mean(b)|^2`` to the sum of squares within groups.
    """
    count = len(features)
    means = np.concatenate(
        [features, np.empty_like(features)]
    )  # a merged group is a new node, appended after the others
    weights = np.concatenate([sizes, np.zeros_like(sizes)])
    parents = np.arange(2 * count)
    near: list[set[int]] = [set() for _ in range(count)]

    def costs(a: NDArray[np.int64], b: NDArray[np.int64] | int) -> list[float]:
        factor = weights[a] * weights[b] / (weights[a] + weights[b])
        return (factor * ((means[a] - means[b]) ** 2).sum(-1)).tolist()

    for a, b in edges.tolist():
        near[a].add(b)
        near[b].add(a)
    queue = [(cost, a, b) for cost, (a, b) in zip(costs(*edges.T), edges.tolist(), strict=True)]
    heapq.heapify(queue)
    alive = [True] * count
    left = count
    while left > n and queue:
        _, a, b = heapq.heappop(queue)
        if not (alive[a] and alive[b]):
            continue
        new = len(near)
        weights[new] = weights[a] + weights[b]
        means[new] = (weights[a] * means[a] + weights[b] * means[b]) / weights[new]
        parents[a] = parents[b] = new
        alive[a] = alive[b] = False
        alive.append(True)
        around = [node for node in sorted(near[a] | near[b]) if alive[node]]
        near[a], near[b] = set(), set()
        near.append(set(around))
        for node, cost in zip(around, costs(np.array(around, dtype=np.int64), new), strict=True):
            near[node].add(new)
            heapq.heappush(queue, (cost, node, new))
        left -= 1
    roots = parents.copy()
    for node in reversed(range(len(near))):  # a parent has a larger index than its children, so its root is known
        roots[node] = roots[parents[node]]
    return roots[:count]
