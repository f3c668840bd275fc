"""What becomes of pending activations: written out, and their gradients, each in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.arguments import address
from ganvas.ops.backends.cpu import batch_norm_leaky_relu as batch_norm
from ganvas.ops.backends.cpu.arguments import dtype_of, empty, empty_per_channel, halves
from ganvas.ops.pending import Pending, with_statistics


def activate(pending: Pending) -> Tensor:
    """The activation itself, in one pass."""
    stored = pending.stored
    if pending.scale is None:
        return stored
    output = torch.empty_like(stored)
    channels = stored.shape[1]
    native.batch_norm_leaky_relu_forward(
        dtype_of(stored), stored.numel() // channels, channels, pending.scale.shape[0], pending.eps,
        pending.negative_slope, pending.activation_first, False, stored.data_ptr(), address(pending.weight),
        address(pending.bias), address(pending.mean), address(pending.var), 0, 0, 0.0, output.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return output


def activate_add(pending: Pending, residual: Tensor) -> Tensor:
    """lrelu(scale*stored + shift + residual), in one pass; ``residual`` like ``stored``, channels_last."""
    stored = pending.stored
    assert pending.scale is not None
    output = torch.empty_like(stored)
    channels = stored.shape[1]
    native.batch_norm_add_leaky_relu_forward(
        dtype_of(stored), stored.numel() // channels, channels, pending.scale.shape[0], pending.eps,
        pending.negative_slope, False, stored.data_ptr(), address(pending.weight), address(pending.bias),
        address(pending.mean), address(pending.var), 0, 0, 0.0, residual.data_ptr(), output.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return output


def batch_normalised(
    output: Tensor,  # (N, C, H, W), channels_last
    residual: Tensor | None,  # like output
    bn_weight: Tensor | None,  # (C,)
    bn_bias: Tensor | None,  # (C,)
    running_mean: Tensor | None,  # (C,) float32, updated in place
    running_var: Tensor | None,  # (C,) float32, updated in place
    momentum: float,
    eps: float,
    negative_slope: float,
    activation_first: bool,
    groups: int,
) -> tuple[Pending, Tensor]:
    """A convolution's raw ``output`` with batch statistics, pending, and its activation, with the residual if any.

    The activation is written on the way: the values are in the cache.
    """
    running = (running_mean, running_var, momentum)
    if residual is None:
        written, mean, var = batch_norm.train(
            output, bn_weight, bn_bias, eps, negative_slope, activation_first, groups, *running
        )
    else:
        written, mean, var = batch_norm.add_train(
            output, bn_weight, bn_bias, residual, eps, negative_slope, groups, *running
        )
    options = (eps, negative_slope, activation_first, True)
    return with_statistics(output, bn_weight, bn_bias, mean, var, *options), written


def activate_add_backward(
    grad: Tensor, output: Tensor | None, pending: Pending
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the result's gradient: those of ``stored``, γ, β and the residual. A slope of 1 needs no ``output``."""
    side = grad if output is None else output
    return batch_norm.add_backward(grad, side, *pending.norm, pending.negative_slope, pending.groups)


def activate_backward(grad: Tensor, pending: Pending) -> tuple[Tensor, Tensor, Tensor]:
    """From the activation's gradient: those of ``stored``, γ and β."""
    return batch_norm.backward(grad, *pending.norm, pending.negative_slope, pending.activation_first, pending.groups)


def settle(grad: Tensor, sums: Tensor, pending: Pending) -> tuple[Tensor, Tensor, Tensor]:
    """The same, from what a convolution's backward pass left: g over whose memory the result is written, and its sums.

    g = dL/d(scale*x + shift), and ``sums`` are Σg and Σg·(x − mean), (2, G, C); x is ``stored``, or its activation if
    that comes first.
    """
    stored, mean = pending.stored, pending.mean
    assert mean is not None
    if not pending.normalised and not pending.activation_first:
        return grad, sums[1].sum(0), sums[0].sum(0)
    channels = stored.shape[1]
    of_weight, of_bias = empty_per_channel(pending.weight, channels), empty_per_channel(pending.bias, channels)
    sum, sum_deviation = halves(sums)
    native.settle_pending_gradient(
        dtype_of(stored), stored.numel() // channels, channels, mean.shape[0], pending.eps, pending.negative_slope,
        pending.activation_first, pending.batch_statistics, grad.data_ptr(), stored.data_ptr(),
        address(pending.weight), mean.data_ptr(), address(pending.var), sum, sum_deviation,
        of_weight.data_ptr(), of_bias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return grad, of_weight, of_bias


def channel_sums(values: Tensor) -> Tensor:
    """Over the pixels of (N, C, H, W), channels_last: (C,) float32."""
    channels = values.shape[1]
    sums = empty(channels)
    native.channel_sums(
        dtype_of(values), values.numel() // channels, channels, values.data_ptr(), sums.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return sums


def stays_pending(*convolution: object) -> bool:
    """Whether a convolution's kernels read a raw gradient that is pending: these read a settled one."""
    return False
