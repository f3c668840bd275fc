"""Blocks of (convolution | linear), BatchNorm and LeakyReLU, with torch's argument names and keys."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from ganvas.nn.fused import FusedSequential

ORDERS = ("conv_bn_act", "conv_act_bn")


class ConvBNLeakyReLU(FusedSequential):
    """Conv2d, BatchNorm2d, LeakyReLU: (N, in_channels, H, W) -> (N, out_channels, H', W').

    An ``nn.Sequential`` with the children ``conv``, ``bn`` and ``act`` (keys ``conv.weight``, ``bn.weight``, ...),
    executed as :class:`ganvas.nn.FusedSequential` does.

    Args:
        kernel_size, stride, padding, dilation, groups: as in ``torch.nn.Conv2d``.
        bias: of the convolution. Default: ``False`` where BatchNorm follows the convolution directly, since subtracting
            the mean cancels a bias; ``True`` otherwise.
        negative_slope: of the LeakyReLU; 0 is ReLU, 1 the identity.
        order: ``conv_bn_act``, or ``conv_act_bn`` (activation before the norm).
        norm: ``"batch"``, or ``None`` for a block without one (no child ``bn``).
        eps, momentum, affine, track_running_stats: as in ``torch.nn.BatchNorm2d``.
        device, dtype: of the parameters.

    Raises:
        ValueError: ``order`` or ``norm`` is none of the accepted ones.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool | None = None,
        negative_slope: float = 0.01,
        order: str = "conv_bn_act",
        norm: str | None = "batch",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        bias = _default_bias(bias, order, norm)
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        bn = norm and nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(_ordered("conv", conv, bn, negative_slope, order))


class ConvTransposeBNLeakyReLU(FusedSequential):
    """ConvTranspose2d, BatchNorm2d, LeakyReLU: (N, in_channels, H, W) -> (N, out_channels, H', W').

    Arguments, children and errors as in :class:`ConvBNLeakyReLU`, with ``output_padding`` as in
    ``torch.nn.ConvTranspose2d``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool | None = None,
        negative_slope: float = 0.01,
        order: str = "conv_bn_act",
        norm: str | None = "batch",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        bias = _default_bias(bias, order, norm)
        conv = nn.ConvTranspose2d(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            device=device, dtype=dtype,
        )  # fmt: skip
        bn = norm and nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(_ordered("conv", conv, bn, negative_slope, order))


class LinearBNLeakyReLU(FusedSequential):
    """Linear, BatchNorm1d, LeakyReLU: (N, in_features) -> (N, out_features).

    Arguments and errors as in :class:`ConvBNLeakyReLU`; the children are ``linear``, ``bn`` and ``act``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool | None = None,
        negative_slope: float = 0.01,
        order: str = "conv_bn_act",
        norm: str | None = "batch",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        linear = nn.Linear(in_features, out_features, _default_bias(bias, order, norm), device=device, dtype=dtype)
        bn = norm and nn.BatchNorm1d(out_features, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(_ordered("linear", linear, bn, negative_slope, order))


def _default_bias(bias: bool | None, order: str, norm: str | None) -> bool:
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
    if norm not in ("batch", None):
        raise ValueError(f"norm must be 'batch' or None; got {norm!r}")
    if bias is not None:
        return bias
    return norm is None or order == "conv_act_bn"


def _ordered(name: str, producer: nn.Module, bn: Any, negative_slope: float, order: str) -> OrderedDict[str, nn.Module]:
    act = nn.LeakyReLU(negative_slope)
    if bn is None:
        return OrderedDict([(name, producer), ("act", act)])
    if order == "conv_bn_act":
        return OrderedDict([(name, producer), ("bn", bn), ("act", act)])
    return OrderedDict([(name, producer), ("act", act), ("bn", bn)])
