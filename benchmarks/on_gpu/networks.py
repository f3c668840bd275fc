"""Convolution, BatchNorm and LeakyReLU, one layer or several: forward and training step in bfloat16."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ganvas
from memory import kept_bytes
from on_gpu import floors
from on_gpu.cases import Remaining, Row
from on_gpu.device import Device
from on_gpu.sides import Side, Sides, in_turn, relative_errors
from shapes import LayerShape, MapShape
from workloads import conv_layer, random_map

DTYPE = torch.bfloat16
_MOST_COPIES = 16
Pair = tuple[Tensor, Tensor]  # input and the output's gradient


def measure_network(device: Device, remaining: Remaining, layers: Sequence[LayerShape], compiled: bool) -> Row:
    """Milliseconds of every side with its error, the floors, and the memory of eager and ganvas.

    Convolution weights are bfloat16, the norm's parameters float32. Each call has another input where one would stay
    in the cache; a captured graph for each. ``torch.compile``'s graphs copy their inputs into memory of their own, the
    mode without graphs does not.
    """
    torch.manual_seed(0)
    plain = network_of(layers).to(device.torch_device)
    fused = copy.deepcopy(plain)
    ganvas.convert(fused)
    inputs = _inputs(layers, device)
    networks = {"eager": plain, "ganvas": fused}
    sides = Sides(device, remaining)
    _add_sides(sides, networks, inputs, device, compiled)
    for part in ("forward", "step"):
        sides.time(part)
    memory = {name: network for name, network in networks.items() if name in sides.sides}
    return {
        **sides.status(),
        "compiled": compiled,
        "channels": max(max(layer.in_channels, layer.out_channels) for layer in layers),
        "copies": len(inputs),
        "sides": sides.rows,
        "floor": {part: getattr(floors, part)(layers, DTYPE.itemsize)._asdict() for part in ("forward", "step")},
        "kept_bytes": {name: kept_bytes(network, inputs[0][0]) for name, network in memory.items()},
        "peak_bytes": {
            name: device.peak_bytes(functools.partial(train, subject(network), *inputs[0]))
            for name, network in memory.items()
        },
    }


def _add_sides(
    sides: Sides, networks: dict[str, nn.Sequential], inputs: Sequence[Pair], device: Device, compiled: bool
) -> None:
    """Checked against float64, whose results are gone before anything is timed."""
    exact = _exact(networks["eager"], *inputs[0])
    for name, network in networks.items():
        sides.add(name, functools.partial(_called, subject(network), inputs, exact))
        sides.add(f"{name} graph", functools.partial(_captured, subject(network), inputs, exact, device))
    if compiled:
        sides.add_compiled(
            lambda mode: _compiled(networks["eager"], mode, inputs, exact, device), every_mode=True
        )  # fmt: skip


def network_of(layers: Sequence[LayerShape]) -> nn.Sequential:
    """Plain torch, channels_last, in training."""
    network = nn.Sequential(*(module for layer in layers for module in conv_layer(layer)))
    for module in network:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.to(DTYPE)
    return network.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Subject:
    """What is called, and the parameters it has gradients for."""

    call: Callable[[Tensor], Tensor]
    parameters: dict[str, nn.Parameter]


def subject(network: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> Subject:
    """``network``, or something else with its parameters."""
    return Subject(call or network, {f"gradient of {name}": value for name, value in network.named_parameters()})


def train(network: Subject, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Forward and backward: the output, and the gradients of input and parameters, by name."""
    output = network.call(x)
    grads = torch.autograd.grad(output, (x, *network.parameters.values()), grad)
    return {"output": output.detach(), **dict(zip(("gradient of the input", *network.parameters), grads))}


@torch.no_grad()
def evaluate(network: Subject, x: Tensor) -> Tensor:
    """Forward with the batch's statistics, nothing kept for backward."""
    return network.call(x)


def _inputs(layers: Sequence[LayerShape], device: Device) -> list[Pair]:
    """So many that none is in the cache any more when its turn comes."""
    first, last = layers[0], layers[-1]
    x = MapShape(first.batch, first.in_channels, first.size)
    grad = MapShape(last.batch, last.out_channels, last.out_size)
    size = sum(shape.batch * shape.channels * shape.size**2 for shape in (x, grad)) * DTYPE.itemsize
    copies = min(_MOST_COPIES, math.ceil(device.cache_bytes / size) + 1)
    return [
        (random_map(x, DTYPE, device.torch_device).requires_grad_(), random_map(grad, DTYPE, device.torch_device))
        for _ in range(copies)
    ]


def _exact(plain: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):  # not worth a search
        return train(subject(copy.deepcopy(plain).double()), x.detach().double().requires_grad_(), grad.double())


def _called(network: Subject, inputs: Sequence[Pair], exact: dict[str, Tensor]) -> Side:
    errors = relative_errors(train(network, *inputs[0]), exact)
    forward = in_turn([functools.partial(evaluate, network, x) for x, _ in inputs])
    step = in_turn([functools.partial(train, network, *pair) for pair in inputs])
    return Side({"forward": forward, "step": step}, errors)


def _captured(network: Subject, inputs: Sequence[Pair], exact: dict[str, Tensor], device: Device) -> Side:
    evaluate(network, inputs[0][0])
    train(network, *inputs[0])
    first = device.capture(functools.partial(train, network, *inputs[0]))
    first.replay()
    errors = relative_errors(first.results, exact)
    replays = [first.replay]
    del first  # its results' memory serves the other graphs too
    replays += [device.capture(functools.partial(train, network, *pair)).replay for pair in inputs[1:]]
    forward = [device.capture(functools.partial(evaluate, network, x)).replay for x, _ in inputs]
    return Side({"forward": in_turn(forward), "step": in_turn(replays)}, errors)


def _compiled(plain: nn.Module, mode: str, inputs: Sequence[Pair], exact: dict[str, Tensor], device: Device) -> Side:
    network = copy.deepcopy(plain)
    compiled = device.compiled(network, mode)

    def call(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the call before returned may be overwritten
        return compiled(x)

    return _called(subject(network, call), inputs, exact)
