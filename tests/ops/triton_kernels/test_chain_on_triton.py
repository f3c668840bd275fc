"""Chains whose convolutions are Triton's, in the interpreter, between the processor's own kernels of the norm."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from chains import Chain, compare_with_torch, layer
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("ganvas._native")

from ganvas.ops import chain, chain_passes
from ganvas.ops.backends import cpu
from ganvas.ops.backends.gpu import convolution
from ganvas.ops.backends.gpu.convolution import TritonConvolution
from ganvas.ops.pending import Pending, with_statistics

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")


def finish_statistics(
    output: Tensor, counts: Tensor, means: Tensor, deviations: Tensor, bn_weight, bn_bias, running_mean, running_var,
    momentum: float, eps: float, negative_slope: float, activation_first: bool,
) -> Pending:  # fmt: skip
    """What :func:`ganvas.ops.backends.cuda.pending.finish_statistics` does, in float64."""
    counts, means, deviations = (tensor.double() for tensor in (counts.unsqueeze(2), means, deviations))
    count = counts.sum(1)
    used = torch.where(counts > 0, means, torch.zeros_like(means))
    mean = (counts * used).sum(1) / count
    var = (deviations + counts * (used - mean.unsqueeze(1)).square()).sum(1) / count
    if running_mean is not None:
        for of_group, of_group_var in zip(mean, var * count / (count - 1)):
            running_mean.lerp_(of_group.float(), momentum)
            running_var.lerp_(of_group_var.float(), momentum)
    return with_statistics(
        output, bn_weight, bn_bias, mean.float(), var.float(), eps, negative_slope, activation_first, True
    )


@pytest.fixture
def used(monkeypatch) -> list[str]:
    """The chain's kernels are a GPU's; the directions in which a Triton kernel ran."""
    used: list[str] = []

    def chosen(geometry, weight, shape, dtype, direction, backend=None) -> TritonConvolution | None:
        native = convolution.native_convolution(geometry, weight, shape, dtype)
        used.extend([direction] if native is not None else [])
        return native

    kernels = SimpleNamespace(**{name: getattr(cpu, name) for name in cpu.__all__})
    kernels.chosen_convolution = chosen
    for module in (chain, chain_passes):
        monkeypatch.setattr(module, "kernels_of", lambda tensor: kernels)
    monkeypatch.setattr(convolution, "finish_statistics", finish_statistics)
    return used


CHAINS = {
    "batch statistics, both orders": lambda: [
        layer(5, 12),
        layer(12, 7, activation_first=True),
        layer(7, 6, bias=True),
    ],
    "DCGAN's": lambda: [
        layer(6, 9, "4x4 stride 2 transposed"),
        layer(9, 5, "4x4 stride 2", bias=True),
        layer(5, 4, "1x1", None, slope=0.0),
    ],
    "upsampled, pooled": lambda: [layer(5, 8, "upsampled", max_pool=True), layer(8, 6, "5x5", max_pool=True)],
    "fixed statistics": lambda: [layer(3, 8, norm=False), layer(8, 8, "stride 2", False, activation_first=True)],
    "torch's convolution between": lambda: [layer(5, 8), layer(8, 8, "grouped"), layer(8, 5, "dilated")],
    "no norm": lambda: [layer(5, 8, norm=None, bias=True), layer(8, 5, norm=None, slope=0.0), layer(5, 6)],
}


@pytest.mark.parametrize("groups", [2, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", CHAINS)
def test_a_step_is_as_accurate_as_torchs(used, accuracy, name, groups):
    torch.manual_seed(3)
    layers = CHAINS[name]()
    channels = layers[0].geometry.in_channels(layers[0].weight.shape)
    compare_with_torch(accuracy, Chain(torch.randn(2 * groups, channels, 7, 6), tuple(layers), groups))
    assert {"backward_input", "backward_weight"} < set(used)


def test_a_residual_block(used, accuracy):
    torch.manual_seed(4)
    layers = (layer(6, 8), replace(layer(8, 6), negative_slope=0.0))
    compare_with_torch(accuracy, Chain(torch.randn(4, 6, 5, 7), layers, 2, torch.randn(4, 6, 5, 7)))


def test_in_bfloat16(used, accuracy):
    torch.manual_seed(5)
    layers = (layer(16, 24, dtype=torch.bfloat16), layer(24, 16, "4x4 stride 2", dtype=torch.bfloat16))
    compare_with_torch(accuracy, Chain(torch.randn(4, 16, 8, 7).bfloat16(), layers))
