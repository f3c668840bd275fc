"""What a piece of work cannot do without: bytes through the memory's bandwidth, operations through the peak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shapes import CONVOLUTIONS, LayerShape


class Floor(NamedTuple):
    """Bytes read and written, additions and multiplications."""

    bytes: int
    operations: int = 0


def batch_norm_forward(size: int) -> Floor:
    """Two reads (statistics, then the norm) and one write of a map of ``size`` bytes."""
    return Floor(3 * size)


def batch_norm_backward(size: int) -> Floor:
    """Two reads of gradient and input (reductions, then the gradient) and one write."""
    return Floor(5 * size)


def discriminator_loss(size: int) -> Floor:
    """Value, gradients and metrics: real and fake logits, ``size`` bytes each, are read, their gradients written."""
    return Floor(4 * size)


def forward(layers: Sequence[LayerShape], itemsize: int) -> Floor:
    """Convolution, BatchNorm with the batch's statistics and LeakyReLU, for consecutive ``layers``.

    Between pending activations: each convolution reads its input and weight and writes its raw output; the last one's
    activation is written once, from that output. What stays in a cache need not come from memory, so that small maps
    may be faster.
    """
    moved = sum(_input(layer) + _output(layer) + _weight(layer) for layer in layers) + 2 * _output(layers[-1])
    return Floor(moved * itemsize, sum(map(_operations, layers)))


def step(layers: Sequence[LayerShape], itemsize: int) -> Floor:
    """Forward, and the gradients of the first layer's input and of all parameters.

    The activation's gradient becomes the norm's (two reads, one write). Then, layer by layer, the input's gradient is
    made of the output's, the raw output, the weight and, for the kink before it, the layer's input, except for the
    first layer's; the weight's gradient of the output's, the raw output and the input.
    """
    moved = 3 * _output(layers[-1])
    for index, layer in enumerate(layers):
        of_input = 2 * _output(layer) + _weight(layer) + (_input(layer) if index else 0) + _input(layer)
        of_weight = 2 * _output(layer) + _input(layer) + _weight(layer)
        moved += of_input + of_weight
    before = forward(layers, itemsize)
    return Floor(before.bytes + moved * itemsize, 3 * before.operations)


def _input(layer: LayerShape) -> int:
    return layer.batch * layer.in_channels * layer.size**2


def _output(layer: LayerShape) -> int:
    return layer.batch * layer.out_channels * layer.out_size**2


def _weight(layer: LayerShape) -> int:
    return layer.in_channels * layer.out_channels * CONVOLUTIONS[layer.kind].kernel_size ** 2


def _operations(layer: LayerShape) -> int:
    return 2 * _output(layer) * layer.in_channels * CONVOLUTIONS[layer.kind].taps
