"""The weight gradient's kernel compiled for GPUs that are not here: it fits, nothing spills, tensor cores multiply."""

from __future__ import annotations

import json

import pytest
import torch
from ahead_of_time import CAPABILITIES, SHARED_MEMORY, compiled

from ganvas.ops.backends.triton.weight_gradient import backward_weight, configurations
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending, PendingGradient

_STRIDE_2 = Geometry(stride=(2, 2), padding=(1, 1))
LAYERS = {  # geometry, weight
    "wide 3x3": (Geometry(padding=(1, 1)), (256, 256, 3, 3)),
    "narrow 3x3": (Geometry(padding=(1, 1)), (64, 64, 3, 3)),
    "narrower 3x3": (Geometry(padding=(1, 1)), (32, 16, 3, 3)),
    "1x1": (Geometry(), (256, 64, 1, 1)),
    "strided": (_STRIDE_2, (128, 64, 4, 4)),
    "transposed": (_STRIDE_2._replace(transposed=True), (128, 64, 4, 4)),
    "upsampled": (Geometry(padding=(1, 1), upsampled=True), (64, 128, 3, 3)),
    "to images": (_STRIDE_2._replace(transposed=True), (64, 3, 4, 4)),
    "from images": (_STRIDE_2, (64, 3, 4, 4)),
    "to logits": (Geometry(), (1, 512, 4, 4)),
    "multiples of 8": (Geometry(padding=(1, 1)), (40, 24, 3, 3)),
    "multiples of 4": (Geometry(padding=(1, 1)), (36, 100, 3, 3)),
    "multiples of 2": (Geometry(padding=(1, 1)), (130, 34, 3, 3)),
    "odd channels": (Geometry(padding=(1, 1)), (100, 33, 3, 3)),
}
OPERANDS = ("stored", "pending", "activation_first")


def launches(*cases: str) -> None:
    """Called in another process (ahead_of_time.py)."""
    for case in cases:
        launch(**json.loads(case))


def launch(layer: str, dtype: str, operand: str, every: bool, tf32: bool = True) -> None:
    """In every configuration worth measuring, or in the one that is taken without."""
    torch.backends.cudnn.allow_tf32 = tf32
    geometry, weight_shape = LAYERS[layer]
    of_dtype = getattr(torch, dtype)

    def pixels(shape: torch.Size) -> torch.Tensor:
        return torch.empty(shape, dtype=of_dtype, device="meta", memory_format=torch.channels_last)

    weight = torch.empty(weight_shape, device="meta")
    stored = pixels(torch.Size((128, geometry.in_channels(weight.shape), 16, 16)))
    grad = pixels(geometry.output_shape(stored.shape, weight.shape))
    input: Pending = Pending(stored)
    if operand != "stored":
        scale, alpha = (torch.empty((1, channels), device="meta") for channels in (stored.shape[1], grad.shape[1]))
        first = operand == "activation_first"
        input = Pending(stored, scale, scale, negative_slope=0.2, activation_first=first)
        grad = PendingGradient(grad, grad, alpha, alpha, alpha, 0.2, first)
    choices = configurations(geometry, weight.shape, stored.shape, of_dtype)
    for configuration in choices if every else [None]:
        backward_weight(geometry, grad, weight, input, configuration=configuration)


def check(capability: int, cases: list[dict]) -> None:
    kernels = compiled(__file__, "launches", capability, *map(json.dumps, cases))
    assert kernels
    for kernel in kernels:
        assert kernel.shared <= SHARED_MEMORY[capability], kernel
        assert kernel.spilled == 0, kernel
        assert kernel.tensor_cores or (cases[0]["dtype"] == "float32" and not cases[0]["tf32"]), kernel


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_heuristics_choice_fits(capability):
    layers = {"narrow 3x3": "pending", "from images": "stored"}
    cases = [{"layer": layer, "dtype": "bfloat16", "operand": operand} for layer, operand in layers.items()]
    check(capability, [case | {"every": False} for case in cases])


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32", "float32"])
def test_every_configuration_fits(capability, layer, dtype):
    case = {"layer": layer, "dtype": dtype.replace("tf32", "float32"), "tf32": dtype == "tf32", "every": True}
    check(capability, [case | {"operand": operand} for operand in OPERANDS])
