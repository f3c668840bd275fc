"""Sample diversity: the pairwise definition without pairs, 1 for real images, 0 for a collapsed generator."""

import math

import pytest
import torch
from sklearn.datasets import load_digits

from ganvas.metrics import image_spread, sample_diversity


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """(1797, 1, 8, 8) in [-1, 1]."""
    return torch.from_numpy(load_digits().images).float().div(8).sub(1).unsqueeze(1)


def test_spread_is_the_root_mean_square_pairwise_distance_per_value():
    images = torch.randn(9, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    squared = torch.pdist(images.flatten(1)).square() / (3 * 4 * 5)
    assert image_spread(images) == pytest.approx(math.sqrt(squared.mean()))


def test_samples_as_diverse_as_the_data_score_one(digits):
    shuffled = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))]
    assert sample_diversity(shuffled[:64], image_spread(digits)) == pytest.approx(1, abs=0.1)


def test_one_image_over_and_over_scores_zero(digits):
    assert sample_diversity(digits[:1].repeat(64, 1, 1, 1), image_spread(digits)) == pytest.approx(0, abs=1e-7)


def test_one_image_with_faint_noise_scores_near_zero(digits):
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert sample_diversity(digits[:1] + 0.02 * noise, image_spread(digits)) < 0.05


def test_two_alternating_images_score_half_of_their_squared_spread():
    images = torch.cat([-torch.ones(500, 1, 2, 2), torch.ones(500, 1, 2, 2)])
    assert image_spread(images) == pytest.approx(2 * math.sqrt(1 / 2), rel=1e-3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 1, 2, 2), "at least 2"),
        (torch.zeros(4, 1, 0, 2), "at least 2 non-empty"),
        (torch.zeros(4, 2, 2), r"\(N, C, H, W\)"),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), "floating point"),
        (torch.full((4, 1, 2, 2), torch.nan), "finite"),
        (torch.full((4, 1, 2, 2), torch.inf), "finite"),
    ],
)
def test_images_without_a_spread_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        image_spread(images)


@pytest.mark.parametrize("real_spread", [0.0, -1.0, math.nan, math.inf])
def test_real_spread_must_be_positive(real_spread):
    with pytest.raises(ValueError, match="real_spread"):
        sample_diversity(torch.randn(4, 1, 2, 2), real_spread)
