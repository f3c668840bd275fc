"""The network of the recipe fast: its architecture, and that the native kernels take all of it but the stem."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ganvas import models


def widths(model):
    return [(layer.in_channels, layer.out_channels) for layer in model.modules() if isinstance(layer, nn.Conv2d)]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (64, [(3, 32), (32, 64), (64, 128), (128, 128), (128, 256), (256, 256)]),
        (16, [(3, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]),
        (8, [(3, 16), (16, 8), (8, 16), (16, 16), (16, 32), (32, 32)]),
    ],
)
def test_widths_double_twice_and_the_stem_has_at_least_16_channels(width, expected):
    assert widths(models.create("fast_cnn", width=width)) == expected


def test_every_convolution_is_3x3_and_followed_by_batch_norm_and_leaky_relu():
    layers = list(models.create("fast_cnn").body)
    starts = [index for index, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    assert len(starts) == 6
    for start in starts:
        assert layers[start].kernel_size == (3, 3)
        assert [type(layer) for layer in layers[start + 1 : start + 3]] == [nn.BatchNorm2d, nn.LeakyReLU]


def test_only_the_stem_is_a_convolution_of_torch():
    model = models.create("fast_cnn", width=16)
    with torch.profiler.profile(record_shapes=True) as profile:
        model(torch.rand(8, 3, 32, 32))
    inputs = [event.input_shapes[0] for event in profile.events() if event.name == "aten::convolution"]
    assert inputs == [[8, 3, 32, 32]]


@pytest.mark.parametrize("width", [0, True, 2.0])
def test_width_that_is_no_positive_integer_is_refused(width):
    with pytest.raises(ValueError, match="width must be an integer of at least 1"):
        models.create("fast_cnn", width=width)


def test_images_of_less_than_eight_pixels_are_refused():
    with pytest.raises(ValueError, match="size must be an integer of at least 8, got 7"):
        models.create("fast_cnn", size=7)
