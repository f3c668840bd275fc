"""Convolutions between pending activations in Triton: forward, with or without statistics, and the input's gradient.

What is pending is made of what is stored as it is loaded, and the sums that a norm needs are taken of what is stored
as it is written (:mod:`.gather_convolution`). Every convolution and its input's gradient is a gather (:mod:`.gather`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ganvas.ops.backends.triton import configurations as tables
from ganvas.ops.backends.triton import tf32
from ganvas.ops.backends.triton.configurations import Configuration
from ganvas.ops.backends.triton.gather import Gather, backward_gather, forward_gather, pack_weight
from ganvas.ops.backends.triton.gather_convolution import (
    LARGEST_OFFSET,
    MOST_PHASES,
    Partials,
    StatisticsOf,
    gather_convolution,
    in_vectors,
)
from ganvas.ops.backends.triton.precision import uses_tf32
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending, PendingGradient

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_PIXELS = 2**31 - 1024  # 31 bits hold the numbers of a tile that goes past the last of them
_MOST_VALUES = 2**31 - 1


def takes(geometry: Geometry, weight: Tensor, input_shape: torch.Size, dtype: torch.dtype) -> str | None:
    """None where there are kernels for this convolution, otherwise the reason why not.

    Args:
        geometry: of the convolution.
        weight: (Cout, Cin, kH, kW), or (Cin, Cout, kH, kW) where it is transposed. Only its shape counts.
        input_shape: (N, Cin, H, W).
        dtype: of the input.
    """
    return _refusal(geometry, weight.shape, input_shape, dtype)


@lru_cache(maxsize=4096)
def _refusal(geometry: Geometry, weight: torch.Size, input: torch.Size, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"the Triton convolutions take float32, bfloat16 and float16; got {dtype}"
    if geometry.groups != 1:
        return f"the Triton convolutions take groups=1; got {geometry.groups}"
    if geometry.upsampled and geometry != Geometry(padding=geometry.padding, upsampled=True):
        return f"after upsampling, the Triton convolutions take a padding and nothing else; got {geometry}"
    if max(geometry.stride) > MOST_PHASES:
        return f"the Triton convolutions take strides up to {MOST_PHASES}; got {geometry.stride}"
    output = geometry.output_shape(input, weight)
    if min(*input, *output) < 1:
        return f"nothing to compute: input {tuple(input)}, output {tuple(output)}"
    reach = max((k - 1) * d + p for k, d, p in zip(weight[2:], geometry.dilation, geometry.padding))
    if reach > LARGEST_OFFSET:
        return f"the Triton convolutions reach {LARGEST_OFFSET} pixels far; this one needs {reach}"
    kernel = (weight[2], weight[3])
    gathers = (forward_gather(geometry, kernel), backward_gather(geometry, kernel))
    packed = max(gather.phases * gather.most_taps for gather in gathers) * input[1] * output[1]
    spans = [max(shape[2], reach) * (shape[3] + reach) * shape[1] for shape in (input, output)]
    if max(packed, *spans) > _MOST_VALUES:
        return f"the Triton convolutions take padded images and weights of up to {_MOST_VALUES} values; got more"
    pixels = max(shape[0] * shape[2] * shape[3] for shape in (input, output))
    if pixels > _MOST_PIXELS:
        return f"the Triton convolutions take up to {_MOST_PIXELS} pixels; got {pixels}"
    return None


def configurations(
    geometry: Geometry,
    weight: torch.Size,
    input: torch.Size,
    dtype: torch.dtype,
    direction: Literal["forward", "forward_with_statistics", "backward_input"],
) -> list[Configuration]:
    """Those worth measuring for tensors of these shapes, first the one that is taken without it: at most eight."""
    kernel = (weight[2], weight[3])
    if direction == "backward_input":
        output = geometry.output_shape(input, weight)
        return _configurations(backward_gather(geometry, kernel), output[1], input, dtype)
    return _configurations(forward_gather(geometry, kernel), input[1], geometry.output_shape(input, weight), dtype)


def forward(
    geometry: Geometry,
    input: Pending,
    weight: Tensor,
    bias: Tensor | None,
    *,
    configuration: Configuration | None = None,
) -> Tensor:
    """The raw output (N, Cout, H', W'), channels_last, of the input's dtype.

    Args:
        geometry: of a convolution that :func:`takes` takes.
        input: (N, Cin, H, W), channels_last; scale and shift (G, Cin) float32, or None where it is stored as it is.
        weight: (Cout, Cin, kH, kW), or (Cin, Cout, kH, kW) where the convolution is transposed, of any dtype and
            memory layout: it is rounded to the input's dtype. channels_last need not be copied for that.
        bias: (Cout,), of any dtype.
        configuration: of the kernel; None: the first of :func:`configurations`.

    Raises:
        TypeError: the input's dtype is not float32, bfloat16 or float16, or scale and shift are not float32.
        ValueError: a shape, memory layout or device does not fit, or there is no kernel for the convolution.
    """
    groups = input.groups
    _check_input(geometry, input, weight, groups)
    output = _empty(geometry.output_shape(input.stored.shape, weight.shape), input.stored)
    _forward(geometry, input, weight, bias, output, groups, None, configuration)
    return output


def forward_with_statistics(
    geometry: Geometry,
    input: Pending,
    weight: Tensor,
    bias: Tensor | None,
    activation_first: bool,
    negative_slope: float,
    groups: int,
    *,
    configuration: Configuration | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw output, and what batch statistics are made of, float32.

    Args:
        geometry, input, weight, bias, configuration: as :func:`forward` has them.
        activation_first: the statistics are those of lrelu(output).
        negative_slope: of that.
        groups: of statistics: equal consecutive parts of the batch, as many as the input's, if it is pending.

    Returns:
        output: (N, Cout, H', W'), channels_last.
        counts: (G, T): pixels of each of T tiles of a group; 0 where one is empty.
        means: (G, T, Cout): of a tile's values as they are stored.
        deviations: (G, T, Cout): Σ(value − mean)² of a tile, from its own mean.

    Raises:
        TypeError, ValueError: as :func:`forward`.
    """
    _check_input(geometry, input, weight, groups)
    output = _empty(geometry.output_shape(input.stored.shape, weight.shape), input.stored)
    after = StatisticsOf(activation_first, negative_slope)
    partials = _forward(geometry, input, weight, bias, output, groups, after, configuration)
    assert partials is not None
    assert partials.counts is not None
    return output, partials.counts, *partials.sums.unbind(0)  # type: ignore[return-value]


def backward_input(
    geometry: Geometry,
    grad_output: Tensor | PendingGradient,
    weight: Tensor,
    input: Pending,
    *,
    configuration: Configuration | None = None,
) -> tuple[Tensor, Tensor]:
    """g = dL/d(scale*x + shift) of the pending input, and Σg and Σg·(x − mean), (2, G, Cin) float32.

    x is ``stored``, or lrelu(stored) if the activation comes first. Of an input that is stored as it is g is the
    gradient, and the sums are zeros.

    Args:
        geometry, weight, input, configuration: as :func:`forward` has them.
        grad_output: (N, Cout, H', W') of the input's dtype, channels_last; as it is, or pending.

    Raises:
        TypeError, ValueError: as :func:`forward`.
    """
    gradient = grad_output if isinstance(grad_output, PendingGradient) else Pending(grad_output)
    groups = (input if isinstance(gradient, Pending) or input.scale is not None else gradient).groups
    _check_input(geometry, input, weight, groups)
    _check_gradient(geometry, gradient, weight, input, groups)
    stored = input.stored
    gather = backward_gather(geometry, (weight.shape[2], weight.shape[3]))
    out_channels = (gradient.grad if isinstance(gradient, PendingGradient) else gradient.stored).shape[1]
    if configuration is None:
        configuration = _configurations(gather, out_channels, stored.shape, stored.dtype)[0]
    packed = _packed(weight, gather, geometry, stored.dtype)
    after = None
    if input.scale is not None:
        after = input if input.mean is not None else input._replace(mean=torch.zeros_like(input.scale))
    grad_input = _empty(stored.shape, stored)
    partials = gather_convolution(gather, gradient, packed, None, grad_input, groups, after, configuration)
    if partials is None:
        return grad_input, torch.zeros((2, groups, stored.shape[1]), dtype=torch.float32, device=stored.device)
    return grad_input, partials.sums.sum(2)


def _forward(
    geometry: Geometry,
    input: Pending,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    groups: int,
    after: StatisticsOf | None,
    configuration: Configuration | None,
) -> Partials | None:
    stored = input.stored
    _check_bias(bias, output)
    gather = forward_gather(geometry, (weight.shape[2], weight.shape[3]))
    if configuration is None:
        configuration = _configurations(gather, stored.shape[1], output.shape, stored.dtype)[0]
    packed = _packed(weight, gather, geometry, stored.dtype)
    return gather_convolution(gather, input, packed, bias, output, groups, after, configuration)


def _configurations(gather: Gather, in_channels: int, output: torch.Size, dtype: torch.dtype) -> list[Configuration]:
    pixels = output[0] * output[2] * output[3]
    return tables.configurations(gather.most_taps, in_channels, output[1], pixels, dtype, uses_tf32())


def _packed(weight: Tensor, gather: Gather, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    packed = pack_weight(weight.detach(), gather, geometry.transposed, dtype)
    if dtype is torch.float32 and uses_tf32():
        packed = tf32.rounded(packed)
    return in_vectors(packed)


def _empty(shape: torch.Size, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _check_input(geometry: Geometry, input: Pending, weight: Tensor, groups: int) -> None:
    stored = input.stored
    if stored.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"input and weight must have 4 dimensions; got shapes {tuple(stored.shape)} and {tuple(weight.shape)}"
        )
    refusal = takes(geometry, weight, stored.shape, stored.dtype)
    if refusal is not None:
        raise TypeError(refusal) if stored.dtype not in DTYPES else ValueError(refusal)
    if stored.shape[1] != geometry.in_channels(weight.shape):
        raise ValueError(
            f"weight {tuple(weight.shape)} takes {geometry.in_channels(weight.shape)} channels; the input has "
            f"{stored.shape[1]}"
        )
    if weight.device != stored.device:
        raise ValueError(f"weight must be on the input's device, {stored.device}; got {weight.device}")
    _check_pixels("input.stored", stored, stored.shape, stored)
    if groups < 1 or stored.shape[0] % groups:
        raise ValueError(f"groups must divide the batch of {stored.shape[0]}; got {groups}")
    if input.scale is not None:
        for name in ("scale", "shift", "mean"):
            values = getattr(input, name)
            if values is not None or name != "mean":
                _check_per_channel(f"input.{name}", values, groups, stored)


def _check_gradient(
    geometry: Geometry, gradient: Pending | PendingGradient, weight: Tensor, input: Pending, groups: int
) -> None:
    shape = geometry.output_shape(input.stored.shape, weight.shape)
    if isinstance(gradient, Pending):
        return _check_pixels("grad_output", gradient.stored, shape, input.stored)
    for name in ("grad", "stored"):
        _check_pixels(f"grad_output.{name}", getattr(gradient, name), shape, input.stored)
    for name in ("alpha", "beta", "delta"):
        _check_per_channel(f"grad_output.{name}", getattr(gradient, name), groups, gradient.grad)


def _check_pixels(name: str, values: Tensor, shape: torch.Size, like: Tensor) -> None:
    if values.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(values.shape)}")
    if values.dtype != like.dtype:
        raise TypeError(f"{name} must be of the input's dtype, {like.dtype}; got {values.dtype}")
    if values.device != like.device:
        raise ValueError(f"{name} must be on the input's device, {like.device}; got {values.device}")
    if not values.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name} must be channels_last; got strides {values.stride()} of shape {tuple(shape)}")


def _check_per_channel(name: str, values: Tensor, groups: int, pixels: Tensor) -> None:
    if not isinstance(values, Tensor) or values.dtype is not torch.float32:
        raise TypeError(f"{name} must be a float32 tensor; got {getattr(values, 'dtype', type(values).__name__)}")
    if values.shape != (groups, pixels.shape[1]) or not values.is_contiguous() or values.device != pixels.device:
        raise ValueError(
            f"{name} must have shape {(groups, pixels.shape[1])}, contiguous, on {pixels.device}; got "
            f"{tuple(values.shape)} with strides {values.stride()} on {values.device}"
        )


def _check_bias(bias: Tensor | None, output: Tensor) -> None:
    if bias is None:
        return
    if bias.shape != output.shape[1:2] or bias.device != output.device or not bias.is_contiguous():
        raise ValueError(
            f"bias must have shape {tuple(output.shape[1:2])}, contiguous, on {output.device}; got "
            f"{tuple(bias.shape)} with strides {bias.stride()} on {bias.device}"
        )
