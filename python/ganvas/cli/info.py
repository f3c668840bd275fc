"""``ganvas info``: what is installed and what would run."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch
from tyro.conf import FlagCreatePairsOff

import ganvas
from ganvas import models, ops
from ganvas.cli.output import say, say_pairs, say_table

# An input of each operation as training gives it: feature maps, logits.
_EXAMPLES = {
    "conv_bn_leaky_relu": (2, 8, 4, 4),
    "batch_norm_leaky_relu": (2, 8, 4, 4),
    "discriminator_loss": (8,),
    "generator_loss": (8,),
}


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show version, hardware, and for each fused operation which backend would run here, and why not the others."""

    models: FlagCreatePairsOff[bool] = False
    """List the networks that --model accepts, with their options, instead."""
    tuning: FlagCreatePairsOff[bool] = False
    """List the convolutions and linear layers that were measured here, and what was chosen for them, instead."""

    def execute(self) -> None:
        if self.models:
            say_pairs({name: models.describe(name) for name in models.names()})
            return
        if self.tuning:
            _say_tuning()
            return
        say_pairs(_software())
        say("")
        say_pairs(_choices())


def _say_tuning() -> None:
    measuring = "on" if ops.tuning.applies(torch.get_num_threads()) else "off (GANVAS_AUTOTUNE=0)"
    say_pairs({"file": ops.tuning.path(), "measuring": measuring})
    entries = ops.tuning.entries()
    if not entries:
        say("\nNothing is remembered for this processor and these versions: training measures each shape once.")
        return
    say("")
    names = [name.replace("_", " ") for name in ops.tuning.Case._fields]
    say_table(
        [*names, "native ms", "torch ms", "choice"],
        [[*map(str, e.case), _milliseconds(e.native_ms), _milliseconds(e.torch_ms), _chosen(e)] for e in entries],
    )


def _milliseconds(value: float | None) -> str:
    return "wrong" if value is None else f"{value:.3f}"


def _chosen(entry: ops.tuning.Entry) -> str:
    return f"native {entry.configuration}".strip() if entry.native else "torch"


def _software() -> dict[str, str]:
    threads = torch.get_num_threads()
    return {
        "ganvas": ganvas.__version__,
        "native module": _native(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{platform.machine()}, {threads} threads",
        "gpu": ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())) or "none",
    }


def _native() -> str:
    try:
        from ganvas import _native  # type: ignore[attr-defined]  # built by CMake
    except ImportError as error:
        return f"not built ({error}); pip install builds it"
    built = _native.build_info()
    try:
        running = _native.selected_isa()
    except ValueError as error:  # GANVAS_CPU_ISA has no such value
        running = str(error)
    cuda = f"CUDA kernels for {built['cuda']}" if built["cuda"] else "no CUDA kernels"
    return f"{built['compiler']}; CPU kernels for {', '.join(built['cpu_isas'])}, here {running}; {cuda}"


def _choices() -> dict[str, str]:
    """``operation dtype device`` → the backend that runs, and why those before it do not."""
    forced = os.environ.get("GANVAS_BACKEND")
    rows: dict[str, str] = {"operation": "backend"}
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for operation, shape in _EXAMPLES.items():
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16):
                example = torch.empty(shape, dtype=dtype, device=device)
                name = f"{operation} {str(dtype).removeprefix('torch.')} {device}"
                rows[name] = _choice(ops.explain(operation, example), forced)
    return rows


def _choice(refusals: dict[str, str | None], forced: str | None) -> str:
    if forced:
        refusal = refusals.get(forced, "there is no such backend")
        return f"{forced} (GANVAS_BACKEND)" + (f": raises, {refusal}" if refusal else "")
    chosen = next(name for name, refusal in refusals.items() if refusal is None)
    reasons = [f"not {name}: {refusal}" for name, refusal in refusals.items() if refusal is not None]
    return "; ".join([chosen, *reasons])
