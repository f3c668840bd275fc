"""The sides of a comparison: each made and checked by itself, then timed in turns with the others."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from on_gpu.cases import Remaining, Row, reason_of
from on_gpu.device import Call, Device
from timing import interleaved

COMPILE_MODES = ("max-autotune", "max-autotune-no-cudagraphs")
"""With CUDA graphs and without."""
TURNS = 7
LEAST_SECONDS = 0.01
OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
"""Times torch's own error that a result may have."""
TOLERANCES = {torch.bfloat16: torch.finfo(torch.bfloat16).eps, torch.float32: 1e-5}
"""Relative error that it may have in any case: one rounding; in float32 that of a sum of millions of values."""


class WrongResultError(ArithmeticError):
    """A side computes something else than eager."""


@dataclass
class Side:
    """One way to do the work."""

    calls: dict[str, Call]
    """What is timed, by name: ``forward``, ``step``."""
    errors: dict[str, float] = field(default_factory=dict)
    """Of each result to the float64 reference, relative to its norm."""
    values: Row = field(default_factory=dict)
    """What else its part of the row says."""


class Sides:
    """Made one by one: a failure is that side's own."""

    def __init__(self, device: Device, remaining: Remaining, dtype: torch.dtype = torch.bfloat16) -> None:
        self._device = device
        self._remaining = remaining
        self._tolerance = TOLERANCES[dtype]
        self.sides: dict[str, Side] = {}
        self.rows: dict[str, Row] = {}

    def add(self, name: str, make: Callable[[], Side], *, like: str = "eager") -> None:
        """Make a side and call all of its calls once. It is wrong where it is further off than ``like`` allows."""
        begin = time.perf_counter()
        try:
            side = make()
            _check(side.errors, self.sides[like].errors if like in self.sides else {}, self._tolerance)
            for call in side.calls.values():
                call()
        except Exception as error:
            wrong = isinstance(error, WrongResultError)
            self.rows[name] = {
                "status": "wrong" if wrong else "failed",
                "reason": str(error) if wrong else reason_of(error),
            }
        else:
            self.sides[name] = side
            ready = time.perf_counter() - begin
            self.rows[name] = {"status": "measured", "ready_seconds": ready, "errors": side.errors, **side.values}
            return
        self._device.free()  # now that the error holds no more tensors

    def add_compiled(self, make: Callable[[str], Side], *, every_mode: bool) -> None:
        """``torch.compile`` in its modes, those after the first while there is time for one as slow as the last.

        Without ``every_mode`` they are tried only where those before have failed.
        """
        slowest = 0.0
        for mode in COMPILE_MODES:
            if slowest > self._remaining():
                reason = f"{self._remaining():.0f} s were left, the mode before took {slowest:.0f} s"
                self.rows[mode] = {"status": "skipped", "reason": reason}
                continue
            begin = time.perf_counter()
            self.add(mode, functools.partial(make, mode))
            if mode in self.sides and not every_mode:
                return
            slowest = time.perf_counter() - begin

    def time(self, part: str) -> None:
        """All sides in turns: ``<part>_ms``, and the quartiles of how many times eager's speed it is."""
        calls = {name: side.calls[part] for name, side in self.sides.items()}
        if not calls:
            return
        timings = interleaved(
            calls, turns=TURNS, least_seconds=LEAST_SECONDS, warmup=1, seconds_of=self._device.seconds
        )
        for name, timing in timings.items():
            self.rows[name] |= {f"{part}_ms": 1000 * timing.seconds, f"{part}_speedup": timing.spread}

    def status(self) -> Row:
        """Of the whole row: ganvas', or why there is nothing to compare it with."""
        for name in ("ganvas", "eager"):
            row = self.rows[name]
            if row["status"] != "measured":
                return {"status": row["status"], "reason": f"{name}: {row['reason']}"}
        return {"status": "measured"}


def relative_errors(results: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """‖result − exact‖ / ‖exact‖ of each; NaN where the shapes differ or the result is not finite."""
    errors = {}
    for name, value in exact.items():
        result = results[name]
        if result.shape != value.shape:
            errors[name] = float("nan")
        else:
            errors[name] = ((result.double() - value).norm() / value.norm()).item()
    return errors


def _check(errors: Mapping[str, float], of_torch: Mapping[str, float], tolerance: float) -> None:
    for name, error in errors.items():
        factor = OUTPUT_FACTOR if name == "output" else GRADIENT_FACTOR
        allowed = factor * of_torch.get(name, 0.1) + tolerance
        if not error <= allowed:
            raise WrongResultError(f"the error of {name} is {error:.2e}; at most {allowed:.2e} was expected")


def in_turn(calls: Sequence[Call]) -> Call:
    """A call that makes the next one of ``calls`` each time."""
    index = -1

    def call() -> object:
        nonlocal index
        index = (index + 1) % len(calls)
        return calls[index]()

    return call
