"""Kernels that are compiled in threads before they are measured. In other processes, without Triton's interpreter."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from ahead_of_time import compiled

from ganvas.ops.backends.gpu import compilation
from ganvas.ops.backends.triton import convolution
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending

KERNELS = 2
GPU = torch.device("cuda", 1)


class Compiler:
    """Counts how often Triton's compiler begins anew, by thread, and which GPUs are made current."""

    def __init__(self) -> None:
        from triton.compiler.compiler import ASTSource

        self.threads: list[int] = []
        self.devices: set[torch.device] = set()
        begin = ASTSource.make_ir

        def counted(*arguments):
            self.threads.append(threading.get_ident())
            return begin(*arguments)

        ASTSource.make_ir = counted
        torch.cuda.device = self.device

    def device(self, device):
        self.devices.add(device)
        return nullcontext()


def loaded() -> int:
    """Kernels that have been launched: the stand-in for a GPU has had to load them."""
    from triton.runtime import driver

    return len(driver.active.kernels)


def ways():
    """A convolution in some configurations, none of them compiled."""
    geometry, weight = Geometry(padding=(1, 1)), torch.empty(32, 16, 3, 3, device="meta", dtype=torch.bfloat16)
    weight = weight.contiguous(memory_format=torch.channels_last)
    stored = torch.empty(32, 16, 8, 8, device="meta", dtype=torch.bfloat16, memory_format=torch.channels_last)
    found = convolution.configurations(geometry, weight.shape, stored.shape, stored.dtype, "forward")[:KERNELS]
    assert len(found) == KERNELS

    def way(configuration):
        return lambda: (convolution.forward(geometry, Pending(stored), weight, None, configuration=configuration),)

    return [way(one) for one in found]


def in_threads():
    os.sched_getaffinity = lambda process: {0, 1}
    compiler, of_case = Compiler(), ways()
    compilation.compile_ahead([*of_case, of_case[0]], GPU)
    assert loaded() == 0
    assert len(compiler.threads) == KERNELS
    assert threading.get_ident() not in compiler.threads
    assert compiler.devices == {GPU}
    for way in of_case:
        way()
    assert loaded() == len(compiler.threads) == KERNELS
    forget(convolution)
    for way in of_case:
        way()
    assert loaded() == 2 * KERNELS
    assert len(compiler.threads) == KERNELS  # the others are found on the disk


def forget(of) -> None:
    """What has been compiled in this process."""
    sys.modules[of.gather_convolution.__module__]._kernel.device_caches.clear()


def failing():
    from triton.compiler.compiler import ASTSource

    compiler, (first, second) = Compiler(), ways()
    begin = ASTSource.make_ir

    def fails_once(*arguments):
        if not compiler.threads:
            compiler.threads.append(0)
            raise RuntimeError("PassManager::run failed")
        return begin(*arguments)

    def raises():
        raise torch.OutOfMemoryError("CUDA out of memory")

    ASTSource.make_ir = fails_once
    os.sched_getaffinity = lambda process: {0}
    compilation.compile_ahead([raises, first, second], GPU)
    assert len(compiler.threads) == 2
    first()
    second()
    assert loaded() == 2
    assert len(compiler.threads) == 3


def meanwhile_elsewhere():
    """Another thread launches a kernel while the ways are called; a hook that there was hears of it alone."""
    import triton

    heard = []

    def heard_of(**what):
        heard.append(what["repr"])

    triton.knobs.runtime.jit_cache_hook = heard_of
    compiler, (first, second) = Compiler(), ways()

    def launches_elsewhere():
        thread = threading.Thread(target=first)
        thread.start()
        thread.join()

    compilation.compile_ahead([launches_elsewhere, second], GPU)
    assert loaded() == 1
    assert triton.knobs.runtime.jit_cache_hook is heard_of
    assert len(compiler.threads) == 2
    assert len(heard) == 2  # of the second one when it is compiled


@pytest.mark.parametrize("case", [in_threads, failing, meanwhile_elsewhere])
def test_kernels_compiled_ahead(case, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    if not hasattr(triton, "AsyncCompileMode"):
        pytest.skip("Triton's compiler is not meant for threads before 3.5")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled(__file__, case.__name__, 90)


def test_a_triton_that_is_not_meant_for_threads_is_left_alone(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.delattr(triton, "AsyncCompileMode", raising=False)
    compilation.compile_ahead([pytest.fail], GPU)
