"""Improved precision and recall on clusters whose answer is known by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from ganvas.metrics import precision_recall


def cluster(centre: float, count: int, seed: int = 0) -> torch.Tensor:
    """Points around (centre, 0), all within 1 of it."""
    source = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, generator=source) - 0.5 + torch.tensor([centre, 0.0])


def by_definition(real: torch.Tensor, generated: torch.Tensor, k: int) -> tuple[float, float]:
    """Equations 1 and 2 of the paper with scikit-learn's neighbours, in float64 and without blocks."""

    def share_inside(points: torch.Tensor, centres: torch.Tensor) -> float:
        # Asked without an argument, kneighbors() leaves each point itself out.
        radii = NearestNeighbors(n_neighbors=k).fit(centres.double()).kneighbors()[0][:, -1]
        distances = (points.double()[:, None] - centres.double()[None]).norm(dim=2)
        return float((distances <= torch.from_numpy(radii)).any(dim=1).double().mean())

    return share_inside(generated, real), share_inside(real, generated)


def test_the_same_set_twice_has_full_precision_and_recall():
    points = cluster(0, 50)
    assert precision_recall(points, points.clone()) == (1.0, 1.0)


def test_clusters_far_apart_have_none():
    assert precision_recall(cluster(0, 50), cluster(100, 50)) == (0.0, 0.0)


def test_dropped_mode_costs_recall_only():
    real = torch.cat([cluster(0, 60), cluster(100, 40)])
    precision, recall = precision_recall(real, real[:60])
    assert precision == 1.0
    assert recall == 0.6


def test_invented_mode_costs_precision_only():
    real = cluster(0, 60)
    precision, recall = precision_recall(real, torch.cat([real, cluster(100, 20)]))
    assert precision == 0.75
    assert recall == 1.0


def test_collapse_to_one_real_point_keeps_precision_and_loses_recall():
    real = cluster(0, 40)
    assert precision_recall(real, real[:1].expand(40, 2)) == (1.0, 1 / 40)


def test_radius_is_the_distance_to_the_kth_neighbour_not_counting_the_point_itself():
    real = torch.tensor([[0.0], [1.0], [3.0], [6.0]])  # k = 1: radii 1, 1, 2, 3; the manifold is [-1, 9]
    generated = torch.tensor([[-1.0], [-1.1], [9.0], [9.1]])  # radii 0.1: no real point inside
    assert precision_recall(real, generated, k=1) == (0.5, 0.0)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 5), block_size=st.sampled_from([1, 4, 7, 1000]))
@settings(max_examples=40, deadline=None)
def test_any_block_size_gives_the_value_of_the_definition(seed, k, block_size):
    source = torch.Generator().manual_seed(seed)
    real = torch.randn(23, 3, generator=source)
    generated = torch.randn(17, 3, generator=source) + 0.5
    assert precision_recall(real, generated, k=k, block_size=block_size) == by_definition(real, generated, k)


def test_a_common_offset_of_the_features_does_not_matter():
    real, generated = cluster(0, 60, seed=1).double(), cluster(0.4, 60, seed=2).double()
    expected = by_definition(real, generated, 3)
    assert 0 < expected[0] < 1
    assert precision_recall(real + 1e7, generated + 1e7) == expected


def test_memory_stays_bounded_by_the_blocks(monkeypatch):
    largest = 0
    cdist = torch.cdist

    def recording(first, second):
        nonlocal largest
        distances = cdist(first, second)
        largest = max(largest, distances.numel())
        return distances

    monkeypatch.setattr(torch, "cdist", recording)
    precision_recall(cluster(0, 300), cluster(0, 200), block_size=16)
    assert 0 < largest <= 16 * 16


@pytest.mark.parametrize(
    ("real", "generated", "options", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(9, 2), {}, "real_features must hold more than k=3 samples, got 3"),
        (torch.zeros(9, 2), torch.zeros(3, 2), {}, "generated_features must hold more than k=3"),
        (torch.zeros(9, 2), torch.zeros(9, 3), {}, "generated_features must have 2 features"),
        (torch.zeros(0, 2), torch.zeros(9, 2), {}, "real_features must hold at least one"),
        (torch.zeros(9, 2), torch.full((9, 2), torch.nan), {}, "generated_features must be finite"),
        (torch.zeros(9, 2), torch.zeros(9, 2), {"k": 0}, "k and block_size must be at least 1"),
        (torch.zeros(9, 2), torch.zeros(9, 2), {"block_size": 0}, "k and block_size must be at least 1"),
    ],
)
def test_features_without_a_manifold_are_refused(real, generated, options, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(real, generated, **options)
