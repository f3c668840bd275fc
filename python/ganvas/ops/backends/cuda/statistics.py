"""CUDA batch statistics of an output whose norm and activation stay pending."""

from __future__ import annotations

from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.arguments import address, float32
from ganvas.ops.backends.cuda.arguments import dtype_of, empty, enqueue, workspace
from ganvas.ops.pending import Pending


def batch_normalised(
    output: Tensor,  # (N, C, H, W), channels_last
    residual: Tensor | None,  # added where the activation is written
    bn_weight: Tensor | None,  # (C,)
    bn_bias: Tensor | None,  # (C,)
    running_mean: Tensor | None,  # (C,) float32, updated in place
    running_var: Tensor | None,  # (C,) float32, updated in place
    momentum: float,
    eps: float,
    negative_slope: float,
    activation_first: bool,
    groups: int,
) -> tuple[Pending, None]:
    """A convolution's raw ``output`` with batch statistics, pending, and no activation: whoever reads one writes it.

    The output is read once, in two launches. The statistics are those of the stored values, or of their activation if
    that comes first.
    """
    channels = output.shape[1]
    weight, bias = float32(bn_weight), float32(bn_bias)
    scale, shift, mean, var = empty(output, 4, groups, channels)
    shape = dtype_of(output), output.numel() // channels, channels, groups
    size = native.batch_statistics_workspace_cuda(*shape, output.device.index)
    scratch = workspace(output, size)
    enqueue(
        native.batch_statistics_cuda, output, *shape, eps, negative_slope, activation_first, output.data_ptr(),
        address(weight), address(bias), address(running_mean), address(running_var), momentum, mean.data_ptr(),
        var.data_ptr(), scale.data_ptr(), shift.data_ptr(), address(scratch), size,
    )  # fmt: skip
    pending = Pending(output, scale, shift, mean, var, weight, bias, eps, negative_slope, activation_first, True)
    return pending, None
