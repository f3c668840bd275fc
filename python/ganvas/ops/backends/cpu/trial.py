"""What a choice by measurement compares: a convolution as a chain runs it, by its native kernels and by torch.

Each side does a layer's whole share of a step. Where the native kernels take statistics or a kink on their way, torch's
side has the pass over memory that does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ganvas.ops import checks
from ganvas.ops.backends.cpu import batch_norm_leaky_relu
from ganvas.ops.backends.cpu.arguments import empty, empty_pixels
from ganvas.ops.backends.cpu.pending import activate, activate_backward, settle
from ganvas.ops.convolution import Geometry, convolve, convolve_backward
from ganvas.ops.pending import Pending, fixed, with_statistics

if TYPE_CHECKING:
    from ganvas.ops.backends.cpu.convolution import NativeConvolution

Direction = Literal["forward", "forward_with_statistics", "backward"]
"""``forward``: with no norm or fixed statistics; ``backward``: both gradients."""

_EPS, _SLOPE = 1e-5, 0.2


def candidates(
    native: NativeConvolution,
    geometry: Geometry,
    weight_shape: torch.Size,
    input_shape: torch.Size,
    dtype: torch.dtype,
    direction: Direction,
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The native way and torch's, on random values. To be called without gradients and without autocast."""
    generator = torch.Generator("cpu").manual_seed(0)  # the default one belongs to the user

    def uniform(tensor: Tensor) -> Tensor:
        return tensor.uniform_(-1, 1, generator=generator)

    weight = uniform(torch.empty(weight_shape, dtype=dtype, device="cpu"))
    before = _normalised(uniform(empty_pixels(input_shape, dtype)))
    if direction == "backward":
        raw = uniform(empty_pixels(geometry.output_shape(input_shape, weight_shape), dtype))
        return lambda: _native_backward(native, raw, weight, before), lambda: _backward(raw, weight, before, geometry)
    activation = activate(before)  # torch's way has it written by the layer before
    if direction == "forward":
        return lambda: native.forward(before, weight, None), lambda: _forward(activation, weight, geometry)
    norm, running = (before.weight, before.bias), (None, None, 0.0)
    return (
        lambda: native.forward_with_statistics(before, weight, None, None, None, *running, _EPS, _SLOPE, False, 1),
        lambda: _forward_with_statistics(activation, weight, geometry, *norm),
    )


def _normalised(stored: Tensor) -> Pending:
    """With batch statistics pending as a layer before would leave them."""
    mean, var = (empty(1, stored.shape[1]).fill_(value) for value in (0.0, 1 / 3))
    return with_statistics(stored, None, None, mean, var, _EPS, _SLOPE, False, True)


def _forward(activation: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    output = checks.channels_last(convolve(activation, weight, None, geometry))
    return activate(fixed(output, None, None, None, None, _EPS, _SLOPE, False, 1))


def _forward_with_statistics(
    activation: Tensor, weight: Tensor, geometry: Geometry, bn_weight: Tensor | None, bn_bias: Tensor | None
) -> Pending:
    output = checks.channels_last(convolve(activation, weight, None, geometry))
    _, mean, var = batch_norm_leaky_relu.train(output, bn_weight, bn_bias, _EPS, _SLOPE, False, 1)
    return with_statistics(output, bn_weight, bn_bias, mean, var, _EPS, _SLOPE, False, True)


def _native_backward(native: NativeConvolution, raw: Tensor, weight: Tensor, before: Pending) -> object:
    of_weight = native.backward_weight(raw, weight, before)
    return of_weight, settle(*native.backward_input(raw, weight, before), before)


def _backward(raw: Tensor, weight: Tensor, before: Pending, geometry: Geometry) -> object:
    grad, of_weight = convolve_backward(raw, activate(before), weight, geometry, (True, True))
    assert grad is not None
    return of_weight, activate_backward(checks.channels_last(grad), before)
