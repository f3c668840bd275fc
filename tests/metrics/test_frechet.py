"""Fréchet distance: the closed forms, torchmetrics' value, batches, reuse of the real side, and bad input."""

import re

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ganvas.metrics import FeatureStatistics, FrechetDistance, frechet_distance


def gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> FeatureStatistics:
    return FeatureStatistics(count=2, mean=mean.double(), scatter=covariance.double())


def random_features(count: int, width: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=source)
    return (torch.randn(count, width, generator=source) @ mixing + seed).to(dtype)


def pixels() -> FrechetDistance:
    return FrechetDistance(nn.Flatten(), name="pixels")


def test_identical_gaussians_are_at_distance_zero():
    statistics = FeatureStatistics.of(random_features(200, 16, seed=1))
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-10)


def test_equal_covariances_leave_the_squared_shift_of_the_mean():
    covariance = FeatureStatistics.of(random_features(50, 4, seed=0)).covariance
    first, second = gaussian(torch.zeros(4), covariance), gaussian(torch.tensor([3.0, 0, 0, 4.0]), covariance)
    assert frechet_distance(first, second) == pytest.approx(25)


def test_diagonal_covariances_give_the_squared_difference_of_standard_deviations():
    first = gaussian(torch.zeros(3), torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    second = gaussian(torch.zeros(3), torch.diag(torch.tensor([4.0, 4.0, 100.0])))
    assert frechet_distance(first, second) == pytest.approx((1 - 2) ** 2 + (3 - 10) ** 2)


def test_distance_is_symmetric_and_invariant_under_rotation():
    first, second = random_features(90, 6, seed=1).double(), random_features(70, 6, seed=2).double()
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    expected = frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
    assert frechet_distance(FeatureStatistics.of(second), FeatureStatistics.of(first)) == pytest.approx(expected)
    rotated = FeatureStatistics.of(first @ rotation), FeatureStatistics.of(second @ rotation)
    assert frechet_distance(*rotated) == pytest.approx(expected)


def test_singular_covariances_give_the_exact_finite_value():
    # 5 samples of 40 features, each set in a plane of its own, the planes orthogonal: nothing overlaps, so only the
    # shift and the two traces remain. The rotation turns the 38 zero eigenvalues into rounding errors.
    source = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=source)).Q
    first, second = torch.randn(2, 5, 2, dtype=torch.float64, generator=source)
    first = FeatureStatistics.of(nn.functional.pad(first, (0, 38)) @ rotation)
    second = FeatureStatistics.of(nn.functional.pad(second, (2, 36)) @ rotation)
    shift = (first.mean - second.mean).square().sum()
    expected = float(shift + first.covariance.trace() + second.covariance.trace())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_a_collapsed_side_without_any_variance_is_defined():
    collapsed = FeatureStatistics.of(torch.ones(10, 3))
    spread = gaussian(torch.ones(3), torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    assert frechet_distance(collapsed, spread) == pytest.approx(6)


@pytest.mark.parametrize("count", [12, 300], ids=["fewer samples than features", "more"])
def test_value_equals_torchmetrics(count):
    real, generated = random_features(count, 24, 1, torch.float64), random_features(count, 24, 2, torch.float64)
    extractor = nn.Flatten()
    extractor.num_features = 24
    theirs = FrechetInceptionDistance(feature=extractor, normalize=True)
    theirs.update(real.reshape(-1, 1, 4, 6), real=True)
    theirs.update(generated.reshape(-1, 1, 4, 6), real=False)
    ours = pixels()
    ours.update(real.reshape(-1, 1, 4, 6), real=True)
    ours.update(generated.reshape(-1, 1, 4, 6), real=False)
    assert ours.compute() == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_covariance_is_the_unbiased_one():
    features = random_features(30, 5, seed=3).double()
    torch.testing.assert_close(FeatureStatistics.of(features).covariance, torch.cov(features.T))


def test_merging_batches_far_from_the_origin_loses_nothing():
    # Mean 1e6 against spread 1: float32 sums, or E[xx] - E[x]E[x], would leave nothing of the covariance.
    features = torch.randn(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e6
    merged = FeatureStatistics.of(features[:1])
    for batch in features[1:].split(37):
        merged = merged.merged(FeatureStatistics.of(batch))
    assert merged.count == 1000
    torch.testing.assert_close(merged.mean, features.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.covariance, torch.cov(features.T), rtol=1e-9, atol=1e-9)


def test_metric_is_named_after_its_extractor_and_never_fid():
    name = FrechetDistance(nn.Linear(2, 2), name="digits-cnn").name
    assert re.fullmatch(r"FD\[digits-cnn@[0-9a-f]{6}\]", name)


def test_real_side_survives_reset_and_can_be_shared():
    real, first, second = torch.randn(3, 20, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    distance = pixels()
    distance.update(real, real=True)
    distance.update(first, real=False)
    distance.compute()
    distance.reset()
    distance.update(second, real=False)

    fresh = pixels()
    fresh.real = distance.real
    fresh.update(second, real=False)
    expected = frechet_distance(FeatureStatistics.of(real.flatten(1)), FeatureStatistics.of(second.flatten(1)))
    assert distance.compute() == fresh.compute() == expected


def test_compute_says_which_side_is_missing():
    distance = pixels()
    with pytest.raises(ValueError, match="no real images"):
        distance.compute()
    distance.update(torch.randn(4, 1, 2, 2), real=True)
    with pytest.raises(ValueError, match=r"no generated images: call update\(images, real=False\)"):
        distance.compute()


def test_one_image_has_no_covariance():
    distance = pixels()
    distance.update(torch.randn(4, 1, 2, 2), real=True)
    distance.update(torch.randn(1, 1, 2, 2), real=False)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        distance.compute()


def test_sides_of_different_width_are_refused_when_the_batch_arrives():
    distance = pixels()
    distance.update(torch.randn(4, 1, 2, 2), real=True)
    with pytest.raises(ValueError, match="same number of features, got 4 and 9"):
        distance.update(torch.randn(4, 1, 3, 3), real=False)
    assert distance.generated is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused_and_counted(value):
    features = torch.zeros(5, 2)
    features[[1, 3], 0] = value
    with pytest.raises(ValueError, match="2 of 5 samples hold NaN or infinite"):
        pixels().update_features(features, real=False)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (3, 1, 1)])
def test_features_that_are_empty_or_no_matrix_are_refused(shape):
    with pytest.raises(ValueError, match="features must"):
        FeatureStatistics.of(torch.zeros(shape))
