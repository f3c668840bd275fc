"""A classifier made for a short training on a CPU: a plain chain of convolutions, most of them on small maps."""

from __future__ import annotations

from torch import nn

from ganvas.models import checks
from ganvas.models.blocks import conv_bn_leaky_relu
from ganvas.models.classifiers import Classifier, check_options
from ganvas.models.registry import register
from ganvas.nn import FusedSequential

STEM_WIDTH = 16
"""Fewest channels of the stem: of fewer, the next convolution's transforms outweigh the products that they save."""


@register("fast_cnn", kind="classifier")
def fast_cnn(num_classes: int = 10, channels: int = 3, size: int = 32, width: int = 64) -> Classifier:
    """Six 3×3 convolutions with BatchNorm and LeakyReLU, for the recipe fast; size ≥ 8.

    In the manner of airbench (Jordan 2024, arXiv:2404.00498): a stem of ``width`` / 2 channels, at least 16, on the
    whole image, then convolutions of ``width`` to 4 × ``width`` channels, two each on maps of a half and a quarter of
    the side and one on an eighth, ending in global max pooling.
    """
    check_options(num_classes, channels, size, minimum_size=8)
    checks.integer("width", width)
    stem = max(width // 2, STEM_WIDTH)
    body = FusedSequential(
        *conv_bn_leaky_relu(channels, stem),
        nn.MaxPool2d(2),
        *conv_bn_leaky_relu(stem, width),
        *conv_bn_leaky_relu(width, 2 * width),
        nn.MaxPool2d(2),
        *conv_bn_leaky_relu(2 * width, 2 * width),
        *conv_bn_leaky_relu(2 * width, 4 * width),
        nn.MaxPool2d(2),
        *conv_bn_leaky_relu(4 * width, 4 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
    )
    return Classifier(body, 4 * width, num_classes=num_classes, channels=channels, size=size)
