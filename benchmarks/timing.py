"""Interleaved timing: candidates take turns in one process, so that a drift of the machine's speed hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Of one candidate: median seconds of a call, and its ratio to the first candidate's, turn by turn."""

    seconds: float
    speedup: float  # median over turns of first candidate's time / this one's
    spread: tuple[float, float]  # quartiles of that ratio


def wall_seconds(call: Callable[[], object], count: int) -> float:
    """Of ``count`` calls, by the host's clock."""
    begin = _now()
    for _ in range(count):
        call()
    return _now() - begin


def interleaved(
    candidates: dict[str, Callable[[], object]],
    *,
    turns: int = 15,
    least_seconds: float = 0.005,
    warmup: int = 2,
    seconds_of: Callable[[Callable[[], object], int], float] = wall_seconds,
) -> dict[str, Timing]:
    """Times each candidate once a turn; short calls are repeated within a turn until ``least_seconds`` have passed.

    The first candidate is the baseline of the ratios. ``seconds_of`` tells how long so many calls take.
    """
    repeats = {}
    for name, call in candidates.items():
        for _ in range(warmup):
            call()
        repeats[name] = max(1, int(least_seconds / max(seconds_of(call, 1), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(turns):
        # Each turn in another order: whoever runs first after a slow candidate finds another cache.
        names = list(candidates)[turn % len(candidates) :] + list(candidates)[: turn % len(candidates)]
        for name in names:
            seconds[name].append(seconds_of(candidates[name], repeats[name]) / repeats[name])
    baseline = seconds[next(iter(candidates))]
    result = {}
    for name, measured in seconds.items():
        ratios = sorted(first / this for first, this in zip(baseline, measured))
        low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
        result[name] = Timing(statistics.median(measured), statistics.median(ratios), (low, high))
    return result


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
