"""Which way is the fastest on a GPU, among those that give the right result."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import metadata
from typing import TypeVar

import torch
from torch import Tensor

from ganvas.ops import tuning
from ganvas.ops.backends.gpu.compilation import compile_ahead
from ganvas.ops.backends.trial import Way

_log = logging.getLogger("ganvas")
_Choice = TypeVar("_Choice")

TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Distance to torch's result, through its norm, at which a way counts as wrong. TF32 stays within that of float32, a
rounding of each value within those of the others; what a compiler got wrong is off by about 1."""

_ROUNDS = 5
_ROUND_SECONDS = 1e-3  # at most, with what the processor takes
_MOST_CALLS = 100  # whose kernels a GPU's queue has room for
_QUEUEING_CYCLES = int(2 * _ROUND_SECONDS * 2e9)
"""Of a GPU's clock, for twice as long as a round's calls take to launch; longer where the clock is slower."""


@lru_cache
def device_name(index: int) -> str:
    """What timings hold for: the GPU, its driver's CUDA, torch's CUDA and Triton."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    cudnn = torch.backends.cudnn.version()
    return f"{torch.cuda.get_device_name(index)}, CUDA {torch.version.cuda}, cuDNN {cudnn}, triton {triton}"


def decided(key: object, measure: Callable[[], _Choice], unmeasured: _Choice, otherwise: _Choice) -> _Choice:
    """A choice between ways on a GPU, kept in :data:`ganvas.ops.tuning.decisions`.

    Args:
        measure: chooses.
        unmeasured: the choice with ``GANVAS_AUTOTUNE=0``, and while a CUDA graph is captured: nothing can be measured
            then. It is not kept, since the next call may not be captured.
        otherwise: the choice where measuring takes more memory than there is.
    """
    if not tuning.applies(0):
        return tuning.decided(key, unmeasured)
    if torch.cuda.is_current_stream_capturing():
        return unmeasured
    try:
        return tuning.decided(key, measure())
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()  # not before: the exception held what had been allocated
    _log.warning("there is no memory for measuring %s, which is chosen without it in this process", key)
    return tuning.decided(key, otherwise)


def fastest(case: tuning.Case, natives: Mapping[str, Way], torchs: Way, device: torch.device) -> tuning.Entry:
    """The entry of ``case``: the fastest right one of ``natives`` (configuration → way) beside torch's way.

    A way that raises or is wrong is left out, and the log says so: a kernel that a compiler got wrong, or that the
    device cannot hold, must not enter a network.

    Raises:
        torch.OutOfMemoryError: torch's way does not fit, or none of the right ones: no choice to be remembered, since
            another time there may be more memory.
    """
    right, lacking = {}, ""
    with torch.cuda.device(device):
        expected = torchs()
        if device.type == "cuda" and len(natives) > 1:
            compile_ahead(natives.values(), device)
        for name, way in natives.items():
            try:
                if _is_right(case, name, way, expected):
                    right[name] = way
            except torch.OutOfMemoryError as error:
                lacking = str(error)
                _log.warning("%s of %s does not fit into memory and is left out", name, case)
        if lacking and not right:
            raise torch.OutOfMemoryError(lacking)
        times = _time_in_turns({**right, "": torchs})
    torch_ms = times.pop("")
    if not times:
        return tuning.Entry(case, None, torch_ms)
    best = min(times, key=times.__getitem__)
    return tuning.Entry(case, times[best], torch_ms, best)


def _is_right(case: tuning.Case, name: str, way: Way, expected: tuple[Tensor, ...]) -> bool:
    try:
        distances = [_distance(ours, theirs) for ours, theirs in zip(way(), expected)]
        distance = next(filter(math.isnan, distances), max(distances))  # max alone passes over a NaN
        bound = TOLERANCE[expected[0].dtype if expected[0].dtype in TOLERANCE else torch.float32]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a driver raises: torch's way remains
        _log.warning("%s of %s is left out: %s: %s", name, case, type(error).__name__, error)
        return False
    if not distance <= bound:
        _log.warning(
            "%s of %s is wrong by %.2g, through the norm of torch's result, and is left out", name, case, distance
        )
        return False
    return True


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-30))


def _time_in_turns(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The GPU's milliseconds for a call: medians over rounds, in which each way is called several times in a row.

    As in a step that a CUDA graph holds, which those of the training are: what the processor takes to launch kernels is
    no part of it. Of a small layer that takes several times as long as the kernels do, and would decide.
    """
    calls = {
        name: max(1, min(_MOST_CALLS, round(1000 * _ROUND_SECONDS / max(_milliseconds(way, 1), 1e-4))))
        for name, way in ways.items()
    }
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for name, way in ways.items():
            rounds[name].append(_milliseconds(way, calls[name], queued=True))
    return {name: round(statistics.median(of_way), 6) for name, of_way in rounds.items()}


def _milliseconds(way: Callable[[], object], calls: int, *, queued: bool = False) -> float:
    """Of a call. ``queued``: launched while the GPU is busy with something else, so that it waits for no launch."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if queued:
        torch.cuda._sleep(_QUEUEING_CYCLES)  # there is no public call that keeps a GPU busy for so long
    begin.record()
    for _ in range(calls):
        way()
    end.record()
    end.synchronize()
    return max(begin.elapsed_time(end) / calls, 1e-6)
