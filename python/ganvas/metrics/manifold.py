"""Improved precision and recall of a generator (Kynkäänniemi et al. 2019, arXiv:1904.06991).

Each set of features spans a manifold: the union of balls around its points, each as large as the distance to the
point's k-th nearest neighbour in the same set (eq. 1). Precision is the share of generated points inside the manifold
of the real ones (are the images realistic?), recall the share of real points inside the generated manifold (are all
kinds of images generated?). A collapsed generator can keep its precision but loses its recall.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ganvas.metrics.features import check_features


class PrecisionRecall(NamedTuple):
    """Both in [0, 1], higher is better."""

    precision: float
    recall: float


def precision_recall(
    real_features: Tensor, generated_features: Tensor, *, k: int = 3, block_size: int = 2048
) -> PrecisionRecall:
    """Improved precision and recall of generated against real features.

    The distances are computed in float64, block by block, so the memory needed is about
    ``8 · block_size · (block_size + D)`` bytes beside the features, for any number of samples; the time grows with
    (N + M)²·D. The two numbers depend on the numbers of samples: compare only at equal N and M.

    Args:
        real_features: (N, D) floating point, N > k.
        generated_features: (M, D) floating point, M > k, on the same device.
        k: which neighbour's distance is the radius of a ball; 3 in the paper.
        block_size: rows and columns of distances held at once.

    Raises:
        ValueError: features that are empty, not (N, D), NaN or infinite, or differ in D; k or block_size below 1; no
            more than k samples on one side.
    """
    if k < 1 or block_size < 1:
        raise ValueError(f"k and block_size must be at least 1, got k={k}, block_size={block_size}")
    check_features(real_features, "real_features")
    check_features(generated_features, "generated_features", num_features=real_features.shape[1])
    for argument, features in (("real_features", real_features), ("generated_features", generated_features)):
        if features.shape[0] <= k:
            raise ValueError(f"{argument} must hold more than k={k} samples, got {features.shape[0]}")

    # Distances do not change when both sets are moved; near the origin the expansion of ‖a − b‖² into products that
    # cdist uses loses least.
    centre = real_features.double().mean(dim=0)
    real = real_features.double() - centre
    generated = generated_features.double() - centre
    real_radii = _neighbour_distances(real, k, block_size)
    generated_radii = _neighbour_distances(generated, k, block_size)
    return PrecisionRecall(
        precision=_share_inside(generated, real, real_radii, block_size),
        recall=_share_inside(real, generated, generated_radii, block_size),
    )


def _blocks(points: Tensor, block_size: int) -> Iterator[tuple[int, Tensor]]:
    """(index of the first row, rows) of consecutive blocks."""
    for start in range(0, points.shape[0], block_size):
        yield start, points[start : start + block_size]


def _neighbour_distances(points: Tensor, k: int, block_size: int) -> Tensor:
    """(N,) distance of each point to its k-th nearest neighbour among the others."""
    distances = []
    for row, queries in _blocks(points, block_size):
        nearest = queries.new_full((queries.shape[0], k), torch.inf)
        for column, candidates in _blocks(points, block_size):
            block = torch.cdist(queries, candidates)
            if row == column:
                # A point is no neighbour of itself. Left out by index: rounding makes its distance only almost 0,
                # and a duplicate of it is a neighbour.
                block.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, block], dim=1).topk(k, dim=1, largest=False).values
        distances.append(nearest[:, -1])
    return torch.cat(distances)


def _share_inside(queries: Tensor, centres: Tensor, radii: Tensor, block_size: int) -> float:
    """Share of the queries (M, D) that lie in at least one ball around centres (N, D) of the radii (N,)."""
    inside = 0
    for _, points in _blocks(queries, block_size):
        hit = points.new_zeros(points.shape[0], dtype=torch.bool)
        for start, balls in _blocks(centres, block_size):
            hit |= (torch.cdist(points, balls) <= radii[start : start + block_size]).any(dim=1)
        inside += int(hit.sum())
    return inside / queries.shape[0]
