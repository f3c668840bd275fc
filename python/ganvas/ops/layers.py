"""What a chain of convolution, BatchNorm and LeakyReLU is made of, and how an operator is told of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ganvas.ops.backends.trial import Direction
from ganvas.ops.convolution import Geometry


class Tensors(NamedTuple):
    """What gradients flow to."""

    weight: Tensor
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None


class Gradients(NamedTuple):
    """Of what they are asked for, the others None."""

    input: Tensor | None
    residual: Tensor | None
    tensors: list[Tensor | None]


@dataclass(eq=False, slots=True)  # frozen, it would take three times as long to make
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
    backend: str | None = None
    """Of the convolution, where there is no choice to be made."""
    batches: Tensor | None = None
    """int64, a number: counts the groups whose statistics are taken. None: they are not, or elsewhere."""
    adds_last: bool = False
    """What the layer adds, if anything, is added to its activation, not to the norm before that."""

    @property
    def is_bare(self) -> bool:
        """Whether nothing follows the convolution."""
        return self.batch_statistics is None and self.negative_slope == 1.0 and not self.max_pool

    @property
    def forward_direction(self) -> Direction:
        """Which of a convolution's ways forward the layer takes."""
        return "forward_with_statistics" if self.batch_statistics else "forward"

    @property
    def tensors(self) -> Tensors:
        return Tensors(self.weight, self.bias, self.bn_weight, self.bn_bias)

    @property
    def moving(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What a kernel reads or moves of the statistics: mean, variance and the count of batches."""
        mean, var = self.running_mean, self.running_var
        if (
            self.batch_statistics is None
            or mean is None
            or var is None
            or (self.batch_statistics and not self.momentum)
        ):
            mean = var = None
        return mean, var, self.batches if self.batch_statistics else None

    @property
    def out_channels(self) -> int:
        return self.geometry.out_channels(self.weight.shape)

    def convolved_shape(self, input: torch.Size) -> torch.Size:
        """Of an input's shape (N, Cin, H, W); sides below 1 where a kernel does not fit."""
        return self.geometry.output_shape(input, self.weight.shape)

    def pooled_shape(self, convolved: torch.Size) -> torch.Size:
        """Of the convolution's output, after pooling, if there is any."""
        batch, channels, height, width = convolved
        return torch.Size((batch, channels, height // 2, width // 2)) if self.max_pool else convolved

    def output_shape(self, input: torch.Size) -> torch.Size:
        """Of an input's shape, after convolution and pooling."""
        return self.pooled_shape(self.convolved_shape(input))


GIVEN = -2
"""As native chains number it, beside the layers."""

Adds = tuple[int | None, ...]
"""Of a chain's layers, the one whose input each adds to its norm, before its activation (or after it:
:attr:`Layer.adds_last`); None: none, :data:`GIVEN`: the residual that the chain is called with, else the last layer's.

An input is the chain's, or a layer's activation, which then is written. It is added once. The layer that adds has a
norm, the activation after it, and no pooling."""


def hands_on_written(layers: Sequence[Layer], adds: Adds, i: int) -> bool:
    """Whether layer ``i`` hands the next one its activation written: something was added, or it is pooled or added."""
    return layers[i].max_pool or adds[i] is not None or i + 1 in adds


def residual_layer(adds: Adds) -> int:
    """The layer that adds what the chain is called with, if it is."""
    return adds.index(GIVEN) if GIVEN in adds else len(adds) - 1


def output_has_kink(layers: Sequence[Layer], adds: Adds, has_residual: bool) -> bool:
    """Whether backward tells the side of the last kink from the chain's output: something was added before it."""
    last, adding = layers[-1], adds[-1] is not None or (has_residual and GIVEN not in adds)
    return adding and not last.adds_last and last.negative_slope != 1.0


def moments_of(moments: Tensor, layers: Sequence[Layer], groups: int) -> Iterator[Tensor]:
    """Of each layer mean, var, scale and shift, (4, G, C), from one piece of memory."""
    begin = 0
    for layer in layers:
        end = begin + 4 * groups * layer.out_channels
        yield moments[begin:end].view(4, groups, layer.out_channels)
        begin = end


def by_layer(tensors: Sequence[Tensor | None]) -> list[Tensors]:
    """The tensors of all layers in a row, as the layers have them."""
    size = len(Tensors._fields)
    return [Tensors(*tensors[i : i + size]) for i in range(0, len(tensors), size)]  # type: ignore[arg-type]


_NOTHING = -1
_NORMS = (None, False, True)  # numbered, as values of ``batch_statistics``
_INTEGERS = 19  # of a layer: a Geometry, the norm, three flags, which of the optional tensors there are, what it adds


class Encoded(NamedTuple):
    """Layers as an operator's arguments, momentum and running statistics that move apart."""

    parameters: list[Tensor]  # of each layer weight, bias, γ and β, those that there are
    statistics: list[Tensor]  # of each layer with fixed statistics mean and variance
    integers: list[int]
    reals: list[float]  # of each layer eps and negative slope


def encode(layers: Sequence[Layer], adds: Adds | None = None) -> Encoded:
    """Of everything but the running statistics that move: an operator returns what they move towards."""
    encoded = Encoded([], [], [], [])
    for layer, added in zip(layers, adds or (None,) * len(layers)):
        geometry, (weight, *optional) = layer.geometry, layer.tensors
        encoded.parameters.extend(t for t in (weight, *optional) if t is not None)
        if layer.batch_statistics is False:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            encoded.statistics.extend((layer.running_mean, layer.running_var))
        encoded.integers.extend(
            (
                *geometry.stride, *geometry.padding, *geometry.dilation, int(geometry.transposed),
                *geometry.output_padding, geometry.groups, int(geometry.upsampled),
                _NORMS.index(layer.batch_statistics), int(layer.activation_first), int(layer.max_pool),
                int(layer.adds_last), *(int(t is not None) for t in optional), _NOTHING if added is None else added,
            )
        )  # fmt: skip
        encoded.reals.extend((layer.eps, layer.negative_slope))
    return encoded


def decode(
    parameters: Sequence[Tensor], statistics: Sequence[Tensor] | None, integers: Sequence[int], reals: Sequence[float]
) -> list[Layer]:
    """The layers again, without what they add. Without ``statistics`` theirs are None."""
    own, fixed = iter(parameters), iter(statistics or ())
    return [
        _decoded(
            own, fixed if statistics is not None else None, integers[_INTEGERS * i :][:_INTEGERS], *reals[2 * i :][:2]
        )
        for i in range(len(reals) // 2)
    ]


def decode_adds(integers: Sequence[int]) -> Adds:
    """What the layers add."""
    return tuple(None if added == _NOTHING else added for added in integers[_INTEGERS - 1 :: _INTEGERS])


def _decoded(
    parameters: Iterator[Tensor], statistics: Iterator[Tensor] | None, integers: Sequence[int], eps: float, slope: float
) -> Layer:
    (
        *pairs, transposed, output_height, output_width, groups, upsampled,
        norm, activation_first, max_pool, adds_last, has_bias, has_bn_weight, has_bn_bias, _,
    ) = integers  # fmt: skip
    stride, padding, dilation = ((pairs[i], pairs[i + 1]) for i in (0, 2, 4))
    geometry = Geometry(
        stride, padding, dilation, bool(transposed), (output_height, output_width), groups, bool(upsampled)
    )
    weight = next(parameters)
    bias, bn_weight, bn_bias = (next(parameters) if there else None for there in (has_bias, has_bn_weight, has_bn_bias))
    fixed = statistics if _NORMS[norm] is False else None
    mean, var = (None, None) if fixed is None else (next(fixed), next(fixed))
    return Layer(
        geometry, weight, bias, _NORMS[norm], bn_weight, bn_bias, mean, var, 0.0, eps, slope, bool(activation_first),
        bool(max_pool), adds_last=bool(adds_last),
    )  # fmt: skip
