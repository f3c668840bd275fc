"""What convert() did, said so that a person can read it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from ganvas.nn.proof import Proof


@dataclass(frozen=True)
class FusedRun:
    """One run of layers that executes as one.

    ``names``: the qualified names of its modules; ``types``: what it does, in order: their types, and the names of
    functions. ``container``: the module whose forward executes it (empty for the model itself).
    """

    container: str
    names: tuple[str, ...]
    types: tuple[str, ...]


@dataclass(frozen=True)
class Skipped:
    """A layer that could have been part of a run, or a module whose forward stays as it is written, and why."""

    name: str
    type: str
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """The state of a model after :func:`ganvas.convert`.

    ``converted`` names the modules this call changed; ``fused`` and ``skipped`` cover the whole model, with what was
    fused before. ``proof`` is None without an example input. ``str(report)`` is a table.
    """

    converted: tuple[str, ...]
    fused: tuple[FusedRun, ...]
    skipped: tuple[Skipped, ...]
    proof: Proof | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} runs fused, {len(self.skipped)} layers skipped"]
        if self.fused:
            lines += ["", "fused"]
            lines += _table([(", ".join(run.names), " + ".join(run.types)) for run in self.fused])
        by_reason = sorted(self.skipped, key=lambda layer: layer.reason)
        for reason, layers in groupby(by_reason, key=lambda layer: layer.reason):
            lines += ["", f"skipped: {reason}"]
            lines += _table([(layer.name, layer.type) for layer in layers])
        if self.proof is not None:
            lines += ["", str(self.proof)]
        return "\n".join(lines)


def _table(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(first) for first, _ in rows)
    return [f"  {first:<{width}}  {second}" for first, second in rows]
