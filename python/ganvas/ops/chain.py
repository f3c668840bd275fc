"""Runs of convolution, BatchNorm and LeakyReLU as one operation: between the layers nothing is written but raw outputs.

The activation of a layer stays pending (:class:`ganvas.ops.pending.Pending`): the next convolution applies
the norm and the kink while it loads, and its backward pass leaves the sums that the norm's needs. Nearest-neighbour
upsampling before a convolution and 2×2 max-pooling after an activation are part of a layer. A convolution that no
native kernel takes runs in torch, on the activation written out for it. Where native kernels take all of them on a CPU,
the chain is one native call forward and one backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ganvas.ops import chain_operators, layout, tuning
from ganvas.ops.backends.arguments import to_dtype
from ganvas.ops.backends.cpu.precision import rounds_float32
from ganvas.ops.backends.trial import Direction
from ganvas.ops.chain_passes import (
    Stage,
    differentiable_backward,
    restored,
    restored_all,
    run_backward,
    run_forward,
)
from ganvas.ops.direct import holds, runs_as_operator, runs_directly
from ganvas.ops.kernels import kernels_of
from ganvas.ops.layers import GIVEN, Adds, Layer, by_layer, output_has_kink, residual_layer
from ganvas.ops.selection import choose

__all__ = ["Chain", "Layer", "can_chain", "conv_bn_leaky_relu_chain"]


def can_chain(
    input: Tensor, layers: Sequence[Layer], statistics_groups: int = 1, residual: Tensor | None = None
) -> bool:
    """Whether it pays to run the layers as a chain: native kernels take a convolution of them, or pooling.

    Also False where an argument does not fit: the layers one by one have the message for that.
    """
    return Chain(layers).prepare(input, statistics_groups, residual) is not None


def conv_bn_leaky_relu_chain(
    input: Tensor, layers: Sequence[Layer], statistics_groups: int = 1, residual: Tensor | None = None
) -> Tensor:
    """``layers`` one after the other; call it where :func:`can_chain` says so.

    Args:
        input: (N, C, H, W) float32 or bfloat16 on the CPU; copied to channels_last where it is not.
        statistics_groups: equal consecutive parts of the batch with batch statistics of their own.
        residual: like the output; added to the last layer's norm, before its activation, or after it
            (:attr:`ganvas.ops.layers.Layer.adds_last`). That layer has a norm, the activation after it, and no pooling.

    Returns:
        The last layer's activation, channels_last. Gradients of every order. A backward pass that does not retain the
        graph writes over what forward saved in it; where hooks for saved tensors were there, it does not.
    """
    chain = Chain(layers)
    return chain.run(chain.prepare(input, statistics_groups, residual), input, statistics_groups, residual)


_MOST_PREPARED = 64  # shapes of one chain

Layouts = list[tuple[type, torch.Size, tuple[int, ...], torch.dtype, torch.device]]


@dataclass(frozen=True)
class Prepared:
    """What is known of a chain's inputs of one shape."""

    pays: bool
    """Whether the layers should run as a chain."""
    residual_shape: torch.Size
    """That what is added from outside has to be of."""
    native: Any
    """The chain in one call, if there is such a call: :class:`ganvas.ops.backends.cpu.chain.NativeChain`."""
    layouts: Layouts
    """Of the chain's tensors."""
    generation: int
    """Of the choices by measurement."""


class Chain:
    """Layers that run as one operation. What was found out about a shape is kept for the next input of that shape.

    One that has ``adds`` runs in one native call forward and one backward, on a CPU, or not at all; but in graphs of
    torch.compile, where it is the operator that finds out.
    """

    def __init__(self, layers: Sequence[Layer], adds: Adds | None = None) -> None:
        self.layers = tuple(layers)
        self.adds = adds or (None,) * len(self.layers)
        self.residual_layer = residual_layer(self.adds)
        self._has_adds = any(added is not None for added in self.adds)
        self._parameters = [tensor for layer in self.layers for tensor in layer.tensors]
        self._moving = [tensor for layer in self.layers for tensor in layer.moving]
        self._tensors = [tensor for tensor in (*self._parameters, *self._moving) if tensor is not None]
        self._moved = [t for layer in self.layers if layer.batch_statistics for t in layer.moving if t is not None]
        self.given = [t for layer in self.layers if layer.batch_statistics is False for t in layer.moving[:2]]
        self._prepared: dict[tuple[Any, ...], Prepared] = {}

    def __call__(self, input: Tensor, statistics_groups: int = 1, residual: Tensor | None = None) -> Tensor | None:
        """As :func:`conv_bn_leaky_relu_chain` where :func:`can_chain`, None elsewhere."""
        prepared = self.prepare(input, statistics_groups, residual)
        return None if prepared is None else self.run(prepared, input, statistics_groups, residual)

    def prepare(self, input: Tensor, statistics_groups: int, residual: Tensor | None) -> Prepared | None:
        """None where the layers are to run one by one: see :func:`can_chain`."""
        if not (runs_directly(input) or runs_as_operator(input)):
            return None
        if self._has_adds and input.device.type != "cpu":
            return None
        if choose("conv_bn_leaky_relu", input, self.layers[0].backend) == "reference":
            return None
        if torch.compiler.is_compiling():  # no memory of what a graph was made of
            prepared = self._examine(input, statistics_groups)
        else:
            key = (
                input.shape, input.device, _computed_dtype(input), statistics_groups, torch.get_num_threads(),
                torch.is_grad_enabled(), rounds_float32(), torch.is_autocast_enabled(input.device.type),
            )  # fmt: skip
            prepared = self._prepared.get(key)
            if prepared is None or prepared.generation != tuning.generation or prepared.layouts != self._layouts():
                prepared = self._examine(input, statistics_groups)
                if prepared is None:
                    prepared = Prepared(False, input.shape, None, self._layouts(), tuning.generation)
                if len(self._prepared) >= _MOST_PREPARED:
                    self._prepared.clear()
                self._prepared[key] = prepared
        if prepared is None or not prepared.pays:
            return None
        if residual is not None:
            shape = prepared.residual_shape
            if not (holds(residual, shape, input.device) and residual.dtype is _computed_dtype(input)):
                return None  # torch broadcasts and promotes
            if not _tells_its_kink(self.layers[self.residual_layer]):
                return None
        return prepared

    def run(self, prepared: Prepared | None, input: Tensor, statistics_groups: int, residual: Tensor | None) -> Tensor:
        """With what :meth:`prepare` said of these arguments."""
        input = to_dtype(input, _computed_dtype(input))
        if torch.compiler.is_compiling():
            return chain_operators.call(input, residual, self.layers, statistics_groups, self.adds)
        native = None if prepared is None else prepared.native
        assert native is not None or not self._has_adds
        tensors = self._parameters
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, residual, *tensors)):
            return _ChainFunction.apply(input, residual, self, statistics_groups, native, *tensors)
        if native is not None:
            output, _, _ = self.run_natively(native, input, residual, keep=False)
            return output
        return run_forward(input, residual, self.layers, tensors, statistics_groups)

    def run_natively(self, native: Any, input: Tensor, residual: Tensor | None, *, keep: bool) -> Any:
        """``native.forward``; torch is told of what it moves."""
        if residual is not None:
            residual = layout.channels_last(residual)
        result = native.forward(layout.channels_last(input), residual, self._parameters, self._moving, keep)
        torch.autograd.graph.increment_version(self._moved)
        return result

    def _examine(self, input: Tensor, groups: int) -> Prepared | None:
        if input.dim() != 4 or input.numel() == 0 or input.shape[0] % groups:
            return None
        kernels, dtype, device = kernels_of(input), _computed_dtype(input), input.device
        if dtype not in kernels.DTYPES:
            return None
        autocast = torch.is_autocast_enabled(device.type)
        convolutions = []
        shape = residual_shape = input.shape
        for i, (layer, added) in enumerate(zip(self.layers, self.adds)):
            weight = layer.weight
            if shape[1] != layer.geometry.in_channels(weight.shape):
                return None
            if weight.dtype is not dtype and not (autocast and weight.dtype is not torch.float64):
                return None
            convolutions.append((layer, shape))
            convolved = layer.convolved_shape(shape)
            if i == self.residual_layer:
                residual_shape = convolved
            if added is not None and added != GIVEN:
                if not _tells_its_kink(layer) or convolutions[added][1] != convolved:
                    return None  # as prepare() has it of a residual
                if added > 0 and self.layers[added - 1].is_bare:
                    return None
            if not holds(weight, weight.shape, device):
                return None
            for values in (layer.bias, layer.bn_weight, layer.bn_bias, layer.running_mean, layer.running_var):
                if values is not None and not holds(values, (convolved[1],), device):
                    return None
            shape = layer.pooled_shape(convolved)
            if min(shape) < 1:
                return None
            # Not numel(), which makes a constant of a symbolic size.
            if layer.batch_statistics and convolved[0] * convolved[2] * convolved[3] == groups:
                return None
        compiling = torch.compiler.is_compiling()
        if compiling and self._has_adds:  # as in eager mode, for all that is known before it runs
            pays = all(_is_native(layer, read, dtype) for layer, read in convolutions)
        else:
            pays = any(layer.max_pool or _is_native(layer, read, dtype) for layer, read in convolutions)
        if compiling:
            return Prepared(pays, residual_shape, None, [], 0)
        native = kernels.native_chain(self.layers, input.shape, dtype, groups, self.adds) if pays else None
        if self._has_adds:
            pays = native is not None and (native.goes_backward or not torch.is_grad_enabled())
        return Prepared(pays, residual_shape, native, self._layouts(), tuning.generation)

    def _layouts(self) -> Layouts:
        return [(type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in self._tensors]


def _tells_its_kink(layer: Layer) -> bool:
    """Of one that adds: whether backward finds the kink's side, told from the output's sign where it adds before it."""
    return layer.adds_last or layer.negative_slope >= 0


def _is_native(layer: Layer, input_shape: torch.Size, dtype: torch.dtype) -> bool:
    """Whether a native kernel runs, forward or backward. In a graph it is the operator that measures, when it runs."""
    kernels, arguments = kernels_of(layer.weight), (layer.geometry, layer.weight, input_shape, dtype)
    if torch.compiler.is_compiling():
        return kernels.native_convolution(*arguments) is not None
    directions: list[Direction] = [layer.forward_direction]
    if torch.is_grad_enabled():
        directions += ["backward_weight", "backward_input"]
    return any(kernels.chosen_convolution(*arguments, way, layer.backend) is not None for way in directions)


class _ChainFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, residual, chain, groups, native, *tensors):  # type: ignore[override]
        layers = chain.layers
        kept: list[Tensor | None]
        if native is not None:
            output, kept, statistics = chain.run_natively(native, input, residual, keep=True)
            # Statistics that were given are not read again, but a change of them is an error in torch.
            kept = [*kept, statistics, *chain.given]
        else:
            stages: list[Stage] = []
            output = run_forward(input, residual, layers, tensors, groups, stages.append)
            kept = [tensor for s in stages for tensor in (s.pending.stored, *s.statistics, s.written, s.winners)]
            if layers[-1].is_bare:  # the output itself, over which others may write: backward does without
                kept[-len(kept) // len(stages)] = None
        # The output tells the side of the kink: the residual itself is needed for second derivatives only.
        result = output if output_has_kink(layers, chain.adds, residual is not None) else None
        ctx.save_for_backward(input, residual, result, *tensors, *kept)
        ctx.layers, ctx.adds, ctx.groups, ctx.native = layers, chain.adds, groups, native
        once = not {0, GIVEN} & set(chain.adds)
        ctx.residual_is_input = once and residual is not None and residual is input
        ctx.only_graph_keeps = not _saved_tensors_are_hooked()
        return output

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[override]
        input, residual, result, *saved = ctx.saved_tensors
        wants_input, _, _, _, _, *wanted = ctx.needs_input_grad
        layers, native, count = ctx.layers, ctx.native, len(wanted)
        tensors, kept = saved[:count], saved[count:]
        grads = None
        if torch.is_grad_enabled() or not runs_directly(grad_output):
            grads = differentiable_backward(grad_output, input, residual, layers, ctx.groups, tensors, ctx.adds)
        elif native is not None:
            kept, statistics = kept[: native.kept_count], kept[native.kept_count]
            grads = native.backward(
                layout.channels_last(grad_output), layout.channels_last(input), result, tensors, kept, statistics,
                residual is not None, ctx.residual_is_input, wants_input, wanted,
                overwrite_kept=ctx.only_graph_keeps and not _graph_is_retained(),
            )  # fmt: skip
        if grads is None:
            if native is None:
                stages = _stages(layers, tensors, kept)
            else:
                stages = restored_all(layers, tensors, kept, statistics, ctx.groups)
            grads = run_backward(
                grad_output, input, result, stages, layers, tensors, residual is not None, wants_input, wanted, ctx.adds
            )
        of_input = None if grads.input is None else layout.laid_out(grads.input, input)
        return of_input, grads.residual, None, None, None, *grads.tensors


def _graph_is_retained() -> bool:
    """Whether another backward pass may follow the one that runs."""
    retained = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return retained is None or retained()


def _saved_tensors_are_hooked() -> bool:
    """Whether someone beside the graph is handed what is saved for backward, and may hold on to it."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(True) is not None


def _stages(layers: Sequence[Layer], tensors: Sequence[Tensor | None], kept: Sequence[Tensor | None]) -> list[Stage]:
    """From what was kept of each layer: see :func:`restored`."""
    size = len(kept) // len(layers)
    return [
        restored(layer, own, *kept[size * i : size * (i + 1)])  # type: ignore[arg-type]
        for i, (layer, own) in enumerate(zip(layers, by_layer(tensors)))
    ]


def _computed_dtype(input: Tensor) -> torch.dtype:
    """Of the tensors between the layers: autocast's where that is on."""
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
