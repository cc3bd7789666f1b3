"""Which weights should share a dictionary: distances and the best pairs (GeoPair, arXiv 2609.25963)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor


def window_distance(narrow: Tensor, wide: Tensor) -> float:
    """δ = min_w ‖B[:, w : w + m] − A‖ / ‖A‖, the distance of A to the most similar window of columns of B.

    Args:
        narrow: A = L_i W_i (d, m), whitened.
        wide: B = L_j W_j (d, n), n >= m.

    Returns:
        δ; infinity where A is zero.

    Raises:
        ValueError: if A is wider than B, or their numbers of rows differ.
    """
    m, n = narrow.shape[1], wide.shape[1]
    if m > n or narrow.shape[0] != wide.shape[0]:
        raise ValueError(f"no window of {tuple(wide.shape)} has the shape {tuple(narrow.shape)}")
    energy = float(narrow.double().square().sum())
    if energy == 0:
        return float("inf")
    running = torch.nn.functional.pad(wide.double().square().sum(0).cumsum(0), (1, 0))
    windows = running[m:] - running[:-m]
    # Entry (c, w) of the strided view is the inner product of column c of A and column w + c of B.
    products = (narrow.T @ wide).contiguous()
    inner = products.as_strided((m, n - m + 1), (n + 1, 1)).double().sum(0)
    squared = float((windows - 2 * inner + energy).min())
    return math.sqrt(max(squared, 0.0) / energy)


def pair_distances(whitened: Sequence[Tensor]) -> Tensor:
    """δ of every pair: the narrower weight against windows of the wider one.

    Args:
        whitened: L_i W_i (d, n_i), all with the same d.

    Returns:
        (count, count) symmetric float64, infinity on the diagonal.
    """
    count = len(whitened)
    distances = torch.full((count, count), torch.inf, dtype=torch.float64)
    for i in range(count):
        for j in range(i):
            narrow, wide = sorted((whitened[i], whitened[j]), key=lambda w: w.shape[1])
            distances[i, j] = distances[j, i] = window_distance(narrow, wide)
    return distances


def best_pairs(distances: Tensor) -> list[tuple[int, int]]:
    """The largest set of disjoint pairs and, among those, the one of least total distance.

    This is a maximum-weight matching with weights M − δ for a large M, solved exactly as an integer programme.

    Args:
        distances: (count, count) symmetric; pairs at infinite distance are never formed.

    Returns:
        pairs (i, j) with i < j, in ascending order. An index that is in no pair stays alone.
    """
    table = distances.double().numpy(force=True)
    first, second = np.nonzero(np.triu(np.isfinite(table), k=1))
    if not len(first):
        return []
    cost = table[first, second]
    # One more pair always pays: the distances of a matching, each scaled to at most 1, sum to less than `count`.
    # The factor lifts differences between distances far above the solver's absolute tolerance.
    spread = float(np.ptp(cost)) or 1.0
    weight = 1e3 * (len(table) + (cost.max() - cost) / spread)
    edges = np.arange(len(first))
    incidence = csr_array(
        (np.ones(2 * len(edges)), (np.concatenate([first, second]), np.concatenate([edges, edges]))),
        shape=(len(table), len(edges)),
    )
    result = milp(
        -weight,
        integrality=np.ones_like(weight),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(incidence, ub=np.ones(len(table))),
        options={"mip_rel_gap": 0.0},
    )
    chosen = np.flatnonzero(result.x > 0.5)
    return sorted((int(first[e]), int(second[e])) for e in chosen)
