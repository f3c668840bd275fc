from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from ganvas import training
from ganvas.cli import main
from ganvas.training.presets import with_presets


class Outcome(NamedTuple):
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """What stderr says, which must be one line."""
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        return self.err[:-1]


@pytest.fixture
def ganvas(capsys, monkeypatch) -> Callable[..., Outcome]:
    """Runs a command line in this process, in a wide terminal's lines and without colours."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: object) -> Outcome:
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


class TrainingDouble:
    """Takes the place of ``training.train``: remembers what it was asked for, leaves a finished run's files."""

    def __init__(self) -> None:
        self.calls: list[tuple[training.RunConfig, bool]] = []
        self.error: BaseException | None = None

    def __call__(self, config: training.RunConfig, *, resume: bool = False, progress: object = None) -> Path:
        self.calls.append((config, resume))
        (config.out / "samples").mkdir(parents=True, exist_ok=True)
        settings = with_presets(config).to_json()
        description = {"ganvas": "0", "job": config.job, "config": settings, "model": {}, "data": {}}
        (config.out / "config.json").write_text(json.dumps(description))
        if self.error is not None:
            raise self.error
        (config.out / "samples" / "best.png").touch()
        line = {"step": 9, "epoch": 3, "event": "finished", "test/accuracy": 0.98765, "confusion_matrix": [[1]]}
        (config.out / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return config.out

    @property
    def config(self) -> training.RunConfig:
        return self.calls[-1][0]


@pytest.fixture
def train(monkeypatch) -> TrainingDouble:
    double = TrainingDouble()
    monkeypatch.setattr(training, "train", double)
    return double


@pytest.fixture(scope="session")
def classifier_run(tmp_path_factory) -> Path:
    return _run(tmp_path_factory, "train", "classifier", "--model", "mlp", "--epochs", 2)


@pytest.fixture(scope="session")
def gan_run(tmp_path_factory) -> Path:
    small = ("--width", 4, "--epochs", 1, "--evaluation-samples", 32, "--cas-samples", 32, "--extractor-epochs", 1)
    return _run(tmp_path_factory, "train", "gan", *small)


def _run(tmp_path_factory, *words: object) -> Path:
    out = tmp_path_factory.mktemp("runs") / str(words[1])
    args: Sequence[object] = (*words, "--data", "digits", "--out", out, "--threads", 1)
    assert main([str(arg) for arg in args]) == 0
    return out
