"""A run of neighbouring layers that executes as one: (convolution | linear), BatchNorm and an activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from ganvas.ops import checks
from ganvas.ops.batch_norm_leaky_relu import batch_norm_leaky_relu
from ganvas.ops.convolution import breaks_in_channels_last
from ganvas.ops.layout import flatten
from ganvas.ops.linear import linear
from ganvas.ops.selection import could_choose_kernel

# Exact types only: a subclass may have a forward of its own.
CONVOLUTIONS = frozenset({nn.Conv2d, nn.ConvTranspose2d})
PRODUCERS = CONVOLUTIONS | {nn.Linear}
NORMS = frozenset({nn.BatchNorm1d, nn.BatchNorm2d})
ACTIVATIONS = frozenset({nn.LeakyReLU, nn.ReLU})


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive children of a Sequential, by role; at least a norm, a producer and an activation, or a convolution.

    ``order`` says where the norm stands: ``conv_bn_act`` (also without an activation) or ``conv_act_bn``.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    producer: nn.Module | None
    norm: _BatchNorm | None
    activation: nn.Module | None
    order: str
    channels_last: bool
    """Convert a 4-D input to channels_last where native kernels run: one of the Sequential's runs holds a norm."""
    upsample: nn.Module | None = None
    """Before a convolution: nearest neighbour, twofold."""
    pool: nn.Module | None = None
    """After a convolution's norm and activation: the maximum of each 2×2."""
    adds_last: bool = False
    """A residual is added to the activation, not to the norm before it."""

    @property
    def is_bare(self) -> bool:
        """Whether it is a convolution alone."""
        return self.norm is None and self.activation is None

    def __call__(self, input: Tensor, statistics_groups: int, residual: Tensor | None = None) -> Tensor:
        """``residual`` is added to the norm's output (``conv_bn_act`` only), before the activation or last."""
        if residual is not None and self.adds_last:
            return self(input, statistics_groups) + residual
        if _has_any_global_hook() or self.why_not() is not None:
            return self.one_by_one(input, statistics_groups, residual)
        if self.channels_last:
            input = native_layout(input)
        if self.upsample is not None:
            input = self.upsample(input)
        if self.producer is not None:
            input = call(self.producer, input, statistics_groups)
        output = self._norm_and_activation(input, statistics_groups, residual)
        return output if self.pool is None else self.pool(output)

    def _norm_and_activation(self, input: Tensor, statistics_groups: int, residual: Tensor | None) -> Tensor:
        if self.norm is None:
            return input if self.activation is None else _activate_fresh(self.activation, input)
        if residual is not None and not _like(residual, input):  # torch broadcasts and promotes
            input = _normalise(self.norm, input, 1.0, self.order, statistics_groups) + residual
            return input if self.activation is None else self.activation(input)
        slope = negative_slope_of(self.activation)
        return _normalise(self.norm, input, slope, self.order, statistics_groups, residual)

    def one_by_one(self, input: Tensor, statistics_groups: int, residual: Tensor | None = None) -> Tensor:
        """The same layers as separate modules, in the same memory layout."""
        if self.channels_last:
            input = native_layout(input)
        for module in self.modules:
            input = call(module, input, statistics_groups)
            if residual is not None and module is self.norm:
                input = input + residual
        return input

    def why_not(self) -> str | None:
        """Why the run's layers have to be called one by one, or None.

        A producer before a norm is called in any case, with its hooks; one before an activation alone must not show its
        output to a hook, since the activation writes over it.
        """
        for module in (self.norm or self.producer, self.activation):
            if module is not None and (reason := why_not_plain(module)) is not None:
                return f"the run's {type(module).__name__} {reason}"
        return None


def call(module: nn.Module, input: Tensor, statistics_groups: int) -> Tensor:
    """``module(input)``; a norm with batch statistics is called once per statistics group.

    What was converted to channels_last on the way is contiguous again for a convolution that breaks there.
    """
    if breaks_on_channels_last(module):
        input = input.contiguous()
    if statistics_groups > 1 and isinstance(module, _BatchNorm) and uses_batch_statistics(module):
        return torch.cat([module(group) for group in _split(input, statistics_groups)])
    if type(module) in _OPERATIONS and why_not_plain(module) is None and not _has_any_global_hook():
        return _OPERATIONS[type(module)](module, input)
    return module(input)


def _flatten(module: nn.Flatten, input: Tensor) -> Tensor:
    return flatten(input) if module.start_dim == 1 and module.end_dim == -1 else module(input)


# What has an operation of its own here.
_OPERATIONS: dict[type, Callable[[Any, Tensor], Tensor]] = {
    nn.Linear: lambda module, input: linear(input, module.weight, module.bias),
    nn.Flatten: _flatten,
}


def breaks_on_channels_last(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution of which torch computes wrong gradients in that layout."""
    return type(module) in CONVOLUTIONS and breaks_in_channels_last(
        module.weight.shape,  # type: ignore[arg-type,union-attr]
        module.stride,  # type: ignore[arg-type]
    )


def why_not_plain(module: nn.Module) -> str | None:
    """Why ``module`` has to be called to do what it is asked to, or None.

    A parametrized module does not come this far: a parametrization changes its type.
    """
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    if "forward" in module.__dict__:
        return "has a forward of its own, set on the instance"
    return None


def uses_batch_statistics(norm: _BatchNorm) -> bool:
    """As torch decides it: in training, and in evaluation where no running statistics are kept."""
    return norm.training or norm.running_mean is None


def native_layout(input: Tensor) -> Tensor:
    """``input`` in channels_last, where a native kernel is going to run on it."""
    # Where every op runs as plain torch, so does the convolution: no conversion that torch would not make.
    if input.dim() != 4 or not could_choose_kernel("batch_norm_leaky_relu", input):
        return input
    return checks.channels_last(input)


def _split(input: Tensor, statistics_groups: int) -> tuple[Tensor, ...]:
    if input.shape[0] % statistics_groups:
        raise ValueError(f"statistics_groups must divide the batch of {input.shape[0]}; got {statistics_groups}")
    return input.chunk(statistics_groups)


def negative_slope_of(activation: nn.Module | None) -> float:
    """Of the LeakyReLU that ``activation`` (one of :data:`ACTIVATIONS`, or None) is: 0 for ReLU, 1 for none."""
    if activation is None:
        return 1.0
    return activation.negative_slope if type(activation) is nn.LeakyReLU else 0.0


def _activate_fresh(activation: nn.Module, output: Tensor) -> Tensor:
    """The activation, written over ``output``, which nobody else holds and which no backward formula reads."""
    if type(output) is not Tensor:  # a subclass may not offer the in-place functions
        return activation(output)
    if type(activation) is nn.ReLU:
        return torch.relu_(output)
    slope = negative_slope_of(activation)
    # In place, backward tells the side of the kink from the result's sign: that needs slope >= 0.
    return F.leaky_relu_(output, slope) if slope >= 0 else F.leaky_relu(output, slope)


def norm_arguments(norm: _BatchNorm) -> tuple[bool, Tensor | None, Tensor | None, float]:
    """What ``_BatchNorm.forward`` decides: batch statistics or not, running mean and variance to use, momentum."""
    momentum = norm.momentum
    tracks = _tracks(norm)
    if momentum is None:
        counts = tracks and norm.num_batches_tracked is not None
        momentum = 1.0 / (float(norm.num_batches_tracked) + 1.0) if counts else 0.0  # type: ignore[arg-type]
    running = (norm.running_mean, norm.running_var) if tracks or not norm.training else (None, None)
    return uses_batch_statistics(norm), *running, momentum


def count_batches(norm: _BatchNorm, statistics_groups: int) -> None:
    """What ``_BatchNorm.forward`` counts."""
    if _tracks(norm) and (counter := norm.num_batches_tracked) is not None:
        counter.add_(statistics_groups)


def _tracks(norm: _BatchNorm) -> bool:
    return norm.training and norm.track_running_stats


def _like(residual: object, input: Tensor) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
    )


def _normalise(
    norm: _BatchNorm,
    input: Tensor,
    negative_slope: float,
    order: str,
    statistics_groups: int,
    residual: Tensor | None = None,
) -> Tensor:
    if statistics_groups > 1 and uses_batch_statistics(norm):
        groups = _split(input, statistics_groups)
        if norm.momentum is None:  # the cumulative average's share changes from group to group
            residuals = [None] * statistics_groups if residual is None else _split(residual, statistics_groups)
            return torch.cat([_normalise(norm, g, negative_slope, order, 1, r) for g, r in zip(groups, residuals)])
    norm._check_input_dim(input)  # type: ignore[operator]
    batch_statistics, running_mean, running_var, momentum = norm_arguments(norm)
    count_batches(norm, statistics_groups)
    return batch_norm_leaky_relu(
        input,
        norm.weight,
        norm.bias,
        running_mean,
        running_var,
        training=batch_statistics,
        momentum=momentum,
        eps=norm.eps,
        negative_slope=negative_slope,
        order=order,
        statistics_groups=statistics_groups if batch_statistics else 1,
        residual=residual,
    )
