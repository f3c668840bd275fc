"""CUDA kernels that the processor runs (``cuda_on_host/``): compiled by the tests, called as the native module is."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent / "cuda_on_host"
CSRC = Path(__file__).parents[2] / "csrc"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of csrc/dtype.h
compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

needs_compiler = [
    pytest.mark.skipif(compiler is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="needs the source tree"),
]


_compiled: dict[tuple[str, ...], ctypes.CDLL] = {}


def compiled(folder: Path, name: str, *kernels: str) -> ctypes.CDLL:
    """``cuda_on_host/name.cpp`` and the ``kernels`` in csrc/cuda as a library, compiled once in a process."""
    key = (name, *kernels)
    if key not in _compiled:
        _compiled[key] = _compile(folder, name, *kernels)
    return _compiled[key]


def _compile(folder: Path, name: str, *kernels: str) -> ctypes.CDLL:
    library = folder / f"lib{name}.so"
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas", "-I", HERE, "-I", CSRC]
    sources = [HERE / f"{name}.cpp", "-x", "c++", *(CSRC / "cuda" / f"{kernel}.cu" for kernel in kernels)]
    command = [compiler, *options, *sources, "-o", library]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


class FencedMemory:
    """Tensors at whose end memory ends: an access one element further is a segmentation fault."""

    before = 64  # bytes in front of each, which must stay as they are

    def __init__(self) -> None:
        self.fronts: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, memory_format=torch.contiguous_format) -> Tensor:
        """NaN, or 255: what is not written is noticed."""
        strides = torch.empty(shape, device="meta", memory_format=memory_format).stride()
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        size = count * dtype.itemsize
        pages = -(-(size + self.before) // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        no_access = 0
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin + pages), mmap.PAGESIZE, no_access) == 0
        front = torch.frombuffer(memory, dtype=torch.uint8, count=self.before, offset=pages - size - self.before)
        self.fronts.append(front.fill_(0xA5))
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=pages - size)
        return flat.fill_(float("nan") if dtype.is_floating_point else 255).as_strided(shape, strides)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Channels innermost."""
        layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        return self.empty(tuple(tensor.shape), tensor.dtype, layout)

    def copy(self, tensor: Tensor) -> Tensor:
        """The same, with ``tensor``'s values."""
        return self.empty_like(tensor).copy_(tensor)

    def check(self) -> None:
        """That nothing was written in front of any tensor."""
        assert all((front == 0xA5).all() for front in self.fronts)


_ARGUMENTS = {
    "i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float, "p": ctypes.c_void_p, "s": ctypes.c_int64 * 4,
}  # fmt: skip


class HostNative:
    """Stands for ``ganvas._native`` in the modules of ``ganvas.ops.backends.cuda``.

    ``functions``: of each the types of its arguments, a letter each; before those of one that answers with a size, L.
    """

    def __init__(self, library: ctypes.CDLL, functions: dict[str, str]) -> None:
        self.library = library
        for name, types in functions.items():
            setattr(self, name, self._function(getattr(library, name), types))

    def _function(self, function: Any, types: str) -> Callable[..., int | None]:
        answers = types[0] == "L"
        types = types.removeprefix("L")
        function.argtypes = [_ARGUMENTS[letter] for letter in types]
        function.restype = ctypes.c_int64 if answers else ctypes.c_char_p

        def call(*arguments: Any) -> int | None:
            result = function(*(self._value(value, letter) for value, letter in zip(arguments, types, strict=True)))
            if answers:
                return result
            if result:
                raise RuntimeError(result.decode())
            return None

        return call

    def vectors_moved(self, call: Callable[[], Any]) -> tuple[Any, int, int]:
        """Its result, and how many whole vectors of 16 bytes its kernels read and wrote."""
        self.library.vectors_read(), self.library.vectors_written()
        result = call()
        return result, self.library.vectors_read(), self.library.vectors_written()

    def in_both_orders(self, call: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
        """Its results with each block's threads taking turns from the first to the last, and from the last."""
        results = []
        for last_first in (False, True):
            self.library.set_last_first(last_first)
            results.append(call())
        self.library.set_last_first(False)
        return results

    @staticmethod
    def _value(value: Any, letter: str) -> Any:
        if letter == "s":
            return (ctypes.c_int64 * 4)(*value)
        return getattr(value, "value", value) or 0


def check_arguments(name: str, types: str) -> None:
    """That ``ganvas._native``'s function is called as the one of :class:`HostNative` that stands for it.

    An address, a size and a device's number are integers there, and so is an enumeration.
    """
    native = pytest.importorskip("ganvas._native")
    if not hasattr(native, name):
        pytest.skip("built without CUDA kernels")
    arguments = re.split(r"arg\d+: ", getattr(native, name).__doc__.split(") ->")[0])[1:]
    kinds = {"SupportsFloat": "f", "Sequence": "s", "bool": "i", "SupportsInt": "[lpi]", "int": "i"}
    found = [next(letter for word, letter in kinds.items() if word in argument) for argument in arguments]
    assert re.fullmatch("".join(found), types.removeprefix("L")), f"{name} takes {found}, is called with {types}"


def stand_in(patch: pytest.MonkeyPatch, module: Any, native: HostNative, memory: FencedMemory) -> Any:
    """``module`` of ``ganvas.ops.backends.cuda`` with its kernels on the processor and its results in ``memory``."""
    replacements = {
        "native": native,
        "enqueue": lambda kernel, like, *arguments: kernel(*arguments, 0, 0),
        "empty": lambda like, *shape, dtype=torch.float32: memory.empty(shape, dtype),
        "empty_pixels": lambda like, shape, dtype: memory.empty(shape, dtype, torch.channels_last),
        "empty_like": memory.empty_like,
        "workspace": lambda like, size: memory.empty((size // 4,), torch.float32) if size else None,
    }
    for name, replacement in replacements.items():
        if hasattr(module, name):
            patch.setattr(module, name, replacement)
    return module
