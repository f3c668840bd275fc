"""Benchmarks are no part of the package: their folder, and this one's helpers, are put on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

here = Path(__file__).parent
sys.path += [str(here), str(here.parents[1] / "benchmarks")]


@pytest.fixture
def host():
    from benchmark_host import Host

    return Host()
