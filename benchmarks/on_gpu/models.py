"""Whole training steps: images per second and peak memory of models of the registry, bfloat16 by autocast."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ganvas.training.step_graph import WARM_UP_STEPS, Recorder, StepGraph
from on_gpu.cases import Remaining, Row
from on_gpu.device import Device
from on_gpu.sides import COMPILE_MODES, Side, Sides, WrongResultError
from shapes import MapShape
from workloads import TrainingStep, plain_networks, random_map, registered_networks

DTYPE = torch.bfloat16
LOSS_TOLERANCE = 0.1
"""Between the losses of eager's first step and another side's, relative to 1 or to the loss where that is larger."""


def measure_model(
    device: Device, remaining: Remaining, model: str, batch: int, options: dict[str, Any], compiled: bool
) -> Row:
    """A step of every side, on images that lie on the device; a GAN's noise is drawn in the step.

    The graphs are those of :class:`ganvas.training.step_graph.StepGraph`, which the training uses. The peak of
    ``torch.compile`` has all that its own graphs hold.
    """
    torch.manual_seed(0)
    networks = [network.to(device.torch_device) for network in registered_networks(model, **options)]
    plain = plain_networks(networks)
    batches = _batch(device, batch, options, labelled=len(networks) == 1 or options.get("num_classes") is not None)
    sides, of_eager = Sides(device, remaining), dict[str, float]()

    def side(networks: Sequence[nn.Module], recorder: Recorder | None = None) -> Side:
        return _side(networks, batches, recorder, of_eager)

    def compiled_side(mode: str) -> Side:
        return side([device.compiled(network, mode) for network in copy.deepcopy(plain)])

    for name, candidates in (("eager", plain), ("ganvas", networks)):
        sides.add(name, lambda candidates=candidates: side(copy.deepcopy(candidates)))
        sides.add(f"{name} graph", lambda candidates=candidates: side(copy.deepcopy(candidates), device.recorder()))
    held = device.graph_bytes()
    if compiled:
        sides.add_compiled(compiled_side, every_mode=False)
    held = device.graph_bytes() - held
    sides.time("step")
    for name, made in sides.sides.items():
        row = sides.rows[name]
        row["images_per_second"] = 1000 * batch / row["step_ms"]
        if not all(math.isfinite(loss.item()) for loss in made.calls["step"]().values()):
            row |= {"status": "wrong", "reason": "a loss has become infinite or NaN"}
    steps = {
        name: sides.sides[name].calls["step"] for name in ("eager", *COMPILE_MODES, "ganvas") if name in sides.sides
    }
    peaks = {name: device.peak_bytes(step) for name, step in steps.items()}
    if COMPILE_MODES[0] in peaks:
        peaks[COMPILE_MODES[0]] += held
    return {
        **sides.status(),
        "compiled": compiled,
        "batch": batch,
        "sides": sides.rows,
        "peak_bytes": peaks,
    }


def _batch(device: Device, batch: int, options: dict[str, Any], *, labelled: bool) -> tuple[Tensor, Tensor | None]:
    images = random_map(MapShape(batch, options["channels"], options["size"]), torch.float32, device.torch_device)
    return images, torch.arange(batch, device=device.torch_device) % 10 if labelled else None


def _side(
    networks: Sequence[nn.Module],
    batch: tuple[Tensor, Tensor | None],
    recorder: Recorder | None,
    of_eager: dict[str, float],
) -> Side:
    """Warmed up, and recorded where there is a recorder. The first losses are compared with eager's, or become them."""
    said: list[str] = []
    step = TrainingStep(networks, DTYPE)
    taken = StepGraph(step, recorder, modules=step.networks, optimizers=step.optimizers, say=said.append)

    def call() -> dict[str, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()  # what the step before returned may be overwritten
        return taken(*batch)

    torch.manual_seed(1)  # the same noise for every side
    losses = {name: loss.item() for name, loss in call().items()}
    for name, loss in losses.items():
        expected = of_eager.setdefault(name, loss)
        if not abs(loss - expected) <= LOSS_TOLERANCE * max(1.0, abs(expected)):
            raise WrongResultError(f"{name} of the first step is {loss:.4f}, eager's {expected:.4f}")
    for _ in range(WARM_UP_STEPS):
        call()
    return Side({"step": call}, values={"first_losses": losses, **({"note": said[0]} if said else {})})
