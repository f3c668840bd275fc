"""How different the images of a batch are from one another: the cheap number that shows a collapsed generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def image_spread(images: Tensor) -> float:
    """Root mean square distance between two images of the batch, per value.

        spread = √( mean over i≠j of ‖xᵢ − xⱼ‖² / (C·H·W) ) = √( 2 · mean over the C·H·W values of their variance )

    with the unbiased variance over the batch. The right-hand form needs no pairs: O(N·C·H·W) time. It is 0 if and only
    if all images are equal.

    Args:
        images: (N, C, H, W) floating point, N ≥ 2. In units of the values: within [0, 2] or a little above for
            images in [-1, 1].

    Raises:
        ValueError: wrong rank or dtype, fewer than two images, NaN or infinite values.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be a floating point tensor of shape (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    if images.shape[0] < 2 or images[0].numel() == 0:
        raise ValueError(f"images must hold at least 2 non-empty images, got shape {tuple(images.shape)}")
    variance = torch.var(images.detach().double(), dim=0).mean()
    if not variance.isfinite():
        raise ValueError("images must be finite, but some values are NaN or infinite")
    return math.sqrt(2 * float(variance))


def sample_diversity(generated: Tensor, real_spread: float) -> float:
    """Spread of generated images relative to the spread of real ones.

    About 1 for a generator as diverse as its data, 0 for one that draws a single image. Being a ratio, it needs no
    floor per data set. On scikit-learn's digits, 64 real images give 1.00 ± 0.01 and images of one class alone 0.6 to
    0.9, so a floor of 0.1 to 0.3 means: nearly one image.

    It detects collapse and measures no quality. Noise is diverse; so are m equally frequent images, at √(1 − 1/m) of
    their own distance; use the recall of :func:`precision_recall` to see lost modes. It is also small for a generator
    that has hardly been trained (a new one draws nearly uniform grey), so a detector should compare only after
    the value has once been above the floor.

    Args:
        generated: (N, C, H, W) floating point, N ≥ 2.
        real_spread: :func:`image_spread` of real images of the same shape, more than 0; computed once for a run.

    Raises:
        ValueError: as :func:`image_spread`; ``real_spread`` is no positive finite number.
    """
    if not (math.isfinite(real_spread) and real_spread > 0):
        raise ValueError(f"real_spread must be a positive finite number, got {real_spread}")
    return image_spread(generated) / real_spread
