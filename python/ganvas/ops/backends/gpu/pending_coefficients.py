"""What a pending gradient is made of, from the sums that a convolution's backward pass has left: one small kernel.

With batch statistics over n values, scale = γ/√(var + eps) and x = ``stored``, or its activation if that comes first,

    dL/dx = scale*(g − Σg/n − (x − mean)*Σg(x − mean)/(n*(var + eps))) = alpha*g + beta*x + delta,
    alpha = scale, beta = −scale*Σg(x − mean)/(n*(var + eps)), delta = −scale*Σg/n − beta*mean
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ganvas.ops.pending import Pending, PendingGradient

_BLOCK = 128


def pending_gradient(grad: Tensor, sums: Tensor, pending: Pending) -> tuple[PendingGradient, Tensor, Tensor]:
    """The gradient of ``stored``, pending, and those of γ and β, (C,) float32.

    Args:
        grad: g = dL/d(scale*x + shift), (N, C, H, W), channels_last.
        sums: Σg and Σg·(x − mean), (2, G, C) float32, contiguous.
        pending: with batch statistics.

    Raises:
        ValueError: the statistics are not the batch's.
    """
    scale, mean, var = pending.scale, pending.mean, pending.var
    if not pending.batch_statistics or scale is None or mean is None or var is None:
        raise ValueError("pending must have batch statistics; got fixed ones, or none")
    groups, channels = scale.shape
    beta, delta = torch.empty((2, groups, channels), dtype=torch.float32, device=grad.device)
    of_weight, of_bias = torch.empty((2, channels), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        _kernel[(triton.cdiv(channels, _BLOCK),)](
            sums, scale, mean, var, beta, delta, of_weight, of_bias, groups, channels,
            float(grad.numel() // (groups * channels)), pending.eps, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    raw = PendingGradient(grad, pending.stored, scale, beta, delta, pending.negative_slope, pending.activation_first)
    return raw, of_weight, of_bias


@triton.jit(do_not_specialize=["groups", "channels"])
def _kernel(
    sums_ptr,  # (2, G, C)
    scale_ptr,  # (G, C)
    mean_ptr,  # (G, C)
    var_ptr,  # (G, C)
    beta_ptr,  # (G, C)
    delta_ptr,  # (G, C)
    of_weight_ptr,  # (C,)
    of_bias_ptr,  # (C,)
    groups,  # G
    channels,  # C
    count,  # of a group's values of a channel
    eps,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_channel = c < channels
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    for group in range(groups):
        at = group * channels + c
        first = tl.load(sums_ptr + at, is_channel, 0.0)
        second = tl.load(sums_ptr + groups * channels + at, is_channel, 0.0)
        scale = tl.load(scale_ptr + at, is_channel, 0.0)
        inverse = 1.0 / tl.sqrt_rn(tl.load(var_ptr + at, is_channel, 1.0) + eps)
        beta = -scale * (second / count * inverse * inverse)
        delta = -scale * (first / count) - beta * tl.load(mean_ptr + at, is_channel, 0.0)
        tl.store(beta_ptr + at, beta, is_channel)
        tl.store(delta_ptr + at, delta, is_channel)
        of_weight += second * inverse
        of_bias += first
    tl.store(of_weight_ptr + c, of_weight, is_channel)
    tl.store(of_bias_ptr + c, of_bias, is_channel)
