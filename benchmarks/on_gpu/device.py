"""What the benchmarks ask of a device: its clock, its memory, its graphs. :class:`Gpu` is the one they are for."""

from __future__ import annotations

import gc
import subprocess
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.autograd import DeviceType

from ganvas.training.step_graph import Recorder, cuda_recorder

Call = Callable[[], Any]


class Captured(NamedTuple):
    """A call recorded once: what it returned, in tensors that each replay fills."""

    replay: Call
    results: Any


class Device(Protocol):
    """Where everything runs."""

    torch_device: torch.device
    cache_bytes: int
    """Of the largest cache: arrays of this size may never come from memory."""

    def describe(self) -> dict[str, object]:
        """Its name, and the versions of what drives it."""

    def seconds(self, call: Call, count: int) -> float:
        """Of ``count`` calls."""

    def capture(self, call: Call) -> Captured:
        """Record a call that has been made before and works on tensors that stay where they are."""

    def recorder(self) -> Recorder | None:
        """For :class:`ganvas.training.step_graph.StepGraph`."""

    def compiled(self, network: nn.Module, mode: str) -> Any:
        """``torch.compile`` in one of its modes."""

    def peak_bytes(self, call: Call) -> int:
        """The highest sum of live tensors' bytes during a call, over what lived before."""

    def graph_bytes(self) -> int:
        """Memory that CUDA graphs hold for themselves: the peak of a replay does not have it."""

    def kernels(self, call: Call) -> dict[str, float]:
        """Milliseconds in each kernel that a call runs, by name."""

    def free(self) -> None:
        """Give back the memory of what is no longer used, as after running out of it."""

    def recover(self) -> bool:
        """Forget what was compiled and free memory; False if nothing can run here any more."""


class Gpu:
    """The first NVIDIA GPU that torch sees."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", 0)
        torch.cuda.set_device(self.torch_device)
        torch.backends.cudnn.benchmark = True  # torch at its best: static shapes
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.cache_bytes = int(getattr(properties, "L2_cache_size", 0)) or 64 * 2**20
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._capture_failed = False

    def describe(self) -> dict[str, object]:
        properties = torch.cuda.get_device_properties(self.torch_device)
        return {
            "device": properties.name,
            "capability": "{}.{}".format(*torch.cuda.get_device_capability(self.torch_device)),
            "memory_bytes": properties.total_memory,
            "cache_bytes": self.cache_bytes,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }

    def seconds(self, call: Call, count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def capture(self, call: Call) -> Captured:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # as torch's notes on CUDA graphs ask for
            call()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # One pool for all, and one stream, without which they would share none of it: a graph's results are read
            # before the next one is replayed.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                results = call()
        except Exception:
            self._capture_failed = True
            raise
        return Captured(graph.replay, results)

    def recorder(self) -> Recorder | None:
        return cuda_recorder(self.torch_device)

    def compiled(self, network: nn.Module, mode: str) -> Any:
        return torch.compile(network, mode=mode, dynamic=False)

    def peak_bytes(self, call: Call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def graph_bytes(self) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(segment["total_size"] for segment in segments if segment["segment_pool_id"] != (0, 0))

    def kernels(self, call: Call) -> dict[str, float]:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        milliseconds: Counter[str] = Counter()
        for event in profile.events():
            if event.device_type == DeviceType.CUDA:
                milliseconds[event.name] += event.time_range.elapsed_us() / 1000
        return dict(milliseconds)

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def recover(self) -> bool:
        try:
            torch.compiler.reset()
            self.free()
            torch.cuda.synchronize()
        except RuntimeError:  # after an illegal access, say, nothing else is to be had
            return False
        self._pool = torch.cuda.graph_pool_handle()
        return not self._capture_failed  # which torch's allocator does not forget


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.split("\n")[0].strip() or "unknown"
