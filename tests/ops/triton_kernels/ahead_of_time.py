"""Compiles Triton kernels for GPUs that are not there, and says what they would take of them.

``compiled(__file__, "launches", 90)`` imports a test file in a process without Triton's interpreter and calls its
function ``launches``. Whatever kernels that launches, on tensors of device "meta", are compiled for compute capability
9.0 and not run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

CAPABILITIES = (80, 90, 100)
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a block can have
_LOADS = re.compile(r"\bLDG(?:STS)?\b([.\w]*)")
_TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")


class Kernel(NamedTuple):
    """What was compiled."""

    name: str
    num_warps: int
    num_stages: int
    shared: int  # bytes
    registers: int  # of a thread
    spilled: int  # bytes of a thread, in local memory
    tensor_cores: bool
    loads: list[int]  # bytes that a thread reads from global memory at a time, each number once


def compiled(file: str, function: str, capability: int, *arguments: str) -> list[Kernel]:
    """What ``function(*arguments)`` of ``file`` launches, each kernel once."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability), file, function, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Kernel(**kernel) for kernel in json.loads(done.stdout.splitlines()[-1])]


class _Driver:
    """Stands for the GPU, as far as a launch asks for it."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)
        self.capability = capability
        self.kernels: list[Kernel] = []
        self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=self._properties)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.metadata = metadata
        return lambda *arguments: None

    def _properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.capability]}

    def _load(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        listing, launch = _listing(cubin), self.metadata
        registers, *memory = (
            max(map(int, re.findall(rf"\b{what}:(\d+)", listing))) for what in ("REG", "STACK", "LOCAL")
        )
        tensor_cores = _TENSOR_CORES.search(listing) is not None
        self.kernels.append(
            Kernel(
                name, launch.num_warps, launch.num_stages, shared, registers, sum(memory), tensor_cores, _loads(listing)
            )
        )
        return object(), 1, registers, 0, 1024


def _loads(listing: str) -> list[int]:
    sizes = {"8": 1, "16": 2, "64": 8, "128": 16}  # nothing is said of 32 bits

    def size(suffixes: str) -> int:
        return next((sizes[bits] for bits in re.findall(r"\.[US]?(8|16|64|128)\b", suffixes)), 4)

    return sorted({size(suffixes) for suffixes in _LOADS.findall(listing)})


def _listing(cubin: bytes) -> str:
    """Its machine code and what it takes."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-sass", "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _main(capability: str, file: str, function: str, *arguments: str) -> None:
    from triton.runtime import driver

    stand_in = _Driver(int(capability))
    driver.set_active(stand_in)
    sys.path.insert(0, str(Path(file).parent))
    specification = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    getattr(module, function)(*arguments)
    print(json.dumps([kernel._asdict() for kernel in stand_in.kernels]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
