"""A test file once more, under each instruction set below the one that the kernels use here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

native = pytest.importorskip("ganvas._native")

_ALL = native.build_info()["cpu_isas"]
_LESSER = [] if os.environ.get("GANVAS_CPU_ISA") else _ALL[: _ALL.index(native.selected_isa())]

with_lesser_instruction_sets = pytest.mark.parametrize("isa", _LESSER)


def multiplies_by(flag: str) -> bool:
    """Whether the kernels have AVX-512, and the processor this instruction, as /proc/cpuinfo names it."""
    return native.selected_isa() in ("avx512", "amx") and flag in Path("/proc/cpuinfo").read_text()


def passes(file: str, isa: str, *options: str) -> None:
    """That the tests of ``file`` pass in a process that uses ``isa``; ``options`` are pytest's."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, *options],
        env={**os.environ, "GANVAS_CPU_ISA": isa}, capture_output=True, text=True, timeout=300,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
