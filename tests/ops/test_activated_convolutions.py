"""Without a backward pass, and with fixed statistics, the native convolutions write activations, not raw outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from chains import layer
from instruction_sets import passes, with_lesser_instruction_sets
from torch import Tensor

pytest.importorskip("ganvas._native")

from ganvas.ops.backends import cpu
from ganvas.ops.backends.cpu.convolution import native_convolution
from ganvas.ops.chain import can_chain, conv_bn_leaky_relu_chain
from ganvas.ops.pending import Pending

CONVOLUTIONS = ("3x3", "3x3 unpadded", "stride 2", "1x1", "4x4 stride 2", "4x4 stride 2 transposed", "upsampled")
ORDERS = ("conv_bn_act", "conv_act_bn", "conv_bn_add_act")


def pixels(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_an_activation_is_what_its_raw_output_stands_for(name, order, dtype):
    torch.manual_seed(0)
    of = layer(35, 50, name, False, bias=True)
    input = pixels(4, 35, 10, 14, dtype=dtype)
    make = native_convolution(of.geometry, of.weight, input.shape, dtype)
    convolution = make(of.weight.shape, input.shape, dtype)
    before = Pending(input, *torch.randn(2, 2, 35), negative_slope=0.2)
    scale, shift = torch.randn(2, 2, 50)
    pending = Pending(convolution.output(), scale, shift, negative_slope=0.1, activation_first=order == "conv_act_bn")
    residual = pixels(*convolution.output_shape, dtype=dtype) if order == "conv_bn_add_act" else None
    activated = convolution.activated(before, of.weight, of.bias, pending, residual)

    values = convolution.forward(before, of.weight, of.bias).double()
    scale, shift = (each.double().repeat_interleave(2, 0)[:, :, None, None] for each in (scale, shift))
    if order == "conv_act_bn":
        values = scale * F.leaky_relu(values, 0.1) + shift
    else:
        values = F.leaky_relu(scale * values + shift + (0 if residual is None else residual), 0.1)
    assert activated.data_ptr() == pending.stored.data_ptr()
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(activated.double(), values, rtol=2 * rounding, atol=30 * rounding)


@pytest.fixture
def activations_written(monkeypatch):
    """How often a pass of its own writes an activation."""
    calls = []
    for name in ("activate", "activate_add"):
        original = getattr(cpu, name)

        def counted(pending: Pending, *rest: Tensor, original=original) -> Tensor:
            calls.append(pending.scale is not None)
            return original(pending, *rest)

        monkeypatch.setattr(cpu, name, counted)
    return calls


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chain_without_gradients_is_that_with_them(dtype, groups, activations_written):
    torch.manual_seed(0)
    layers = [
        layer(20, 32, "3x3", False, dtype=dtype),
        layer(32, 48, "1x1", None, bias=True, dtype=dtype),  # no norm
        layer(48, 32, "3x3", False, activation_first=True, max_pool=True, dtype=dtype),
        layer(32, 32, "5x5", False, dtype=dtype),  # torch's
        layer(32, 40, "upsampled", False, bias=True, dtype=dtype),
    ]
    input = pixels(4, 20, 13, 12, dtype=dtype)
    residual = pixels(4, 40, 12, 12, dtype=dtype)
    with torch.no_grad():
        assert can_chain(input, layers, groups, residual)
        free = conv_bn_leaky_relu_chain(input, layers, groups, residual)
    assert not any(activations_written)
    layers[0] = replace(layers[0], weight=layers[0].weight.requires_grad_())
    kept = conv_bn_leaky_relu_chain(input, layers, groups, residual)
    tolerance = 1e-5 if dtype is torch.float32 else 0.03
    torch.testing.assert_close(free, kept.detach(), rtol=tolerance, atol=tolerance * float(kept.detach().abs().max()))


def test_a_bare_convolution_stays_what_it_is():
    torch.manual_seed(0)
    layers = [layer(16, 32, "3x3", False), layer(32, 16, "3x3", None, bias=True, slope=1.0)]
    input = pixels(2, 16, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        output = conv_bn_leaky_relu_chain(input, layers)
        first = conv_bn_leaky_relu_chain(input, layers[:1])
        expected = F.conv2d(first, layers[1].weight, layers[1].bias, padding=1)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@with_lesser_instruction_sets
def test_lesser_instruction_sets(isa):
    passes(__file__, isa)
