"""What every op asks of its arguments, checked before any work."""

from __future__ import annotations

import torch
from torch import Tensor

from ganvas.ops.backends.arguments import pixel_strides

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: object) -> Tensor:
    """``value`` as a floating-point tensor, or a TypeError that names the argument."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if value.dtype not in _FLOATS:
        raise TypeError(
            f"{name} must be of a floating-point dtype (float32, bfloat16, float16, float64); got {value.dtype}"
        )
    return value


def per_channel(name: str, value: object, channels: int, device: torch.device) -> None:
    """A (C,) tensor on ``device``, or None."""
    if value is None:
        return
    got = tensor(name, value)
    if got.shape != (channels,):
        raise ValueError(f"{name} must have shape ({channels},), one value per channel; got {tuple(got.shape)}")
    if got.device != device:
        raise ValueError(f"{name} must be on the input's device {device}; got {got.device}")


def normalisation(
    input: object,
    weight: object,
    bias: object,
    running_mean: object,
    running_var: object,
    *,
    training: bool,
    eps: float,
    order: str,
    groups: int,
) -> None:
    """The arguments of :func:`ganvas.ops.batch_norm_leaky_relu`."""
    x = tensor("input", input)
    if not 2 <= x.dim() <= 4:
        raise ValueError(f"input must have shape (N, C), (N, C, L) or (N, C, H, W); got {tuple(x.shape)}")
    channels, device = x.shape[1], x.device
    for name, value in (
        ("bn_weight", weight), ("bn_bias", bias), ("running_mean", running_mean), ("running_var", running_var),
    ):  # fmt: skip
        per_channel(name, value, channels, device)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together: give both or neither")
    if order not in ("conv_bn_act", "conv_act_bn"):
        raise ValueError(f"order must be 'conv_bn_act' or 'conv_act_bn'; got {order!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0; got {eps}")
    if groups < 1:
        raise ValueError(f"statistics_groups must be at least 1; got {groups}")
    if not training:
        if running_mean is None:
            raise ValueError("running_mean and running_var are required when training=False; got None")
        return
    if x.shape[0] % groups:
        raise ValueError(f"statistics_groups must divide the batch of {x.shape[0]}; got {groups}")
    if channels and x.numel() == channels * groups:
        raise ValueError(
            f"training needs more than 1 value per channel (and statistics group); got input of shape {tuple(x.shape)}"
        )


def residual(value: object, input: Tensor, order: str) -> None:
    """A tensor like ``input`` (shape, dtype and device), or None; the order is then ``conv_bn_act``."""
    if value is None:
        return
    got = tensor("residual", value)
    if order != "conv_bn_act":
        raise ValueError(f"residual is added between norm and activation, in order='conv_bn_act'; got order={order!r}")
    if got.shape != input.shape:
        raise ValueError(f"residual must have the input's shape {tuple(input.shape)}; got {tuple(got.shape)}")
    if got.dtype != input.dtype:
        raise TypeError(f"residual must be of the input's dtype {input.dtype}; got {got.dtype}")
    if got.device != input.device:
        raise ValueError(f"residual must be on the input's device {input.device}; got {got.device}")


def native_layout(x: Tensor) -> Tensor:
    """``x`` with its channels innermost: (N, C) contiguous, (N, C, H, W) channels_last. Copies only where it must."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) in channels_last, told by its strides, so that a convolution answers in channels_last too.

    One channel, or one pixel, fits both layouts: torch then keeps whatever strides it finds, which say contiguous.
    """
    strides = pixel_strides(x.shape)
    if x.stride() == strides:
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)
