"""The two passes over a chain's layers, forward and backward, between pending activations.

What backward needs of a layer is a :class:`Stage`: the raw output of its convolution and a few numbers per channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ganvas.ops import checks
from ganvas.ops.backends import reference
from ganvas.ops.backends.arguments import float32, to_dtype
from ganvas.ops.backends.trial import Direction
from ganvas.ops.batch_norm_leaky_relu import move_running_statistics, reference_gradients
from ganvas.ops.convolution import convolve, convolve_backward
from ganvas.ops.direct import is_float32
from ganvas.ops.kernels import kernels_of
from ganvas.ops.layers import (
    GIVEN,
    Adds,
    Gradients,
    Layer,
    Tensors,
    by_layer,
    hands_on_written,
    moments_of,
    residual_layer,
)
from ganvas.ops.pending import Pending, PendingGradient, fixed


class Stage(NamedTuple):
    """What a layer leaves for backward."""

    pending: Pending
    written: Tensor | None = None
    """The activation, where it does not stay pending: pooled (N, C, H // 2, W // 2), added further on, or no backward
    pass follows."""
    winners: Tensor | None = None  # of the pooling, which of each four, uint8

    @property
    def output(self) -> Pending:
        """What the next layer reads."""
        return self.pending if self.written is None else Pending(self.written)

    @property
    def statistics(self) -> tuple[Tensor | None, ...]:
        """scale, shift, mean and var, (G, C) float32."""
        return self.pending[1:5]  # type: ignore[return-value]


def restored(
    layer: Layer,
    own: Tensors,
    stored: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    var: Tensor,
    written: Tensor | None,
    winners: Tensor | None,
) -> Stage:
    """A layer's stage, from the tensors of it that were saved, in whatever memory layout they come back."""
    stored, written, winners = map(_in_channels_last, (stored, written, winners))  # type: ignore[assignment]
    normalised = layer.batch_statistics is not None
    pending = Pending(
        stored, scale, shift, mean, var, float32(own.bn_weight), float32(own.bn_bias),
        layer.eps if normalised else 0.0, layer.negative_slope, layer.activation_first, bool(layer.batch_statistics),
        normalised,
    )  # fmt: skip
    return Stage(pending, written, winners)


def restored_all(
    layers: Sequence[Layer],
    tensors: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    moments: Tensor,
    groups: int,
) -> list[Stage]:
    """The stages, of what a chain in one call leaves.

    Args:
        kept: of each layer what was stored, what it handed on written, and the winners.
        moments: see :func:`ganvas.ops.layers.moments_of`.
    """
    return [
        restored(layer, own, kept[3 * i], scale, shift, mean, var, *kept[3 * i + 1 : 3 * i + 3])  # type: ignore[arg-type]
        for i, (layer, own, (mean, var, scale, shift)) in enumerate(
            zip(layers, by_layer(tensors), moments_of(moments, layers, groups))
        )
    ]


def _in_channels_last(saved: Tensor | None) -> Tensor | None:
    return None if saved is None else checks.channels_last(saved)


def run_forward(
    input: Tensor,
    residual: Tensor | None,
    layers: Sequence[Layer],
    tensors: Sequence[Tensor | None],
    groups: int,
    keep: Callable[[Stage], object] | None = None,
    backward: bool = True,
    adds: Adds | None = None,
) -> Tensor:
    """The last layer's activation (raw output, where nothing follows).

    Args:
        keep: is called with each layer's stage.
        backward: the stages are kept for it; without, what a layer stores may be its activation.
    """
    adds = adds or (None,) * len(layers)
    stage, written = Stage(Pending(checks.channels_last(input))), None
    inputs: dict[int, Tensor] = {}  # of layers, until they are added
    moved: list[Tensor] = []  # by kernels, of which torch is to know
    kept = keep is not None and backward
    for i, (layer, own) in enumerate(zip(layers, by_layer(tensors))):
        if i in adds:
            inputs[i] = stage.output.stored
        position = adds[i]
        if position is None or position == GIVEN:
            added = residual if i == residual_layer(adds) else None
        else:
            added = inputs.pop(position)
        running = _moved_in_kernel(layer)
        moved.extend(running)
        stage, written = _forward(layer, own, running, stage.output, written, groups, added, kept)
        if layer is not layers[-1] and not layer.max_pool and hands_on_written(layers, adds, i):
            written = kernels_of(input).activate(stage.output) if written is None else written
            stage = stage._replace(written=written)
        if keep is not None:
            keep(stage)
    torch.autograd.graph.increment_version(moved)
    for layer in layers:
        if layer.batch_statistics and layer.batches is not None:
            layer.batches.add_(groups)
    if written is not None:
        return written
    return stage.pending.stored if layers[-1].is_bare else kernels_of(input).activate(stage.output)


def _moved_in_kernel(layer: Layer) -> tuple[Tensor, ...]:
    """The running statistics, mean and variance, that are to be moved where a kernel can."""
    mean, var = layer.running_mean, layer.running_var
    if not layer.batch_statistics or not layer.momentum or mean is None or var is None:
        return ()
    return (mean, var) if is_float32(mean) and is_float32(var) else ()


def run_backward(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    stages: Sequence[Stage],
    layers: Sequence[Layer],
    tensors: Sequence[Tensor | None],
    has_residual: bool,
    wants_input: bool,
    wanted: Sequence[bool],
    adds: Adds | None = None,
) -> Gradients:
    """Gradients of a chain: of the residual wherever there is one, of ``tensors`` as ``wanted`` has it.

    ``output`` tells the side of the last kink: see :func:`ganvas.ops.layers.output_has_kink`.
    """
    adds = adds or (None,) * len(layers)
    last, size, of_layer = len(layers) - 1, len(Tensors._fields), by_layer(tensors)
    first_wanted = 0 if wants_input else next((i // size for i, want in enumerate(wanted) if want), last)
    first_wanted = min(first_wanted, residual_layer(adds))
    befores = [Pending(checks.channels_last(input)), *(stage.output for stage in stages[:-1])]
    grads: list[Tensor | None] = [None] * len(wanted)
    grad: Tensor | None = grad_output
    raw: Tensor | PendingGradient
    sums, of_residual = None, None
    of_added: dict[int, Tensor] = {}  # gradients of layers' inputs, from where those were added
    for i in reversed(range(first_wanted, len(layers))):
        layer, own, wants = layers[i], of_layer[i], wanted[size * i :][:size]
        assert grad is not None
        before = befores[i]
        chosen = _chosen_backward(
            layer, own, before.stored.shape, grad.dtype, i > first_wanted or wants_input, wants[0]
        )
        added = adds[i]
        if added is not None or (has_residual and i == residual_layer(adds)):
            of_sum = grad = checks.channels_last(grad)
            if layer.adds_last:
                raw, of_bn_weight, of_bn_bias = kernels_of(grad).activate_backward(grad, stages[i].pending)
            else:
                raw, of_bn_weight, of_bn_bias, of_sum = kernels_of(grad).activate_add_backward(
                    grad, output if i == last else stages[i].written, stages[i].pending
                )
            if added is None or added == GIVEN:
                of_residual = of_sum
            else:
                of_added[added] = of_sum
        else:
            settled = layer.activation_first and wants[1]  # of which the bias' gradient is the sum
            raw, of_bn_weight, of_bn_bias = _raw_gradient(
                layer, own, stages[i], grad, sums, before.stored.shape, {} if settled else chosen
            )
        grad, sums, of_weight = _convolution_gradients(layer, own, raw, before, chosen)
        if grad is not None and i in of_added:
            grad = grad + of_added.pop(i)
        of_bias = _bias_gradient(layer, raw, of_bn_bias) if wants[1] else None
        for j, gradient in enumerate((of_weight, of_bias, of_bn_weight, of_bn_bias)):
            if wants[j] and gradient is not None and (tensor := own[j]) is not None:
                grads[size * i + j] = to_dtype(gradient, tensor.dtype)
    return Gradients(grad if wants_input else None, of_residual, grads)


def _forward(
    layer: Layer,
    own: Tensors,
    moved: tuple[Tensor, ...],
    before: Pending,
    written: Tensor | None,
    groups: int,
    residual: Tensor | None,
    kept: bool,
) -> tuple[Stage, Tensor | None]:
    """The layer's result, and its activation where that is written already: by a kernel, or with a residual.

    Args:
        moved: see :func:`_moved_in_kernel`.
        kept: the stage is, for backward, which wants the raw output.
    """
    if residual is not None:
        residual = checks.channels_last(residual)
    before_kink = None if layer.adds_last else residual
    stored = before.stored
    kernels = kernels_of(stored)
    kernel = kernels.chosen_convolution(
        layer.geometry, own.weight, stored.shape, stored.dtype, layer.forward_direction, layer.backend
    )
    norm: Any = (own.bn_weight, own.bn_bias)
    options: Any = (layer.eps, layer.negative_slope, layer.activation_first)
    running: Any = (*moved, layer.momentum) if moved else (None, None, 0.0)
    given = (layer.running_mean, layer.running_var) if layer.batch_statistics is False else (None, None)
    activation = None
    if (
        kernel is not None
        and kernel.writes_activations
        and not (kept or layer.batch_statistics or layer.max_pool or layer.is_bare)
    ):
        pending = fixed(kernel.output(), *norm, *given, *options, groups)  # type: ignore[call-arg]
        activation = kernel.activated(before, own.weight, own.bias, pending, before_kink)
        if residual is not None and layer.adds_last:
            activation += residual
        return Stage(pending, activation), activation
    if kernel is not None and layer.batch_statistics:
        pending = kernel.forward_with_statistics(before, own.weight, own.bias, *norm, *running, *options, groups)
    else:
        if kernel is not None:
            output = kernel.forward(before, own.weight, own.bias)
        else:
            input = kernels.activate(before) if written is None else written
            output = checks.channels_last(convolve(input, *_of_dtype(own, input.dtype), layer.geometry))
        if layer.batch_statistics:
            pending, activation = kernels.batch_normalised(output, before_kink, *norm, *running, *options, groups)
        else:
            pending = fixed(output, *norm, *given, *options, groups)  # type: ignore[call-arg]
    if layer.batch_statistics and not moved:
        _move_running_statistics(layer, pending)
    if residual is not None and layer.adds_last:
        activation = (kernels.activate(pending) if activation is None else activation) + residual
    elif residual is not None and activation is None:
        activation = kernels.activate_add(pending, residual)
    return (Stage(pending, *kernels.max_pool(pending)), None) if layer.max_pool else (Stage(pending), activation)


def _move_running_statistics(layer: Layer, pending: Pending) -> None:
    """Where the kernel could not."""
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        return
    assert pending.mean is not None
    assert pending.var is not None
    count = pending.stored.numel() // pending.mean.numel()
    move_running_statistics(mean, var, pending.mean, pending.var, layer.momentum, count)


Chosen = dict[Direction, Any]
"""The kernels of a convolution in each direction that is asked for; None where torch's run."""


def _chosen_backward(
    layer: Layer, own: Tensors, input_shape: torch.Size, dtype: torch.dtype, wants_input: bool, wants_weight: bool
) -> Chosen:
    choose, chosen = kernels_of(own.weight).chosen_convolution, {}
    directions: tuple[tuple[Direction, bool], ...] = (
        ("backward_weight", wants_weight),
        ("backward_input", wants_input),
    )
    for direction, wants in directions:
        if wants:
            chosen[direction] = choose(layer.geometry, own.weight, input_shape, dtype, direction, layer.backend)
    return chosen


def _raw_gradient(
    layer: Layer,
    own: Tensors,
    stage: Stage,
    grad: Tensor,
    sums: Tensor | None,
    input_shape: torch.Size,
    readers: Chosen,
) -> tuple[Tensor | PendingGradient, Tensor | None, Tensor | None]:
    """From the gradient of what a layer put out: those of its convolution's raw output, γ and β, if there was a pass.

    With ``sums`` a convolution's backward pass has begun with it: see :func:`ganvas.ops.backends.cpu.settle`. What
    ``readers`` alone read may stay pending.
    """
    kernels = kernels_of(grad)
    if sums is not None:
        if stage.pending.batch_statistics and readers and None not in readers.values():
            arguments = (layer.geometry, own.weight, input_shape, grad.dtype, readers, layer.backend)
            if kernels.stays_pending(*arguments):
                return kernels.pending_gradient(grad, sums, stage.pending)
        return kernels.settle(grad, sums, stage.pending)
    grad = checks.channels_last(grad)
    if layer.is_bare:
        return grad, None, None
    if stage.winners is not None:
        return kernels.max_pool_backward(grad, stage.winners, stage.pending)
    return kernels.activate_backward(grad, stage.pending)


def _convolution_gradients(
    layer: Layer, own: Tensors, raw: Tensor | PendingGradient, before: Pending, chosen: Chosen
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From the raw output's gradient: what :func:`_raw_gradient` takes of the layer before, and the weight's."""
    of_weight = grad = sums = None
    if (kernel := chosen.get("backward_weight")) is not None:
        of_weight = kernel.backward_weight(raw, own.weight, before)
    if (kernel := chosen.get("backward_input")) is not None:
        grad, sums = kernel.backward_input(raw, own.weight, before)
    if None in chosen.values():
        assert isinstance(raw, Tensor)
        by_torch = {direction for direction, kernel in chosen.items() if kernel is None}
        needs = ("backward_input" in by_torch, "backward_weight" in by_torch)
        # Of the input's values torch's gradient of the weight alone reads any.
        activation = kernels_of(raw).activate(before) if needs[1] else before.stored
        torchs = convolve_backward(raw, activation, _of_dtype(own, raw.dtype)[0], layer.geometry, needs)
        grad, of_weight = (a if b is None else b for a, b in zip((grad, of_weight), torchs))
    return grad, None if before.scale is None else sums, of_weight


def _bias_gradient(layer: Layer, raw: Tensor | PendingGradient, of_bn_bias: Tensor | None) -> Tensor:
    if of_bn_bias is not None and not layer.activation_first:
        if layer.batch_statistics:  # subtracting the mean cancels a bias
            return torch.zeros_like(of_bn_bias)
        if layer.batch_statistics is None:
            return of_bn_bias
    assert isinstance(raw, Tensor)
    return kernels_of(raw).channel_sums(raw)


def _of_dtype(own: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as torch's convolution wants them: of the input's dtype."""
    return own.weight.to(dtype), None if own.bias is None else own.bias.to(dtype)


def differentiable_backward(
    grad_output: Tensor,
    input: Tensor,
    residual: Tensor | None,
    layers: Sequence[Layer],
    groups: int,
    tensors: Sequence[Tensor | None],
    adds: Adds | None = None,
) -> Gradients:
    """All gradients through plain torch, which can be differentiated again (create_graph=True)."""
    again = torch.is_grad_enabled()
    adds = adds or (None,) * len(layers)
    with torch.enable_grad():
        # Views, each of which is used once: a tensor in two places, or made of another one, gets its share in each.
        input, residual, *tensors = (t if t is None else t.view_as(t) for t in (input, residual, *tensors))  # type: ignore[assignment]
        output, inputs = input, []
        for i, (layer, own) in enumerate(zip(layers, by_layer(tensors))):
            inputs.append(output)
            position = adds[i]
            if position is None or position == GIVEN:
                added = residual if i == residual_layer(adds) else None
            else:
                added = inputs[position]
            output = convolve(output, *_of_dtype(own, output.dtype), layer.geometry)
            if layer.batch_statistics is None:
                output = F.leaky_relu(output, layer.negative_slope)
            else:
                output = reference.batch_norm_leaky_relu(
                    output, own.bn_weight, own.bn_bias, layer.running_mean, layer.running_var,
                    training=layer.batch_statistics, momentum=0.0, eps=layer.eps, negative_slope=layer.negative_slope,
                    order="conv_act_bn" if layer.activation_first else "conv_bn_act",
                    statistics_groups=groups if layer.batch_statistics else 1,
                    residual=None if layer.adds_last else added,
                )  # fmt: skip
                if added is not None and layer.adds_last:
                    output = output + added
            if layer.max_pool:
                output = F.max_pool2d(output, 2)
        grads = reference_gradients(output, (input, residual, *tensors), grad_output)
    if not again:
        grads = tuple(grad if grad is None else grad.detach() for grad in grads)
    return Gradients(grads[0], grads[1], list(grads[2:]))
