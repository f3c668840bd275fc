"""Convolution, BatchNorm and LeakyReLU as one operation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ganvas.ops import checks
from ganvas.ops.batch_norm_leaky_relu import ORDERS, batch_norm_leaky_relu
from ganvas.ops.chain import Layer, can_chain, conv_bn_leaky_relu_chain
from ganvas.ops.convolution import Geometry, symmetric_padding
from ganvas.ops.selection import choose, could_choose_kernel


def conv_bn_leaky_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
    order: str = "conv_bn_act",
    statistics_groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """lrelu(BN(conv2d(input))) (``conv_bn_act``) or BN(lrelu(conv2d(input))) (``conv_act_bn``).

    A convolution without groups is native where that is the faster way, and takes the statistics while it writes. On
    the CPU 3×3 ones of stride 1 and 2 and 4×4 ones of stride 2 go by Winograd's algorithm, others are matrix products.

    Args:
        input: (N, Cin, H, W). Converted to channels_last where a native kernel runs.
        weight: (Cout, Cin/groups, kH, kW), same dtype and device as ``input``.
        bias: (Cout,) or None.
        bn_weight, bn_bias, running_mean, running_var, training, momentum, eps, negative_slope, statistics_groups: see
            :func:`ganvas.ops.batch_norm_leaky_relu`.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`.
        backend: forces one of :func:`ganvas.ops.available_backends`.

    Returns:
        (N, Cout, H', W'), the dtype of ``input``; gradients of every order.

    Raises:
        TypeError, ValueError: naming the argument, what was got and what is accepted.
    """
    _check_convolution(input, weight, bias, stride, padding, dilation, groups)
    complete = (running_mean is None) == (running_var is None) and (training or running_mean is not None)
    strides, dilations = _pair(stride), _pair(dilation)
    given = padding if isinstance(padding, str) else _pair(padding)
    zeros = symmetric_padding(given, weight.shape[2:], strides, dilations)
    if backend in (None, "cpu", "triton") and zeros is not None and complete and eps >= 0 and order in ORDERS:
        geometry = Geometry(strides, zeros, dilations, groups=groups)
        layer = Layer(
            geometry, weight, bias, training, bn_weight, bn_bias, running_mean, running_var, momentum, eps,
            negative_slope, order == "conv_act_bn", backend=backend,
        )  # fmt: skip
        if statistics_groups >= 1 and can_chain(input, [layer], statistics_groups):
            return conv_bn_leaky_relu_chain(input, [layer], statistics_groups)
    if backend == "triton":
        choose("conv_bn_leaky_relu", input, backend)
        raise ValueError(
            "backend='triton' cannot run this convolution: it takes float32, bfloat16 and float16 weights like the "
            f"input, groups=1 and equal padding on both sides; got weight {tuple(weight.shape)} of {weight.dtype}, "
            f"groups={groups}, padding={padding!r}"
        )
    if could_choose_kernel("batch_norm_leaky_relu", input, backend):
        input = checks.channels_last(input)
    convolved = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return batch_norm_leaky_relu(
        convolved, bn_weight, bn_bias, running_mean, running_var, training=training, momentum=momentum, eps=eps,
        negative_slope=negative_slope, order=order, statistics_groups=statistics_groups, backend=backend,
    )  # fmt: skip


def _check_convolution(
    input: object,
    weight: object,
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    groups: int,
) -> None:
    x, w = checks.tensor("input", input), checks.tensor("weight", weight)
    if x.dim() != 4:
        raise ValueError(f"input must have shape (N, Cin, H, W); got {tuple(x.shape)}")
    if w.dim() != 4:
        raise ValueError(f"weight must have shape (Cout, Cin/groups, kH, kW); got {tuple(w.shape)}")
    if groups < 1 or w.shape[0] % groups:
        raise ValueError(f"groups must be positive and divide Cout={w.shape[0]}; got {groups}")
    if x.shape[1] != w.shape[1] * groups:
        raise ValueError(
            f"input has {x.shape[1]} channels, but weight of shape {tuple(w.shape)} with groups={groups} "
            f"takes {w.shape[1] * groups}"
        )
    if w.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"weight must be of the input's dtype {x.dtype}; got {w.dtype}")
    if w.device != x.device:
        raise ValueError(f"weight must be on the input's device {x.device}; got {w.device}")
    checks.per_channel("bias", bias, w.shape[0], x.device)
    _check_pair("stride", stride, 1)
    _check_pair("dilation", dilation, 1)
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(f"padding must be integers >= 0, 'valid' or 'same'; got {padding!r}")
    else:
        _check_pair("padding", padding, 0)


def _check_pair(name: str, value: object, least: int) -> None:
    pair = (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[arg-type]
    if len(pair) != 2 or any(v < least for v in pair):
        raise ValueError(f"{name} must be an integer >= {least} or two of them; got {value!r}")


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
