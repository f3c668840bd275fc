"""What becomes of pending activations on a GPU: statistics finished, written out, and their gradients."""

from __future__ import annotations

from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.arguments import address, float32
from ganvas.ops.backends.cuda.arguments import dtype_of, empty, enqueue, workspace
from ganvas.ops.backends.cuda.batch_norm_leaky_relu import add_backward, backward, forward
from ganvas.ops.pending import Pending


def finish_statistics(
    output: Tensor,  # (N, C, H, W), channels_last
    counts: Tensor,  # (G, T) float32: values in each of T tiles of a group; 0 for a tile with nothing in it
    means: Tensor,  # (G, T, C) float32
    deviations: Tensor,  # (G, T, C) float32: sums of squared deviations from the tile's own mean
    bn_weight: Tensor | None,  # (C,)
    bn_bias: Tensor | None,  # (C,)
    running_mean: Tensor | None,  # (C,) float32, updated in place
    running_var: Tensor | None,  # (C,) float32, updated in place
    momentum: float,
    eps: float,
    negative_slope: float,
    activation_first: bool,
) -> Pending:
    """A convolution's raw ``output`` as a pending activation, from the statistics its kernel left of each tile.

    They are those of the stored values, or of their activation if that comes first, and are joined in the same order
    each time.
    """
    groups, tiles, channels = means.shape
    weight, bias = float32(bn_weight), float32(bn_bias)
    scale, shift, mean, var = empty(output, 4, groups, channels)
    size = native.finish_statistics_workspace_cuda(groups, tiles, channels)
    scratch = workspace(output, size)
    enqueue(
        native.finish_statistics_cuda, output, groups, tiles, channels, counts.data_ptr(), means.data_ptr(),
        deviations.data_ptr(), address(weight), address(bias), eps, address(running_mean), address(running_var),
        momentum, mean.data_ptr(), var.data_ptr(), scale.data_ptr(), shift.data_ptr(), address(scratch), size,
    )  # fmt: skip
    return Pending(output, scale, shift, mean, var, weight, bias, eps, negative_slope, activation_first, True)


def activate(pending: Pending) -> Tensor:
    """The activation itself, in one pass."""
    if pending.scale is None:
        return pending.stored
    return _activate(pending, None)


def activate_add(pending: Pending, residual: Tensor) -> Tensor:
    """lrelu(scale*stored + shift + residual), in one pass; ``residual`` like ``stored``, channels_last."""
    return _activate(pending, residual)


def _activate(pending: Pending, residual: Tensor | None) -> Tensor:
    assert pending.mean is not None
    assert pending.var is not None
    return forward(
        pending.stored, pending.weight, pending.bias, residual, pending.eps, pending.negative_slope,
        pending.activation_first, False, pending.mean, pending.var,
    )  # fmt: skip


def activate_add_backward(
    grad: Tensor, output: Tensor | None, pending: Pending
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the result's gradient: those of ``stored``, γ, β and the residual. A slope of 1 needs no ``output``."""
    side = grad if output is None else output
    return add_backward(grad, side, *pending.norm, pending.negative_slope, pending.groups)


def activate_backward(grad: Tensor, pending: Pending) -> tuple[Tensor, Tensor, Tensor]:
    """From the activation's gradient: those of ``stored``, γ and β."""
    return backward(grad, *pending.norm, pending.negative_slope, pending.activation_first, pending.groups)


def settle(grad: Tensor, sums: Tensor, pending: Pending) -> tuple[Tensor, Tensor, Tensor]:
    """The same, from what a convolution's backward pass left: g over whose memory the result is written, and its sums.

    g = dL/d(scale*x + shift), and ``sums`` are Σg and Σg·(x − mean), (2, G, C) float32, contiguous; x is ``stored``, or
    its activation if that comes first.
    """
    stored, mean = pending.stored, pending.mean
    assert mean is not None
    if not pending.normalised and not pending.activation_first:
        return grad, sums[1].sum(0), sums[0].sum(0)
    channels = stored.shape[1]
    of_weight, of_bias = empty(stored, 2, channels)
    enqueue(
        native.settle_pending_gradient_cuda, stored, dtype_of(stored), stored.numel() // channels, channels,
        mean.shape[0], pending.eps, pending.negative_slope, pending.activation_first, pending.batch_statistics,
        grad.data_ptr(), stored.data_ptr(), address(pending.weight), mean.data_ptr(), address(pending.var),
        sums.data_ptr(), of_weight.data_ptr(), of_bias.data_ptr(),
    )  # fmt: skip
    return grad, of_weight, of_bias
