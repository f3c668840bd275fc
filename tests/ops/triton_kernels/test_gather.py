"""Convolutions and their gradients as gathers, in float64 against torch's."""

from __future__ import annotations

import pytest
import torch
from gathers import CONVOLUTIONS, gathered, weight_shape

from ganvas.ops.backends.triton.gather import backward_gather, forward_gather, pack_weight, unpack_weight_gradient
from ganvas.ops.convolution import convolve, convolve_backward


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("size", [(7, 6), (9, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gathers_are_torchs_convolution_and_its_gradients(name, size, channels_last):
    geometry, kernel = CONVOLUTIONS[name]
    torch.manual_seed(0)
    input = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randint(-99, 99, weight_shape(geometry, kernel, 3, 5)).double()  # sums are exact in float32
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    output = convolve(input, weight, None, geometry)
    gradient = torch.randn_like(output)
    of_input, of_weight = convolve_backward(gradient, input, weight, geometry, (True, True))

    forward, backward = forward_gather(geometry, kernel), backward_gather(geometry, kernel)
    packed = pack_weight(weight, forward, geometry.transposed, torch.float64)
    torch.testing.assert_close(gathered(forward, input, packed, output.shape), output)
    packed = pack_weight(weight, backward, geometry.transposed, torch.float64)
    torch.testing.assert_close(gathered(backward, gradient, packed, input.shape), of_input)

    packed = pack_weight(weight, forward, geometry.transposed, torch.float64).detach().clone().requires_grad_()
    (of_packed,) = torch.autograd.grad(gathered(forward, input, packed, output.shape), packed, gradient)
    unpacked = unpack_weight_gradient(of_packed, forward, geometry.transposed, weight)
    assert unpacked.stride() == weight.stride()
    torch.testing.assert_close(unpacked, of_weight)


def test_folded_weights_are_added_in_float32():
    geometry, kernel = CONVOLUTIONS["3x3_upsampled"]
    weight = torch.tensor([1.0, 2**-8, -1.0]).expand(1, 1, 3, 3)
    packed = pack_weight(weight, forward_gather(geometry, kernel), False, torch.bfloat16)
    assert packed.dtype is torch.bfloat16
    assert packed[0, 1, 0, 0].item() == pytest.approx(2**-8 - 1, rel=2**-8)


def test_a_plain_convolution_reads_the_weight_where_it_lies():
    geometry, kernel = CONVOLUTIONS["3x3"]
    weight = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    assert pack_weight(weight, forward_gather(geometry, kernel), False, torch.float32).data_ptr() == weight.data_ptr()
    assert pack_weight(weight, backward_gather(geometry, kernel), False, torch.float32).data_ptr() == weight.data_ptr()
