"""What is measured, in which order, and for which share of the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from on_gpu import choices, kernels
from on_gpu.cases import Case, Stage
from on_gpu.models import measure_model
from on_gpu.networks import measure_network
from shapes import GPU_ACTIVATIONS, GPU_CHAINS, GPU_LAYERS, LayerShape, MapShape

SECTIONS = ("machine", "kernels", "layers", "chains", "models", "choices")
COMPILE_SECONDS = 20.0
"""No case with torch.compile is begun with less."""
_CHAIN_LENGTH = 4


class Model(NamedTuple):
    """A network of the registry and its batch."""

    name: str
    batch: int
    options: Mapping[str, Any]

    def __str__(self) -> str:
        conditional = "conditional " if self.options.get("num_classes") and self.name == "dcgan" else ""
        return f"{conditional}{self.name} {self.options['size']}x{self.options['size']} batch {self.batch}"


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is."""

    copy_bytes: int = 2**30
    matmul_side: int = 8192
    activations: Mapping[str, Sequence[MapShape]] = field(default_factory=lambda: GPU_ACTIVATIONS)
    logits: int = 64 * 2**20
    losses: Sequence[str] = ("bce", "hinge")
    layers: Sequence[LayerShape] = GPU_LAYERS
    chains: Sequence[MapShape] = GPU_CHAINS
    models: Sequence[Model] = (
        Model("dcgan", 128, {"size": 64, "channels": 3}),
        Model("resnet", 512, {"size": 32, "channels": 3}),
        Model("dcgan", 128, {"size": 32, "channels": 3, "num_classes": 10}),
        Model("dcgan", 512, {"size": 64, "channels": 3}),
    )
    shapes_with_kernels: int = 12


def stages(sizes: Sizes, only: str | None = None) -> list[Stage]:
    """All of them, or those of one section after the machine's, which every floor needs."""
    chains = {f"4 × 3x3 {shape}": _chain(shape) for shape in sizes.chains}
    layers = {str(layer): [layer] for layer in sizes.layers}
    runs = {**chains, **layers}
    shown = list(runs)[: sizes.shapes_with_kernels]
    plan = [
        Stage("machine", 0.06, _machine(sizes)),
        Stage("kernels", 0.06, _kernels(sizes)),
        Stage("layers", 0.24, _networks(layers, compiled=False)),
        Stage("chains", 0.07, _networks(chains, compiled=False)),
        Stage("models", 0.14, _models(sizes, compiled=False)),
        Stage("models", 0.19, _models(sizes, compiled=True)),
        Stage("chains", 0.06, _networks(chains, compiled=True)),
        Stage("layers", 0.13, _networks(layers, compiled=True)),
        Stage(
            "choices",
            0.05,
            [
                Case("backends", choices.measure_backends),
                Case("tuning", choices.measure_tuning),
                *(Case(name, choices.measure_kernels, {"layers": runs[name]}) for name in shown),
            ],
        ),
    ]
    return [stage for stage in plan if only in (None, stage.section) or stage.section == "machine"]


def _machine(sizes: Sizes) -> list[Case]:
    return [
        Case("versions", kernels.measure_versions),
        Case("copy", kernels.measure_copy, {"size": sizes.copy_bytes}),
        Case("matmul", kernels.measure_matmul, {"side": sizes.matmul_side}),
    ]


def _kernels(sizes: Sizes) -> list[Case]:
    maps = [
        Case(f"batch norm {shape} {dtype}", kernels.measure_batch_norm, {"shape": shape, "dtype": dtype})
        for dtype, shapes in sizes.activations.items()
        for shape in shapes
    ]
    of_count = {"count": sizes.logits}
    losses = [
        Case(f"{kind} loss of 2 × {sizes.logits}", kernels.measure_discriminator_loss, {"kind": kind, **of_count})
        for kind in sizes.losses
    ]
    return [*maps, *losses]


def _networks(runs: Mapping[str, Sequence[LayerShape]], *, compiled: bool) -> list[Case]:
    return [_case(name, measure_network, {"layers": layers}, compiled) for name, layers in runs.items()]


def _models(sizes: Sizes, *, compiled: bool) -> list[Case]:
    return [
        _case(
            str(model), measure_model, {"model": model.name, "batch": model.batch, "options": model.options}, compiled
        )
        for model in sizes.models
    ]


def _case(name: str, measure: Any, arguments: dict[str, Any], compiled: bool) -> Case:
    arguments = {**arguments, "compiled": compiled}
    return Case(name, measure, arguments, COMPILE_SECONDS) if compiled else Case(name, measure, arguments)


def _chain(shape: MapShape) -> list[LayerShape]:
    return [LayerShape("3x3", shape.batch, shape.channels, shape.channels, shape.size)] * _CHAIN_LENGTH
