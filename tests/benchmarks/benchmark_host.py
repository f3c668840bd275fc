"""The CPU as a device of benchmarks/gpu.py, with what its tests send to another process."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import torch

from memory import host_peak_bytes
from on_gpu.cases import attempt
from on_gpu.device import Captured
from timing import wall_seconds


class Host:
    """Does everything that is asked of a device, without recording anything: a replay is the call again."""

    torch_device = torch.device("cpu")
    cache_bytes = 2**13
    usable = True

    def describe(self):
        return {"device": "host", "capability": "none", "driver": "none"}

    def seconds(self, call, count):
        return wall_seconds(call, count)

    def capture(self, call):
        return Captured(call, call())

    def recorder(self):
        return None

    def compiled(self, network, mode):
        return torch.compile(network, backend="eager")

    def peak_bytes(self, call):
        return host_peak_bytes(call)

    def graph_bytes(self):
        return 0

    def kernels(self, call):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        milliseconds = Counter()
        for event in profile.events():
            milliseconds[event.name] += event.self_cpu_time_total / 1000
        return milliseconds

    def free(self):
        pass

    def recover(self):
        torch.compiler.reset()
        return self.usable


class LostHost(Host):
    """One that nothing can run on any more after its first case."""

    usable = False


def here(device, log=None):
    """An executor that stays in this process; ``log`` collects the names of the cases."""

    def execute(case, seconds):
        if log is not None:
            log.append(case.name)
        row, _ = attempt(case, device, seconds)
        return row

    return execute


def no_device():
    raise RuntimeError("no device to be had\nsecond line")


def answer(device, remaining, value):
    return {"value": value, "process": os.getpid(), "device": device.describe()["device"]}


def fail(device, remaining):
    raise torch.OutOfMemoryError("tried to allocate too much")


def die(device, remaining):
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(device, remaining, child_file):
    child = os.fork()
    if child:
        Path(child_file).write_text(str(child))
    time.sleep(600)
