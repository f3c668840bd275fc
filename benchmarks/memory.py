"""Memory of a training step.

What autograd keeps between forward and backward, the highest sum of live tensors, and what the process holds at most,
scratch memory of either side included.
"""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import ganvas
from ganvas import _native as native
from shapes import MapShape


def chain(channels: int, layers: int = 4) -> nn.Sequential:
    """conv3×3, BatchNorm, LeakyReLU, ``layers`` times over."""
    blocks: list[nn.Module] = []
    for _ in range(layers):
        blocks += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.LeakyReLU(0.2)]
    return nn.Sequential(*blocks)


def activation_bytes(shape: MapShape, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the distinct storages that autograd keeps, parameters left out."""
    return {name: kept_bytes(model, x) for name, (model, x) in _candidates(shape, dtype).items()}


def peak_bytes(shape: MapShape, dtype: torch.dtype) -> dict[str, int]:
    """Highest sum of live tensor bytes during forward + backward, over what lived before the step."""
    return _of_a_step(shape, dtype, host_peak_bytes)


def resident_peak_bytes(shape: MapShape, dtype: torch.dtype) -> dict[str, int]:
    """The same of the process's resident memory: with the scratch memory of ganvas and of oneDNN. Linux only."""
    return _of_a_step(shape, dtype, process_peak_bytes)


def _of_a_step(shape: MapShape, dtype: torch.dtype, measured: Callable[[Callable[[], object]], int]) -> dict[str, int]:
    peaks = {}
    for name, (model, x) in _candidates(shape, dtype).items():
        model(x).sum().backward()  # gradients exist already in any step but the first
        peaks[name] = measured(lambda model=model, x=x: model(x).sum().backward())
    return peaks


def _candidates(shape: MapShape, dtype: torch.dtype) -> dict[str, tuple[nn.Module, Tensor]]:
    eager = chain(shape.channels).to(dtype, memory_format=torch.channels_last)
    fused = copy.deepcopy(eager)
    ganvas.convert(fused)
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    return {"eager": (eager, x), "ganvas": (fused, x)}


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps of ``model(x)``, parameters left out."""
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        loss = model(x).sum()
    del loss
    return sum(kept.values())


def host_peak_bytes(call: Callable[[], object]) -> int:
    """Highest sum of live tensor bytes on the CPU during a call, over what lived before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    live = highest = 0
    records = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for record in sorted(records, key=lambda event: event.start_ns()):
        live += record.nbytes()
        highest = max(highest, live)
    return highest


def process_peak_bytes(call: Callable[[], object]) -> int:
    """Highest resident memory of this process during a call, over what it held before; idle memory is given back.

    The least of three calls: how well the heap's gaps are filled changes from call to call.
    """
    peaks = []
    for _ in range(3):
        gc.collect()
        native.release_workspace()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the highest is now the present
        before = _status_bytes("VmRSS")
        call()
        peaks.append(_status_bytes("VmHWM") - before)
    return min(peaks)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
