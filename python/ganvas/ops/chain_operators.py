"""A chain as one operator of torch's dispatcher, for graphs that torch.compile and torch.export make.

Its autograd formula is registered with it: a graph holds the operator and its backward pass as one call each, and an
exported program can be trained. Eager mode does without the dispatcher: see :mod:`ganvas.ops.chain`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ganvas.ops import checks, tuning
from ganvas.ops.backends.cpu.precision import rounds_float32
from ganvas.ops.batch_norm_leaky_relu import move_running_statistics
from ganvas.ops.chain_passes import Stage, differentiable_backward, restored_all, run_backward, run_forward
from ganvas.ops.kernels import kernels_of
from ganvas.ops.layers import (
    Adds,
    Gradients,
    Layer,
    decode,
    decode_adds,
    encode,
    hands_on_written,
    moments_of,
    output_has_kink,
)
from ganvas.ops.schemas import library, ops


def call(input: Tensor, residual: Tensor | None, layers: Sequence[Layer], statistics_groups: int, adds: Adds) -> Tensor:
    """The last layer's activation; running statistics move, in torch."""
    encoded = encode(layers, adds)
    tensors = (input, residual, *encoded.parameters)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    output, moments, _ = ops.conv_bn_leaky_relu_chain(input, residual, *encoded, statistics_groups, keep)
    shape = input.shape
    for layer, (mean, var, _, _) in zip(layers, moments_of(moments, layers, statistics_groups)):
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
) -> tuple[Tensor, Tensor, list[Tensor]]:
    found = _native_chain(input, parameters, integers, reals, statistics_groups)
    if found is not None:
        chain, fixed = found.chain, found.moving(statistics)
        if chain.reads(fixed):
            residual = None if residual is None else checks.channels_last(residual)
            tensors = found.tensors(parameters)
            output, stored, moments = chain.forward(checks.channels_last(input), residual, tensors, fixed, keep)
            return output, moments, [tensor for tensor in stored if tensor is not None]
    layers, adds = decode(parameters, statistics, integers, reals), decode_adds(integers)
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    kept: list[Tensor | None] = []
    of_layers: list[Tensor] = []

    def collect(stage: Stage) -> None:
        scale, shift, mean, var = stage.statistics
        of_layers.append(torch.stack((mean, var, scale, shift)).flatten())  # type: ignore[arg-type]
        if keep:  # an operator's results share no memory: what a last layer pools is the output, or its convolution's
            is_last = len(of_layers) == len(layers)
            raw = None if is_last and layers[-1].is_bare else stage.pending.stored
            kept.extend((raw, None if is_last else stage.written, stage.winners))

    output = run_forward(input, residual, layers, tensors, statistics_groups, collect, keep, adds)
    return output, torch.cat(of_layers), [tensor for tensor in kept if tensor is not None]


def _backward(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    parameters: list[Tensor],
    moments: Tensor,
    stored: list[Tensor],
    integers: list[int],
    reals: list[float],
    residual: bool,
    wants_input: bool,
    wanted: list[bool],
) -> list[Tensor]:
    layers, adds = decode(parameters, None, integers, reals), decode_adds(integers)
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    asked = iter(wanted)
    of_tensors = [tensor is not None and next(asked) for tensor in tensors]
    kept = list(_kept(layers, adds, stored))
    groups = moments.numel() // (4 * sum(layer.out_channels for layer in layers))
    native, found = _native_chain(input, parameters, integers, reals, groups), None
    if native is not None:
        found = native.chain.backward(
            checks.channels_last(grad_output), checks.channels_last(input), output, tensors, kept, moments, residual,
            False, wants_input, of_tensors, overwrite_kept=False,
        )  # fmt: skip
    if found is None:
        stages = restored_all(layers, tensors, kept, moments, groups)
        found = run_backward(
            grad_output, input, output, stages, layers, tensors, residual, wants_input, of_tensors, adds
        )
        of_input = None if found.input is None else checks.channels_last(found.input)
        of_parameters = [_laid_out_like(tensor, gradient) for tensor, gradient in zip(tensors, found.tensors)]
        found = Gradients(of_input, found.residual, of_parameters)
    if found.residual is not None and found.residual.data_ptr() == grad_output.data_ptr():
        found = found._replace(residual=found.residual.clone())  # an operator's results share no memory with arguments
    return [gradient for gradient in (found.input, found.residual, *found.tensors) if gradient is not None]


def _kept(layers: Sequence[Layer], adds: Adds, stored: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """Of each layer what was stored, what it handed on written, and the winners; None where nothing was."""
    left = iter(stored)
    for i, layer in enumerate(layers):
        is_last = layer is layers[-1]
        yield None if is_last and layer.is_bare else next(left)
        yield next(left) if not is_last and hands_on_written(layers, adds, i) else None
        yield next(left) if layer.max_pool else None


class _Native(NamedTuple):
    """A chain in one call, and where in an operator's lists it finds its tensors."""

    chain: Any  # ganvas.ops.backends.cpu.chain.NativeChain
    of_layers: list[int | None]  # in the parameters
    of_moving: list[int | None]  # in the statistics

    def tensors(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """As layers have them."""
        return [None if i is None else parameters[i] for i in self.of_layers]

    def moving(self, statistics: Sequence[Tensor]) -> list[Tensor | None]:
        """Likewise; those that are fixed."""
        return [None if i is None else statistics[i] for i in self.of_moving]


_MOST_CHAINS = 256
_chains: dict[tuple[Any, ...], _Native | None] = {}


def _native_chain(
    input: Tensor, parameters: Sequence[Tensor], integers: Sequence[int], reals: Sequence[float], groups: int
) -> _Native | None:
    """The chain in one call, if there is such a call. It is kept for the next one with the same layouts."""
    if input.device.type != "cpu":
        return None
    layouts = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in parameters]
    key = (
        input.shape, input.dtype, groups, *layouts, *integers, *reals, torch.get_num_threads(), rounds_float32(),
        tuning.generation,
    )  # fmt: skip
    try:
        return _chains[key]
    except KeyError:
        if len(_chains) >= _MOST_CHAINS:
            _chains.clear()
        shapes = [torch.empty_strided(*layout[:2], dtype=layout[2], device="meta") for layout in layouts]
        layers = decode(shapes, None, integers, reals)
        chain = kernels_of(input).native_chain(layers, input.shape, input.dtype, groups, decode_adds(integers))
        found = None if chain is None else _Native(chain, *_positions(layers))
        _chains[key] = found
        return found


def _positions(layers: Sequence[Layer]) -> tuple[list[int | None], list[int | None]]:
    """Of each layer's tensors in :attr:`ganvas.ops.layers.Encoded.parameters`, and its statistics in ``statistics``."""
    parameters, statistics = itertools.count(), itertools.count()
    of_layers = [None if tensor is None else next(parameters) for layer in layers for tensor in layer.tensors]
    of_moving: list[int | None] = []
    for layer in layers:
        fixed = layer.batch_statistics is False
        of_moving += (next(statistics), next(statistics), None) if fixed else (None, None, None)
    return of_layers, of_moving


def _laid_out_like(parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """``gradient`` in the parameter's memory layout; two gradients per channel may lie in one piece of memory."""
    if parameter is None or gradient is None:
        return None
    result = torch.empty_like(parameter)
    return gradient if gradient.dim() > 1 and gradient.stride() == result.stride() else result.copy_(gradient)


def _setup_context(ctx, inputs, output) -> None:
    input, residual, parameters, statistics, ctx.integers, ctx.reals, ctx.groups, ctx.keep = inputs
    activation, moments, stored = output
    layers, adds = decode(parameters, None, ctx.integers, ctx.reals), decode_adds(ctx.integers)
    result = activation if output_has_kink(layers, adds, residual is not None) else None
    ctx.save_for_backward(input, residual, result, moments, *parameters, *statistics, *stored)
    ctx.lengths = [len(parameters), len(statistics), len(stored)]
    ctx.mark_non_differentiable(moments, *stored)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_output, _moments, _stored):
    input, residual, result, moments, *saved = ctx.saved_tensors
    parts = []
    for length in ctx.lengths:
        parts.append(saved[:length])
        saved = saved[length:]
    parameters, statistics, stored = parts
    wants_input, wants_residual, wanted, *_ = ctx.needs_input_grad
    of_input = of_residual = None
    if torch.is_grad_enabled() or not ctx.keep:
        layers = decode(parameters, statistics, ctx.integers, ctx.reals)
        tensors = [tensor for layer in layers for tensor in layer.tensors]
        adds = decode_adds(ctx.integers)
        grads = differentiable_backward(grad_output, input, residual, layers, ctx.groups, tensors, adds)
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
