"""Activations that were never written: a convolution's raw output and the per-channel map that makes them of it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ganvas.ops.backends.arguments import address, float32

try:
    from ganvas import _native as native
except ImportError:  # then no activation stays pending on a CPU
    native = None  # type: ignore[assignment]


class Pending(NamedTuple):
    """lrelu(scale*stored + shift), or scale*lrelu(stored) + shift where the activation comes first.

    scale = γ/√(var + eps), shift = β - mean*scale, (G, C) float32 for G statistics groups. Without them it is
    ``stored``.
    """

    stored: Tensor  # (N, C, H, W), channels_last
    scale: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None  # γ: (C,) float32; None: 1
    bias: Tensor | None = None  # β
    eps: float = 0.0
    negative_slope: float = 1.0
    activation_first: bool = False
    batch_statistics: bool = False
    normalised: bool = True
    """False: there is no norm, scale and shift are 1 and 0."""

    @property
    def norm(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, bool, float]:
        """What a norm's backward pass takes of it: stored, γ, β, mean, var, whether those are the batch's, eps."""
        assert self.mean is not None
        assert self.var is not None
        return self.stored, self.weight, self.bias, self.mean, self.var, self.batch_statistics, self.eps

    @property
    def groups(self) -> int:
        """G; 1 without scale and shift."""
        return 1 if self.scale is None else self.scale.shape[0]


class PendingGradient(NamedTuple):
    """dL/d stored = (alpha*grad + beta*x + delta)·kink of a pending activation, where x is ``stored`` and the kink 1.

    If the activation comes first, x is lrelu(stored) and the kink 1 or negative_slope by the sign of ``stored``.
    """

    grad: Tensor  # dL/d(scale*x + shift), (N, C, H, W), channels_last
    stored: Tensor  # like grad
    alpha: Tensor  # (G, C) float32
    beta: Tensor
    delta: Tensor
    negative_slope: float = 1.0
    activation_first: bool = False

    @property
    def groups(self) -> int:
        """G."""
        return self.alpha.shape[0]


def statistics(groups: int, like: Tensor) -> tuple[Tensor, ...]:
    """Uninitialised (mean, var, scale, shift): four rows of (G, C) float32, one allocation; C is that of ``like``."""
    return torch.empty((4, groups, like.shape[1]), dtype=torch.float32, device=like.device).unbind()


def fixed(
    stored: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,  # (C,) None: no norm
    var: Tensor | None,
    eps: float,
    negative_slope: float,
    activation_first: bool,
    groups: int,
) -> Pending:
    """A pending activation whose statistics are given, or which has none."""
    if mean is None or var is None:
        zeros, ones = _constants(groups, stored.shape[1], stored.device)
        return Pending(
            stored, ones, zeros, zeros, ones, negative_slope=negative_slope, activation_first=activation_first,
            normalised=False,
        )  # fmt: skip
    return with_statistics(
        stored, weight, bias, _of_groups(mean, groups), _of_groups(var, groups), eps, negative_slope, activation_first,
        False,
    )  # fmt: skip


def _of_groups(values: Tensor, groups: int) -> Tensor:
    """(C,) as (G, C) float32."""
    values = float32(values)
    return values[None] if groups == 1 else values.expand(groups, -1).contiguous()


def _constants(groups: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Zeros and ones, (G, C) float32. On a GPU they are made anew: memory of a graph is the graph's."""
    make = _kept_constants if device.type == "cpu" else _kept_constants.__wrapped__
    return make(groups, channels, device)


@lru_cache
def _kept_constants(groups: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # or autograd could not save them
        zeros, ones = (
            torch.full((groups, channels), value, dtype=torch.float32, device=device) for value in (0.0, 1.0)
        )
    return zeros, ones


def with_statistics(
    stored: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,  # (G, C) float32
    var: Tensor,
    eps: float,
    negative_slope: float,
    activation_first: bool,
    batch_statistics: bool,
) -> Pending:
    """Scale and shift from statistics that another kernel took."""
    weight, bias = float32(weight), float32(bias)
    scale, shift = _coefficients(weight, bias, mean, var, eps)
    return Pending(
        stored, scale, shift, mean, var, weight, bias, eps, negative_slope, activation_first, batch_statistics
    )


def _coefficients(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift, (G, C) float32."""
    if mean.is_cpu:
        scale, shift = torch.empty_like(mean), torch.empty_like(mean)
        native.batch_norm_coefficients(
            mean.shape[1], mean.shape[0], eps, address(weight), address(bias), mean.data_ptr(), var.data_ptr(),
            scale.data_ptr(), shift.data_ptr(),
        )  # fmt: skip
        return scale, shift
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale *= weight
    return scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
