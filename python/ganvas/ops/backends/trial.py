"""What a choice by measurement compares: a convolution as a chain runs it, by native kernels and by torch.

Each side does a layer's whole share of a step. Where the native kernels take statistics or a kink on their way, torch's
side has the pass over memory that does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from ganvas.ops import checks
from ganvas.ops.convolution import Geometry, convolve, convolve_backward
from ganvas.ops.pending import Pending, PendingGradient, fixed, with_statistics

Direction = Literal["forward", "forward_with_statistics", "backward_input", "backward_weight"]
"""``forward``: with no norm or fixed statistics."""

Way = Callable[[], tuple[Tensor, ...]]
"""One way to do it. The results of two begin with the same values."""

_EPS, _SLOPE = 1e-5, 0.2
_VAR = 1 / 3
"""Of values between -1 and 1."""


@dataclass(frozen=True)
class Trial:
    """Random values of one shape. The ways are to be prepared and called without gradients and without autocast."""

    kernels: ModuleType  # as ganvas.ops.kernels.kernels_of has it
    geometry: Geometry
    weight: Tensor
    before: Pending  # what the layer before would leave, with batch statistics
    raw: Tensor | PendingGradient  # of the output's shape; pending for native ways alone
    direction: Direction

    def native(self, convolution: Any) -> Way:
        """By ``convolution``'s methods."""
        before, weight, raw = self.before, self.weight, self.raw
        if self.direction == "forward":
            return lambda: (convolution.forward(before, weight, None),)
        if self.direction == "forward_with_statistics":
            options = (None, None, None, None, None, 0.0, _EPS, _SLOPE, False, 1)
            return lambda: convolution.forward_with_statistics(before, weight, *options)[:3]
        if self.direction == "backward_input":
            return lambda: self.kernels.settle(*convolution.backward_input(raw, weight, before), before)
        return lambda: (convolution.backward_weight(raw, weight, before),)

    def torchs(self) -> Way:
        """By torch's convolution and the kernels that surround it in a chain."""
        if self.direction == "backward_input":
            return self._backward_input
        if self.direction == "backward_weight":
            return self._backward_weight
        activation = self.kernels.activate(self.before)  # written by the layer before
        forward = self._forward_with_statistics if self.direction == "forward_with_statistics" else self._forward
        return lambda: forward(activation)

    def _forward(self, activation: Tensor) -> tuple[Tensor, ...]:
        output = checks.channels_last(convolve(activation, self.weight, None, self.geometry))
        return output, self.kernels.activate(fixed(output, None, None, None, None, _EPS, _SLOPE, False, 1))

    def _forward_with_statistics(self, activation: Tensor) -> tuple[Tensor, ...]:
        output = checks.channels_last(convolve(activation, self.weight, None, self.geometry))
        none = (None, None, None, None, None, 0.0)
        pending, written = self.kernels.batch_normalised(output, *none, _EPS, _SLOPE, False, 1)
        if written is None:
            self.kernels.activate(pending)
        return pending[:3]

    def _backward_input(self) -> tuple[Tensor, ...]:
        assert isinstance(self.raw, Tensor)
        # Of the input torch reads no more than the shape.
        grad, _ = convolve_backward(self.raw, self.before.stored, self.weight, self.geometry, (True, False))
        assert grad is not None
        return self.kernels.activate_backward(checks.channels_last(grad), self.before)

    def _backward_weight(self) -> tuple[Tensor, ...]:
        assert isinstance(self.raw, Tensor)
        activation = self.kernels.activate(self.before)
        _, of_weight = convolve_backward(self.raw, activation, self.weight, self.geometry, (False, True))
        assert of_weight is not None
        return (of_weight,)


@dataclass(frozen=True)
class BackwardTrial:
    """A convolution's gradients, from what the backward pass of the layer after has left: g and its sums.

    Each way begins with a copy of g, which settling overwrites: in a chain it has just been written.
    """

    of: Trial
    after: Pending  # of the output
    sums: Tensor  # (2, 1, Cout)

    def native(self, convolutions: Mapping[Direction, Any], make: Callable[..., tuple[Any, Tensor, Tensor]]) -> Way:
        """By the methods of ``convolutions`` (direction → kernels), of what ``make`` makes of (g, sums, after)."""
        return self._way(make, convolutions, lambda of: of.native(convolutions[of.direction]))

    def torchs(self, directions: Iterable[Direction]) -> Way:
        """By torch's convolution, of the settled gradient."""
        return self._way(self.of.kernels.settle, directions, Trial.torchs)

    def _way(
        self, make: Callable[..., tuple[Any, Tensor, Tensor]], directions: Iterable[Direction],
        run: Callable[[Trial], Way],
    ) -> Way:  # fmt: skip
        assert isinstance(self.of.raw, Tensor)
        grad = self.of.raw

        def way() -> tuple[Tensor, ...]:
            raw, *of_norm = make(grad.clone(), self.sums, self.after)
            of_each = (run(replace(self.of, raw=raw, direction=direction))() for direction in directions)
            return *(result for results in of_each for result in results), *of_norm

        return way


def trial(
    kernels: ModuleType,
    geometry: Geometry,
    weight_shape: torch.Size,
    input_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    direction: Direction,
) -> Trial:
    """A :class:`Trial`; torch's default random state stays as it is."""
    uniform = _uniform(0, dtype, device)
    # On a GPU cuDNN, for one, copies a weight of another memory layout in each call.
    weight = uniform(*weight_shape, **(_PIXELS if device.type == "cuda" else {}))
    raw = uniform(*geometry.output_shape(input_shape, weight_shape), **_PIXELS)
    return Trial(kernels, geometry, weight, _pending(uniform(*input_shape, **_PIXELS)), raw, direction)


def backward_trial(of: Trial) -> BackwardTrial:
    """The same for both gradients. Each channel of g has a mean and a part of the output in it, for the norm to remove.

    What is left of it is of.raw: sums over any number of pixels stay as small as they are of that.
    """
    assert isinstance(of.raw, Tensor)
    batch, channels, height, width = of.raw.shape
    stored = _uniform(1, of.raw.dtype, of.raw.device)(*of.raw.shape, **_PIXELS)
    means, parts = _uniform(2, of.raw.dtype, of.raw.device)(2, channels, 1, 1)
    grad = torch.addcmul(of.raw + means, stored, parts)
    sums = torch.stack((means, parts * _VAR)).view(2, 1, channels).float() * (batch * height * width)
    return BackwardTrial(replace(of, raw=grad), _pending(stored), sums)


_PIXELS: dict[str, Any] = {"memory_format": torch.channels_last}


def _uniform(seed: int, dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """Makes values between -1 and 1 of a shape; torch's default random state stays as it is."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape, **options: torch.empty(shape, dtype=dtype, device=device, **options).uniform_(
        -1, 1, generator=generator
    )


def _pending(stored: Tensor) -> Pending:
    """With the statistics of its values."""
    mean, var = (torch.full((1, stored.shape[1]), value, device=stored.device) for value in (0.0, _VAR))
    return with_statistics(stored, None, None, mean, var, _EPS, _SLOPE, False, True)
