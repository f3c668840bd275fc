"""The named blocks: torch's keys, defaults and arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ganvas.nn import ConvBNLeakyReLU, ConvTransposeBNLeakyReLU, FusedSequential, LinearBNLeakyReLU

BLOCKS = [
    (lambda **options: ConvBNLeakyReLU(3, 8, 3, padding=1, **options), "conv", (2, 3, 6, 6), (2, 8, 6, 6)),
    (
        lambda **options: ConvTransposeBNLeakyReLU(3, 8, 4, stride=2, padding=1, **options),
        "conv",
        (2, 3, 6, 6),
        (2, 8, 12, 12),
    ),
    (lambda **options: LinearBNLeakyReLU(3, 8, **options), "linear", (2, 3), (2, 8)),
]


@pytest.mark.parametrize(("build", "first", "shape", "expected"), BLOCKS)
def test_children_carry_torchs_keys(build, first, shape, expected):
    block = build()
    assert isinstance(block, FusedSequential)
    assert [name for name, _ in block.named_children()] == [first, "bn", "act"]
    assert {"bn.weight", "bn.bias", "bn.running_mean", f"{first}.weight"} <= set(block.state_dict())
    assert block(torch.randn(shape)).shape == expected


@pytest.mark.parametrize(("build", "first", "shape", "expected"), BLOCKS)
def test_the_activation_stands_before_the_norm_on_request(build, first, shape, expected):
    block = build(order="conv_act_bn", negative_slope=0.2)
    assert [name for name, _ in block.named_children()] == [first, "act", "bn"]
    x = torch.randn(shape)
    assert torch.allclose(block(x), nn.Sequential(*block)(x), atol=1e-5)


@pytest.mark.parametrize(("build", "first", "shape", "expected"), BLOCKS)
def test_without_a_norm(build, first, shape, expected):
    block = build(norm=None)
    assert [name for name, _ in block.named_children()] == [first, "act"]
    assert block(torch.randn(shape)).shape == expected


@pytest.mark.parametrize(("build", "first", "shape", "expected"), BLOCKS)
@pytest.mark.parametrize(
    ("options", "has_bias"),
    [
        ({}, False),
        ({"order": "conv_act_bn"}, True),
        ({"norm": None}, True),
        ({"bias": True}, True),
        ({"bias": False, "norm": None}, False),
    ],
)
def test_a_bias_is_made_where_the_norm_would_not_cancel_it(build, first, shape, expected, options, has_bias):
    assert (getattr(build(**options), first).bias is not None) is has_bias


@pytest.mark.parametrize(("build", "first", "shape", "expected"), BLOCKS)
def test_norm_and_factory_arguments_reach_the_children(build, first, shape, expected):
    block = build(eps=1e-3, momentum=0.2, affine=False, track_running_stats=False, dtype=torch.float64)
    assert (block.bn.eps, block.bn.momentum, block.bn.affine, block.bn.track_running_stats) == (1e-3, 0.2, False, False)
    assert getattr(block, first).weight.dtype == torch.float64


def test_convolution_arguments_reach_the_convolution():
    conv = ConvBNLeakyReLU(4, 8, (3, 5), stride=2, padding=(1, 2), dilation=2, groups=4).conv
    assert (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups) == (
        (3, 5),
        (2, 2),
        (1, 2),
        (2, 2),
        4,
    )
    transposed = ConvTransposeBNLeakyReLU(4, 8, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=1).conv
    assert (transposed.stride, transposed.padding, transposed.output_padding, transposed.groups) == (
        (2, 2),
        (1, 1),
        (1, 1),
        2,
    )


@pytest.mark.parametrize(("build", "first", "shape", "expected"), BLOCKS)
def test_unknown_choices_are_refused_by_name(build, first, shape, expected):
    with pytest.raises(ValueError, match=r"order must be one of conv_bn_act, conv_act_bn; got 'act_conv_bn'"):
        build(order="act_conv_bn")
    with pytest.raises(ValueError, match="norm must be 'batch' or None; got 'layer'"):
        build(norm="layer")
