"""Memory that is freed stays inside the block, and goes back after it."""

from __future__ import annotations

import ctypes
import json
import platform
import subprocess
import sys

import pytest

from ganvas.training import memory
from ganvas.training.memory import kept_memory

# In a process of its own, whose faults and size nothing else has part in.
PROGRAM = """
import json, resource, sys, torch
from ganvas.training.memory import kept_memory

MEBIBYTES = 64

def faults_of_using_memory_again():
    def use():
        torch.ones(MEBIBYTES << 18)  # float32, written once and freed
    for _ in range(12):  # until the small allocations between have found places of their own
        use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        use()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident_mebibytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20

results = {"before": faults_of_using_memory_again()}
resident = resident_mebibytes()
with kept_memory(enabled=sys.argv[1] == "kept"):
    results["inside"] = faults_of_using_memory_again()
    results["resident_inside"] = resident_mebibytes() - resident
results["resident_after"] = resident_mebibytes() - resident
print(json.dumps(results))
"""


def measure(mode: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again_without_faults_inside_the_block_alone():
    found = measure("kept")
    assert found["inside"] < found["before"] / 4
    assert found["resident_inside"] >= 64
    assert found["resident_after"] < 16


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_switched_off_it_changes_nothing():
    found = measure("as it comes")
    assert found["inside"] > found["before"] / 4
    assert found["resident_inside"] < 16


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory._mallopt() is None
    with kept_memory():
        pass
