"""Runs of convolution, BatchNorm and LeakyReLU as one operation: between the layers nothing is written but raw outputs.

The activation of a layer stays pending (:class:`ganvas.ops.backends.cpu.pending.Pending`): the next convolution applies
the norm and the kink while it loads, and its backward pass leaves the sums that the norm's needs. Nearest-neighbour
upsampling before a convolution and 2×2 max-pooling after an activation are part of a layer. A convolution that no
native kernel takes runs in torch, on the activation written out for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ganvas.ops import checks
from ganvas.ops.backends import cpu, reference
from ganvas.ops.batch_norm_leaky_relu import move_running_statistics, reference_gradients
from ganvas.ops.convolution import Geometry, convolve, convolve_backward
from ganvas.ops.selection import choose


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution and what follows it. ``batch_statistics`` None: no norm."""

    geometry: Geometry
    weight: Tensor  # (Cout, Cin/groups, kH, kW); transposed (Cin, Cout/groups, kH, kW)
    bias: Tensor | None = None
    batch_statistics: bool | None = None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float = 0.0
    eps: float = 1e-5
    negative_slope: float = 1.0
    activation_first: bool = False
    max_pool: bool = False
    """The activation is pooled, 2×2 with stride 2."""

    @property
    def moves_in_kernel(self) -> bool:
        """Whether there are running statistics to move, and where a kernel can."""
        mean, var = self.running_mean, self.running_var
        if not self.batch_statistics or not self.momentum or mean is None or var is None:
            return False
        return cpu.is_float32(mean) and cpu.is_float32(var)

    def output_shape(self, input: torch.Size) -> torch.Size:
        """Of an input's shape (N, Cin, H, W); sides below 1 where a kernel does not fit."""
        shape = self.geometry.output_shape(input, self.weight.shape)
        return torch.Size((*shape[:2], shape[2] // 2, shape[3] // 2)) if self.max_pool else shape


class _Tensors(NamedTuple):
    """What gradients flow to."""

    weight: Tensor
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None


class _Stage(NamedTuple):
    """What a layer leaves for backward."""

    pending: cpu.Pending
    pooled: Tensor | None = None  # (N, C, H // 2, W // 2)
    winners: Tensor | None = None  # which of each four, uint8

    @property
    def output(self) -> cpu.Pending:
        """What the next layer reads."""
        return self.pending if self.pooled is None else cpu.Pending(self.pooled)


_PER_LAYER = len(_Tensors._fields)
_PENDING_TENSORS = 7  # the first fields of a Pending


def can_chain(
    input: Tensor, layers: Sequence[Layer], statistics_groups: int = 1, residual: Tensor | None = None
) -> bool:
    """Whether native kernels take one of the layers' convolutions, so that it pays to run them as a chain.

    Also False where an argument does not fit: the layers one by one have the message for that.
    """
    if input.dim() != 4 or input.numel() == 0 or input.shape[0] % statistics_groups or not cpu.runs_directly(input):
        return False
    dtype = _computed_dtype(input)
    if choose("conv_bn_leaky_relu", input, None) != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    autocast = torch.is_autocast_enabled("cpu")
    native = False
    shape = input.shape
    for layer in layers:
        weight, geometry = layer.weight, layer.geometry
        if shape[1] != geometry.in_channels(weight.shape):
            return False
        if weight.dtype is not dtype and not (autocast and weight.dtype is not torch.float64):
            return False
        native = native or cpu.native_convolution(geometry, weight, shape) is not None
        convolved = geometry.output_shape(shape, weight.shape)
        per_channel = (layer.bias, layer.bn_weight, layer.bn_bias, layer.running_mean, layer.running_var)
        if not cpu.holds(weight, weight.shape) or not all(cpu.holds(v, (convolved[1],)) for v in per_channel):
            return False
        shape = layer.output_shape(shape)
        if min(shape) < 1:
            return False
        if layer.batch_statistics and convolved.numel() == convolved[1] * statistics_groups:
            return False
    if residual is not None:
        if not (cpu.holds(residual, shape) and residual.dtype is dtype):
            return False  # torch broadcasts and promotes
        if layers[-1].negative_slope < 0:
            return False  # the output's sign would not tell the side of the kink
    return native


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
    input = input.to(_computed_dtype(input))
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias, layer.bn_weight, layer.bn_bias)]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, residual, *tensors)):
        output = _Chain.apply(input, residual, tuple(layers), statistics_groups, *tensors)
    else:
        stage, written = _Stage(cpu.Pending(checks.channels_last(input))), None
        for i, own in enumerate(_by_layer(tensors), 1):
            added = residual if i == len(layers) else None
            stage, written = _forward(layers[i - 1], own, stage.output, written, statistics_groups, added)
        output = cpu.activate(stage.output) if written is None else written
    moved = [r for layer in layers if layer.moves_in_kernel for r in (layer.running_mean, layer.running_var)]
    torch.autograd.graph.increment_version(tuple(r for r in moved if r is not None))
    return output


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, residual, layers, groups, *tensors):  # type: ignore[override]
        stages = [_Stage(cpu.Pending(checks.channels_last(input)))]
        written = None  # the last activation, where a kernel wrote it on its way
        for i, own in enumerate(_by_layer(tensors), 1):
            added = residual if i == len(layers) else None
            stage, written = _forward(layers[i - 1], own, stages[-1].output, written, groups, added)
            stages.append(stage)
        output = cpu.activate(stages[-1].output) if written is None else written
        kept = [(*s.pending[:_PENDING_TENSORS], s.pooled, s.winners) for s in stages[1:]]
        # The output tells the side of the kink: the residual itself is needed for second derivatives only.
        result = output if residual is not None and layers[-1].negative_slope != 1.0 else None
        ctx.save_for_backward(input, residual, result, *tensors, *(tensor for of_stage in kept for tensor in of_stage))
        ctx.options = [s.pending[_PENDING_TENSORS:] for s in stages[1:]]
        ctx.layers, ctx.groups = layers, groups
        return output

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[override]
        input, residual, result, *saved = ctx.saved_tensors
        layers, count = ctx.layers, _PER_LAYER * len(ctx.layers)
        tensors, saved = saved[:count], saved[count:]
        if torch.is_grad_enabled() or not cpu.runs_directly(grad_output):
            return _differentiable_backward(grad_output, input, residual, layers, ctx.groups, tensors)
        stages = [_Stage(cpu.Pending(checks.channels_last(input)))]
        for i, options in enumerate(ctx.options):
            *kept, pooled, winners = saved[(_PENDING_TENSORS + 2) * i : (_PENDING_TENSORS + 2) * (i + 1)]
            # A hook on saved tensors may hand them back in torch's default layout.
            stored, *per_channel = kept
            pooled, winners = (t if t is None else checks.channels_last(t) for t in (pooled, winners))
            stages.append(_Stage(cpu.Pending(checks.channels_last(stored), *per_channel, *options), pooled, winners))

        needs = ctx.needs_input_grad[4:]
        wanted = [i // _PER_LAYER for i, need in enumerate(needs) if need] or [len(layers) - 1]
        first_wanted = 0 if ctx.needs_input_grad[0] else wanted[0]
        grads: list[Tensor | None] = [None] * count
        grad, sums, of_residual = grad_output, None, None
        for i in reversed(range(first_wanted, len(layers))):
            own, of_layer = (
                _Tensors(*tensors[_PER_LAYER * i :][:_PER_LAYER]),
                slice(_PER_LAYER * i, _PER_LAYER * (i + 1)),
            )
            if residual is not None and i == len(layers) - 1:
                raw, of_bn_weight, of_bn_bias, of_residual = cpu.activate_add_backward(
                    checks.channels_last(grad), result, stages[-1].pending
                )
            else:
                raw, of_bn_weight, of_bn_bias = _raw_gradient(stages[i + 1], grad, sums)
            wants_input = i > first_wanted or ctx.needs_input_grad[0]
            grad, sums, of_weight = _convolution_gradients(
                layers[i], own, raw, stages[i].output, wants_input, needs[of_layer][0]
            )
            of_bias = _bias_gradient(layers[i], raw, of_bn_bias) if needs[of_layer][1] else None
            found = (of_weight, of_bias, of_bn_weight, of_bn_bias)
            grads[of_layer] = [
                gradient.to(tensor.dtype) if need and gradient is not None and tensor is not None else None
                for gradient, tensor, need in zip(found, own, needs[of_layer])
            ]
        return grad if ctx.needs_input_grad[0] else None, of_residual, None, None, *grads


def _computed_dtype(input: Tensor) -> torch.dtype:
    """Of the tensors between the layers: autocast's where that is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype


def _by_layer(tensors: Sequence[Tensor | None]) -> list[_Tensors]:
    return [_Tensors(*tensors[i : i + _PER_LAYER]) for i in range(0, len(tensors), _PER_LAYER)]  # type: ignore[arg-type]


def _forward(
    layer: Layer,
    own: _Tensors,
    before: cpu.Pending,
    written: Tensor | None,
    groups: int,
    residual: Tensor | None = None,
) -> tuple[_Stage, Tensor | None]:
    """The layer's result, and its activation where that is written already: by a kernel, or with a residual."""
    if residual is not None:
        residual = checks.channels_last(residual)
    kernel = cpu.native_convolution(layer.geometry, own.weight, before.stored.shape)
    norm: Any = (own.bn_weight, own.bn_bias)
    options: Any = (layer.eps, layer.negative_slope, layer.activation_first)
    running: Any = (
        (layer.running_mean, layer.running_var, layer.momentum) if layer.moves_in_kernel else (None, None, 0.0)
    )
    activation = None
    if kernel is not None and layer.batch_statistics:
        pending = kernel.forward_with_statistics(before, own.weight, own.bias, *norm, *running, *options, groups)
    else:
        if kernel is not None:
            output = kernel.forward(before, own.weight, own.bias)
        else:
            input = cpu.activate(before) if written is None else written
            output = checks.channels_last(convolve(input, *_of_dtype(own, input.dtype), layer.geometry))
        if layer.batch_statistics:
            if residual is None:
                activation, mean, var = cpu.batch_norm_leaky_relu.train(output, *norm, *options, groups, *running)  # type: ignore[call-arg]
            else:
                activation, mean, var = cpu.batch_norm_leaky_relu.add_train(
                    output,
                    *norm,
                    residual,
                    layer.eps,
                    layer.negative_slope,
                    groups,
                    *running,  # type: ignore[call-arg]
                )
            pending = cpu.with_statistics(output, *norm, mean, var, *options, True)  # type: ignore[call-arg]
        else:
            fixed = (None, None) if layer.batch_statistics is None else (layer.running_mean, layer.running_var)
            pending = cpu.fixed(output, *norm, *fixed, *options, groups)  # type: ignore[call-arg]
    _move_running_statistics(layer, pending)
    if residual is not None and activation is None:
        activation = cpu.activate_add(pending, residual)
    return (_Stage(pending, *cpu.max_pool(pending)), None) if layer.max_pool else (_Stage(pending), activation)


def _move_running_statistics(layer: Layer, pending: cpu.Pending) -> None:
    """Where the kernel could not."""
    mean, var = layer.running_mean, layer.running_var
    if not layer.batch_statistics or layer.moves_in_kernel or mean is None or var is None:
        return
    assert pending.mean is not None
    assert pending.var is not None
    count = pending.stored.numel() // pending.mean.numel()
    move_running_statistics(mean, var, pending.mean, pending.var, layer.momentum, count)


def _raw_gradient(stage: _Stage, grad: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of what a layer put out: those of its convolution's raw output, γ and β.

    With ``sums`` a convolution's backward pass has begun with it: see :func:`cpu.settle`.
    """
    if sums is not None:
        return cpu.settle(grad, sums, stage.pending)
    grad = checks.channels_last(grad)
    if stage.winners is not None:
        return cpu.max_pool_backward(grad, stage.winners, stage.pending)
    return cpu.activate_backward(grad, stage.pending)


def _convolution_gradients(
    layer: Layer, own: _Tensors, raw: Tensor, before: cpu.Pending, wants_input: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From the raw output's gradient: what :func:`_raw_gradient` takes of the layer before, and the weight's."""
    kernel = cpu.native_convolution(layer.geometry, own.weight, before.stored.shape)
    if kernel is None:
        weight, _ = _of_dtype(own, raw.dtype)
        grad, of_weight = convolve_backward(
            raw, cpu.activate(before), weight, layer.geometry, (wants_input, wants_weight)
        )
        return grad, None, of_weight
    of_weight = kernel.backward_weight(raw, own.weight, before) if wants_weight else None
    if not wants_input:
        return None, None, of_weight
    grad, sums = kernel.backward_input(raw, own.weight, before)
    return grad, None if before.scale is None else sums, of_weight


def _bias_gradient(layer: Layer, raw: Tensor, of_bn_bias: Tensor) -> Tensor:
    if not layer.activation_first:
        if layer.batch_statistics:  # subtracting the mean cancels a bias
            return torch.zeros_like(of_bn_bias)
        if layer.batch_statistics is None:
            return of_bn_bias
    return raw.sum((0, 2, 3), dtype=torch.float32)


def _of_dtype(own: _Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as torch's convolution wants them: of the input's dtype."""
    return own.weight.to(dtype), None if own.bias is None else own.bias.to(dtype)


def _differentiable_backward(
    grad_output: Tensor,
    input: Tensor,
    residual: Tensor | None,
    layers: Sequence[Layer],
    groups: int,
    tensors: Sequence[Tensor | None],
) -> tuple[Any, ...]:
    """The same gradients through plain torch, which can be differentiated again (create_graph=True)."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, each of which is used once: a tensor in two places, or made of another one, gets its share in each.
        input, residual, *tensors = (t if t is None else t.view_as(t) for t in (input, residual, *tensors))  # type: ignore[assignment]
        output = input
        for i, (layer, own) in enumerate(zip(layers, _by_layer(tensors)), 1):
            output = convolve(output, *_of_dtype(own, output.dtype), layer.geometry)
            if layer.batch_statistics is None:
                output = F.leaky_relu(output, layer.negative_slope)
            else:
                output = reference.batch_norm_leaky_relu(
                    output, own.bn_weight, own.bn_bias, layer.running_mean, layer.running_var,
                    training=layer.batch_statistics, momentum=0.0, eps=layer.eps, negative_slope=layer.negative_slope,
                    order="conv_act_bn" if layer.activation_first else "conv_bn_act",
                    statistics_groups=groups if layer.batch_statistics else 1,
                    residual=residual if i == len(layers) else None,
                )  # fmt: skip
            if layer.max_pool:
                output = F.max_pool2d(output, 2)
        grads = reference_gradients(output, (input, residual, *tensors), grad_output)
    if not again:
        grads = tuple(grad if grad is None else grad.detach() for grad in grads)
    return grads[0], grads[1], None, None, *grads[2:]
