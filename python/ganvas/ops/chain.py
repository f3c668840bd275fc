"""Runs of convolution, BatchNorm and LeakyReLU as one operation: between the layers nothing is written but raw outputs.

The activation of a layer stays pending (:class:`ganvas.ops.pending.Pending`): the next convolution applies
the norm and the kink while it loads, and its backward pass leaves the sums that the norm's needs. Nearest-neighbour
upsampling before a convolution and 2×2 max-pooling after an activation are part of a layer. A convolution that no
native kernel takes runs in torch, on the activation written out for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ganvas.ops import chain_operators
from ganvas.ops.backends.arguments import to_dtype
from ganvas.ops.chain_passes import (
    Stage,
    differentiable_backward,
    forward_direction,
    restored,
    run_backward,
    run_forward,
)
from ganvas.ops.direct import holds, runs_as_operator, runs_directly
from ganvas.ops.kernels import kernels_of
from ganvas.ops.layers import Layer, by_layer
from ganvas.ops.selection import choose

__all__ = ["Layer", "can_chain", "conv_bn_leaky_relu_chain"]


def can_chain(
    input: Tensor, layers: Sequence[Layer], statistics_groups: int = 1, residual: Tensor | None = None
) -> bool:
    """Whether it pays to run the layers as a chain: native kernels take a convolution of them, or pooling.

    Also False where an argument does not fit: the layers one by one have the message for that.
    """
    if input.dim() != 4 or input.numel() == 0 or input.shape[0] % statistics_groups:
        return False
    if not (runs_directly(input) or runs_as_operator(input)):
        return False
    dtype = _computed_dtype(input)
    if choose("conv_bn_leaky_relu", input, layers[0].backend) == "reference" or dtype not in kernels_of(input).DTYPES:
        return False
    autocast = torch.is_autocast_enabled(input.device.type)
    convolutions = []
    shape, device = input.shape, input.device
    for layer in layers:
        weight = layer.weight
        if shape[1] != layer.geometry.in_channels(weight.shape):
            return False
        if weight.dtype is not dtype and not (autocast and weight.dtype is not torch.float64):
            return False
        convolutions.append((layer, shape))
        convolved = layer.convolved_shape(shape)
        if not holds(weight, weight.shape, device):
            return False
        for values in (layer.bias, layer.bn_weight, layer.bn_bias, layer.running_mean, layer.running_var):
            if values is not None and not holds(values, (convolved[1],), device):
                return False
        shape = layer.pooled_shape(convolved)
        if min(shape) < 1:
            return False
        # Not numel(), which makes a constant of a symbolic size.
        if layer.batch_statistics and convolved[0] * convolved[2] * convolved[3] == statistics_groups:
            return False
    if residual is not None:
        if not (holds(residual, shape, input.device) and residual.dtype is dtype):
            return False  # torch broadcasts and promotes
        if layers[-1].negative_slope < 0:
            return False  # the output's sign would not tell the side of the kink
    return any(layer.max_pool or _is_native(layer, shape, dtype) for layer, shape in convolutions)


def _is_native(layer: Layer, input_shape: torch.Size, dtype: torch.dtype) -> bool:
    """Whether a native kernel runs, forward or backward. In a graph it is the operator that measures, when it runs."""
    kernels, arguments = kernels_of(layer.weight), (layer.geometry, layer.weight, input_shape, dtype)
    if torch.compiler.is_compiling():
        return kernels.native_convolution(*arguments) is not None
    directions = [forward_direction(layer)]
    if torch.is_grad_enabled():
        directions += ["backward_weight", "backward_input"]
    return any(kernels.chosen_convolution(*arguments, way, layer.backend) is not None for way in directions)


def conv_bn_leaky_relu_chain(
    input: Tensor, layers: Sequence[Layer], statistics_groups: int = 1, residual: Tensor | None = None
) -> Tensor:
    """``layers`` one after the other; call it where :func:`can_chain` says so.

    Args:
        input: (N, C, H, W) float32 or bfloat16 on the CPU; copied to channels_last where it is not.
        statistics_groups: equal consecutive parts of the batch with batch statistics of their own.
        residual: like the output; added to the last layer's norm, before its activation. That layer has a norm, the
            activation after it, and no pooling.

    Returns:
        The last layer's activation, channels_last. Gradients of every order.
    """
    input = to_dtype(input, _computed_dtype(input))
    if torch.compiler.is_compiling():
        return chain_operators.call(input, residual, layers, statistics_groups)
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, residual, *tensors)):
        return _Chain.apply(input, residual, tuple(layers), statistics_groups, *tensors)
    return run_forward(input, residual, layers, tensors, statistics_groups)


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, residual, layers, groups, *tensors):  # type: ignore[override]
        stages: list[Stage] = []
        output = run_forward(input, residual, layers, tensors, groups, stages.append)
        # The output tells the side of the kink: the residual itself is needed for second derivatives only.
        result = output if residual is not None and layers[-1].negative_slope != 1.0 else None
        kept = [tensor for s in stages for tensor in (s.pending.stored, *s.statistics, s.written, s.winners)]
        if layers[-1].is_bare:  # the output itself, over which others may write: backward does without
            kept[-len(kept) // len(stages)] = None
        ctx.save_for_backward(input, residual, result, *tensors, *kept)
        ctx.layers, ctx.groups = layers, groups
        return output

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[override]
        input, residual, result, *saved = ctx.saved_tensors
        layers, count = ctx.layers, len(ctx.needs_input_grad) - 4
        tensors, kept = saved[:count], saved[count:]
        if torch.is_grad_enabled() or not runs_directly(grad_output):
            grads = differentiable_backward(grad_output, input, residual, layers, ctx.groups, tensors)
        else:
            size = len(kept) // len(layers)
            stages = [
                restored(layer, own, *kept[size * i : size * (i + 1)])
                for i, (layer, own) in enumerate(zip(layers, by_layer(tensors)))
            ]
            wants_input, _, _, _, *wanted = ctx.needs_input_grad
            grads = run_backward(
                grad_output, input, result, stages, layers, tensors, residual is not None, wants_input, wanted
            )
        return grads.input, grads.residual, None, None, *grads.tensors


def _computed_dtype(input: Tensor) -> torch.dtype:
    """Of the tensors between the layers: autocast's where that is on."""
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
