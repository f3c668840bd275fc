"""What a layer cannot do without, beside torch's own count of operations and counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from on_gpu import floors
from on_gpu.networks import network_of
from shapes import CONVOLUTIONS, GPU_ACTIVATIONS, GPU_LAYERS, LayerShape


def counted(layer, *, backward):
    network = network_of([layer]).float()
    x = torch.randn(layer.batch, layer.in_channels, layer.size, layer.size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        output = network(x)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["1x1", "3x3", "4x4/2", "transposed 4x4/2"])
def test_operations_are_those_that_torch_counts(kind):
    layer = LayerShape(kind, 2, 3, 5, 8)
    assert floors.forward([layer], 2).operations == counted(layer, backward=False)
    assert floors.step([layer], 2).operations == counted(layer, backward=True)


def test_upsampling_saves_five_ninths_of_the_operations():
    layer = LayerShape("upsampled 3x3", 2, 3, 5, 8)
    assert 9 * floors.forward([layer], 2).operations == 4 * counted(layer, backward=False)


def test_bytes_of_a_layer_counted_by_hand():
    layer = LayerShape("4x4/2", 1, 1, 1, 8)  # 64 values in, 16 weights, 16 values out
    assert floors.forward([layer], 2).bytes == 2 * (64 + 16 + 16 + 2 * 16)
    backward = 3 * 16 + (2 * 16 + 16 + 64) + (2 * 16 + 64 + 16)
    assert floors.step([layer], 2).bytes == floors.forward([layer], 2).bytes + 2 * backward


def test_each_further_layer_of_a_chain_moves_nine_maps():
    layer = LayerShape("1x1", 64, 1, 1, 32)  # a weight of one value
    moved = [floors.step([layer] * count, 1).bytes - 3 * count for count in (3, 4)]
    assert moved[1] - moved[0] == 9 * 64 * 32 * 32


def test_kernels_of_the_norm_read_twice_and_write_once():
    assert floors.batch_norm_forward(10).bytes == 30
    assert floors.batch_norm_backward(10).bytes == 50
    assert floors.discriminator_loss(10).bytes == 40


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_output_of_a_layer_has_the_size_that_floors_count_with(kind):
    layer = LayerShape(kind, 2, 3, 4, 8)
    output = network_of([layer]).float()(torch.randn(2, 3, 8, 8))
    assert output.shape == (2, 4, layer.out_size, layer.out_size)


def test_shapes_span_what_the_claims_are_about():
    channels = [c for layer in GPU_LAYERS for c in (layer.in_channels, layer.out_channels)]
    sides = [side for layer in GPU_LAYERS for side in (layer.size, layer.out_size)]
    batches = [layer.batch for layer in GPU_LAYERS]
    assert (min(channels), max(channels)) == (32, 512)
    assert (min(sides), max(sides)) == (4, 128)
    assert (min(batches), max(batches)) == (64, 512)
    assert {layer.kind for layer in GPU_LAYERS} == set(CONVOLUTIONS)
    for dtype, shapes in GPU_ACTIVATIONS.items():
        for shape in shapes:
            assert shape.batch * shape.channels * shape.size**2 * getattr(torch, dtype).itemsize >= 256 * 2**20
