"""What the tests of training share: ways to disturb a run, and the comparison of two runs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ganvas.training import SilentProgress
from ganvas.training.metrics_log import read_metrics


class SignalAt(SilentProgress):
    """Sends this process a signal in the middle of a given step of a run."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGINT) -> None:
        self._step = step
        self._number = number

    def start(self, steps: int, done: int) -> None:
        self._done = done

    def advance(self, images: int) -> None:
        self._done += 1
        if self._done == self._step:
            os.kill(os.getpid(), self._number)


class Recorder(SilentProgress):
    """Keeps what a person would have read."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    def saved(self, step: int) -> None:
        self.lines.append(f"saved {step}")


def results(folder: Path) -> dict[str, Any]:
    """Everything a run computes: all weights and all log lines, without what depends on the clock."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = safetensors.torch.load(path.read_bytes())
        found |= {f"{path.name}:{key}": value for key, value in tensors.items()}
    found["metrics"] = [
        {name: value for name, value in line.items() if name != "train/images_per_second"}
        for line in read_metrics(folder / "metrics.jsonl")
    ]
    found["grids"] = {path.name: path.read_bytes() for path in folder.glob("samples/*.png")}
    return found


def assert_same_results(folder: Path, expected: Path) -> None:
    ours, theirs = results(folder), results(expected)
    assert ours.keys() == theirs.keys()
    different = [
        name
        for name, value in ours.items()
        if not (torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name])
    ]
    assert not different
