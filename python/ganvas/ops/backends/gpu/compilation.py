"""Triton kernels compiled in threads, before the ways that launch them are measured one after the other.

About three quarters of what compiling a kernel takes are spent in LLVM and in ptxas, which leave Python to other
threads. The rest is Python's own and one thread's at a time: four cores or more take about a quarter of the time.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ganvas.ops.backends.trial import Way

_MOST_THREADS = 32  # some hundred MiB each


def compile_ahead(ways: Iterable[Way], device: torch.device) -> None:
    """Compile what Triton kernels ``ways`` launch, so that they are there when a way is called.

    Each way is called once. Of its Triton kernels none is launched then that has not been compiled before, so what it
    computes is undefined, and not looked at. Nothing is raised: what fails here fails again where the way is called
    for its result. Before Triton 3.5, whose compiler is the first that is meant for threads, nothing is done.
    """
    triton = sys.modules.get("triton")  # else nobody has a kernel of its
    if triton is None or not hasattr(triton, "AsyncCompileMode"):
        return

    def compile(kernel: Callable[[], object]) -> None:
        with torch.cuda.device(device), suppress(Exception):  # each thread has a device of its own
            kernel()

    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MOST_THREADS)) as threads:
        for kernel in _uncompiled(triton, ways):
            threads.submit(compile, kernel)


def _uncompiled(triton: Any, ways: Iterable[Way]) -> list[Callable[[], object]]:
    """What compiles each of the kernels, once."""
    found: dict[str, Callable[[], object]] = {}

    def take_down(fn: Any, data: str) -> None:
        found[data] = lambda: fn.jit_function.preload(data)

    with _instead_of_compiling(triton, take_down):
        for way in ways:
            with suppress(Exception):
                way()
    return list(found.values())


@contextmanager
def _instead_of_compiling(triton: Any, call: Callable[[Any, str], None]) -> Iterator[None]:
    """In this thread a kernel that is not compiled is neither compiled nor launched: ``call`` gets what identifies it.

    Triton asks its hook before it compiles, and where that answers True, there is nothing to launch.
    """
    runtime, this_thread = triton.knobs.runtime, threading.get_ident()
    before = runtime.jit_cache_hook

    def hook(*, fn: Any, compile: dict[str, Any], **others: Any) -> bool | None:
        if threading.get_ident() != this_thread:
            return before(fn=fn, compile=compile, **others) if before else None
        call(fn, compile["specialization_data"])
        return True

    runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        runtime.jit_cache_hook = before
