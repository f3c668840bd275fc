"""The Triton convolutions compiled for GPUs that are not here: they fit, nothing spills, tensor cores multiply."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from ahead_of_time import CAPABILITIES, SHARED_MEMORY, Kernel, compiled

from ganvas.ops.backends.triton import convolution
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending, PendingGradient

STRIDE_2 = Geometry(stride=(2, 2), padding=(1, 1))
LAYERS = {  # geometry, weight, batch, side of the input
    "wide 3x3": (Geometry(padding=(1, 1)), (256, 256, 3, 3), 128, 16),
    "narrow 3x3": (Geometry(padding=(1, 1)), (64, 64, 3, 3), 128, 32),
    "narrower 3x3": (Geometry(padding=(1, 1)), (32, 16, 3, 3), 128, 32),
    "transposed": (STRIDE_2._replace(transposed=True), (128, 64, 4, 4), 128, 16),
    "to images": (STRIDE_2._replace(transposed=True), (64, 3, 4, 4), 128, 32),
    "from images": (STRIDE_2, (64, 3, 4, 4), 128, 64),
    "multiples of 8": (Geometry(padding=(1, 1)), (40, 24, 3, 3), 128, 16),
    "multiples of 4": (Geometry(padding=(1, 1)), (36, 100, 3, 3), 128, 16),
    "multiples of 2": (Geometry(padding=(1, 1)), (130, 34, 3, 3), 128, 16),
    "odd channels": (Geometry(padding=(1, 1)), (100, 33, 3, 3), 128, 16),
}
KINDS = ("forward", "forward_with_statistics", "backward_input")


def launches(*cases: str) -> None:
    """Called in another process (ahead_of_time.py)."""
    for case in cases:
        launch(**json.loads(case))


def launch(layer: str, dtype: str, kind: str, every: bool, activation_first: bool = False, tf32: bool = True) -> None:
    """In every configuration worth measuring, or in the one that is taken without."""
    torch.backends.cudnn.allow_tf32 = tf32
    geometry, weight_shape, batch, side = LAYERS[layer]
    of_dtype = getattr(torch, dtype)

    def pixels(shape: torch.Size) -> torch.Tensor:
        return torch.empty(shape, dtype=of_dtype, device="meta", memory_format=torch.channels_last)

    weight = torch.empty(weight_shape, dtype=of_dtype, device="meta", memory_format=torch.channels_last)
    shape = torch.Size((batch, geometry.in_channels(weight.shape), side, side))
    stored, grad = pixels(shape), pixels(geometry.output_shape(shape, weight.shape))
    per_channel = torch.empty((1, shape[1]), device="meta")
    pending = Pending(
        stored, per_channel, per_channel, per_channel, negative_slope=0.2, activation_first=activation_first
    )
    choices = convolution.configurations(geometry, weight.shape, shape, of_dtype, kind)
    for configuration in choices if every else [None]:
        if kind == "forward":
            bias = weight.new_empty(grad.shape[1])
            convolution.forward(geometry, Pending(stored), weight, bias, configuration=configuration)
        elif kind == "forward_with_statistics":
            arguments = (geometry, pending, weight, None, activation_first, 0.2, 1)
            convolution.forward_with_statistics(*arguments, configuration=configuration)
        else:
            coefficients = [torch.empty((1, grad.shape[1]), device="meta") for _ in range(3)]
            gradient = PendingGradient(grad, grad, *coefficients, 0.2, activation_first)
            convolution.backward_input(geometry, gradient, weight, pending, configuration=configuration)


def check(capability: int, cases: list[dict]) -> list[Kernel]:
    kernels = compiled(__file__, "launches", capability, *map(json.dumps, cases))
    assert kernels
    for kernel in kernels:
        assert kernel.shared <= SHARED_MEMORY[capability], kernel
        assert kernel.spilled == 0, kernel
        if cases[0]["dtype"] != "float32":
            assert kernel.tensor_cores, kernel
    return kernels


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_heuristics_choice_fits_and_reads_as_much_at_a_time_as_divides_the_channels(capability):
    layers = {"wide 3x3": 16, "multiples of 8": 16, "multiples of 4": 8, "multiples of 2": 4}
    case = {"dtype": "bfloat16", "kind": "forward_with_statistics", "every": False}
    cases = [case | {"layer": layer} for layer in layers]
    *kernels, _ = check(capability, [*cases, case | {"layer": "narrow 3x3", "kind": "backward_input"}])
    assert {layer: min(kernel.loads) for layer, kernel in zip(layers, kernels)} == layers


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32", "float32"])
def test_every_configuration_fits(capability, layer, dtype):
    case = {"layer": layer, "dtype": dtype.replace("tf32", "float32"), "tf32": dtype == "tf32", "every": True}
    kinds = product(KINDS, (False, True))
    check(capability, [case | {"kind": kind, "activation_first": first} for kind, first in kinds])
