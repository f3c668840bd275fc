"""What ran: the backend that is chosen for each operation, and the kernels that a step of each shape launches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

import ganvas
from on_gpu.cases import Remaining, Row
from on_gpu.device import Device
from on_gpu.networks import DTYPE, network_of, subject, train
from shapes import LayerShape, MapShape
from workloads import random_map

_EXAMPLES = {  # as in `ganvas info`: an input of each operation
    "batch_norm_leaky_relu": (2, 8, 4, 4),
    "conv_bn_leaky_relu": (2, 8, 4, 4),
    "discriminator_loss": (8,),
    "generator_loss": (8,),
}


def measure_backends(device: Device, remaining: Remaining) -> Row:
    """For each operation None for the backends that can run it, the first being the choice, or why they do not."""
    return {
        "operations": {
            f"{operation} {str(dtype).removeprefix('torch.')}": ganvas.ops.explain(
                operation, torch.empty(shape, dtype=dtype, device=device.torch_device)
            )
            for operation, shape in _EXAMPLES.items()
            for dtype in (torch.float32, torch.bfloat16)
        }
    }


def measure_tuning(device: Device, remaining: Remaining) -> Row:
    """All choices that were made by measurement, as ``ganvas info --tuning`` lists them."""
    return {"entries": [_plain(entry) for entry in ganvas.ops.tuning.entries()]}


def measure_kernels(device: Device, remaining: Remaining, layers: Sequence[LayerShape]) -> Row:
    """Milliseconds in each kernel of ganvas' step."""
    torch.manual_seed(0)
    first, last = layers[0], layers[-1]
    network = network_of(layers).to(device.torch_device)
    ganvas.convert(network)
    x = random_map(MapShape(first.batch, first.in_channels, first.size), DTYPE, device.torch_device).requires_grad_()
    grad = random_map(MapShape(last.batch, last.out_channels, last.out_size), DTYPE, device.torch_device)
    step = functools.partial(train, subject(network), x, grad)
    for _ in range(2):  # the kernels are chosen in the first
        step()
    kernels = device.kernels(step)
    return {"kernels": dict(sorted(kernels.items(), key=lambda item: -item[1]))}


def _plain(value: Any) -> Any:
    """A named tuple as a dictionary, those within it too."""
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    return value
