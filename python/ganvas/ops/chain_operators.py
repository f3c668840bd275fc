"""A chain as one operator of torch's dispatcher, for graphs that torch.compile and torch.export make.

Its autograd formula is registered with it: a graph holds the operator and its backward pass as one call each, and an
exported program can be trained. Eager mode does without the dispatcher: see :mod:`ganvas.ops.chain`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ganvas.ops import checks
from ganvas.ops.batch_norm_leaky_relu import move_running_statistics
from ganvas.ops.chain_passes import Stage, differentiable_backward, restored, run_backward, run_forward
from ganvas.ops.layers import Layer, decode, encode
from ganvas.ops.schemas import library, ops


def call(input: Tensor, residual: Tensor | None, layers: Sequence[Layer], statistics_groups: int) -> Tensor:
    """The last layer's activation; running statistics move, in torch."""
    encoded = encode(layers)
    tensors = (input, residual, *encoded.parameters)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    output, moments, _ = ops.conv_bn_leaky_relu_chain(input, residual, *encoded, statistics_groups, keep)
    shape = input.shape
    for layer, (_, _, mean, var) in zip(layers, moments):
        batch, _, height, width = layer.convolved_shape(shape)
        running_mean, running_var = layer.running_mean, layer.running_var
        if layer.batch_statistics and layer.momentum and running_mean is not None and running_var is not None:
            count = batch * height * width // statistics_groups
            move_running_statistics(running_mean, running_var, mean, var, layer.momentum, count)
        if layer.batch_statistics and layer.batches is not None:
            layer.batches.add_(statistics_groups)
        shape = layer.output_shape(shape)
    return output


def _forward(
    input: Tensor,
    residual: Tensor | None,
    parameters: list[Tensor],
    statistics: list[Tensor],
    integers: list[int],
    reals: list[float],
    statistics_groups: int,
    keep: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    layers = decode(parameters, statistics, integers, reals)
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    moments: list[Tensor] = []
    stored: list[Tensor | None] = []

    def collect(stage: Stage) -> None:
        moments.append(torch.stack(stage.statistics))  # type: ignore[arg-type]
        if keep:  # an operator's results share no memory: what a last layer pools is the output
            stored.extend((stage.pending.stored, stage.written if len(moments) < len(layers) else None, stage.winners))

    output = run_forward(input, residual, layers, tensors, statistics_groups, collect, keep)
    if keep and layers[-1].is_bare:
        output = output.clone()
    return output, moments, [tensor for tensor in stored if tensor is not None]


def _backward(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    parameters: list[Tensor],
    moments: list[Tensor],
    stored: list[Tensor],
    integers: list[int],
    reals: list[float],
    residual: bool,
    wants_input: bool,
    wanted: list[bool],
) -> list[Tensor]:
    layers = decode(parameters, None, integers, reals)
    left, stages = iter(stored), []
    for layer, of_layer in zip(layers, moments):
        raw = next(left)
        pooled = next(left) if layer.max_pool and layer is not layers[-1] else None
        winners = next(left) if layer.max_pool else None
        scale, shift, mean, var = of_layer
        stages.append(restored(layer, layer.tensors, raw, scale, shift, mean, var, pooled, winners))
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    asked = iter(wanted)
    found = run_backward(
        grad_output, input, output, stages, layers, tensors, residual, wants_input,
        [tensor is not None and next(asked) for tensor in tensors],
    )  # fmt: skip
    of_parameters = (_laid_out_like(tensor, grad) for tensor, grad in zip(tensors, found.tensors) if grad is not None)
    of_input = None if found.input is None else checks.channels_last(found.input)
    return [gradient for gradient in (of_input, found.residual, *of_parameters) if gradient is not None]


def _laid_out_like(parameter: Tensor | None, gradient: Tensor) -> Tensor:
    """``gradient`` in the parameter's memory layout; two gradients per channel may lie in one piece of memory."""
    assert parameter is not None
    result = torch.empty_like(parameter)
    return gradient if gradient.dim() > 1 and gradient.stride() == result.stride() else result.copy_(gradient)


def _setup_context(ctx, inputs, output) -> None:
    input, residual, parameters, statistics, ctx.integers, ctx.reals, ctx.groups, _ = inputs
    activation, moments, stored = output
    result = activation if residual is not None and ctx.reals[-1] != 1.0 else None
    ctx.save_for_backward(input, residual, result, *parameters, *statistics, *moments, *stored)
    ctx.lengths = [len(parameters), len(statistics), len(moments), len(stored)]
    ctx.mark_non_differentiable(*moments, *stored)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_output, _moments, _stored):
    input, residual, result, *saved = ctx.saved_tensors
    parts = []
    for length in ctx.lengths:
        parts.append(saved[:length])
        saved = saved[length:]
    parameters, statistics, moments, stored = parts
    wants_input, wants_residual, wanted, *_ = ctx.needs_input_grad
    of_input = of_residual = None
    if torch.is_grad_enabled() or not stored:
        layers = decode(parameters, statistics, ctx.integers, ctx.reals)
        tensors = [tensor for layer in layers for tensor in layer.tensors]
        grads = differentiable_backward(grad_output, input, residual, layers, ctx.groups, tensors)
        of_input, of_residual = grads.input, grads.residual
        of_parameters = [grad for grad, tensor in zip(grads.tensors, tensors) if tensor is not None]
    else:
        found = iter(
            ops.conv_bn_leaky_relu_chain_backward(
                grad_output, input, result, parameters, moments, stored, ctx.integers, ctx.reals, residual is not None,
                wants_input, list(wanted),
            )
        )  # fmt: skip
        of_input = next(found) if wants_input else None
        of_residual = next(found) if residual is not None else None
        of_parameters = [next(found) if want else None for want in wanted]
    return (
        of_input, of_residual if wants_residual else None, of_parameters, [None] * len(statistics), None, None, None,
        None,
    )  # fmt: skip


for _device in ("CPU", "CUDA"):
    library.impl("conv_bn_leaky_relu_chain", _forward, _device)
    library.impl("conv_bn_leaky_relu_chain_backward", _backward, _device)
torch.library.register_autograd(
    "ganvas::conv_bn_leaky_relu_chain", _gradients, setup_context=_setup_context, lib=library
)
