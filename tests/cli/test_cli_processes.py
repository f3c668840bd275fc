"""The command as a process of its own: what only signals and pipes can show."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ganvas.training.metrics_log import read_metrics

pytestmark = pytest.mark.slow

PROGRAM = (sys.executable, "-c", "import sys; from ganvas.cli import main; sys.exit(main())")


def start(*args: object) -> subprocess.Popen[str]:
    command = [*PROGRAM, *(str(arg) for arg in args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_saves_and_the_command_it_prints_finishes_the_run(tmp_path):
    out = tmp_path / "run"
    words = ("train", "classifier", "--data", "digits", "--model", "mlp", "--epochs", 60, "--log-every", 1)
    process = start(*words, "--threads", 1, "--out", out)
    wait_for_steps(out, 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert "Traceback" not in err

    interrupted_at = read_metrics(out / "metrics.jsonl")[-1]["step"]
    program, *args = shlex.split(err[err.index("ganvas train") :])
    assert program == "ganvas"
    resumed = start(*args)
    text, err = resumed.communicate(timeout=300)
    assert (resumed.returncode, err) == (0, "")
    assert f"continuing after step {interrupted_at}" in text
    steps = [line["step"] for line in read_metrics(out / "metrics.jsonl") if "train/loss" in line]
    assert steps == list(range(1, len(steps) + 1))


def test_a_reader_that_closes_the_pipe_gets_no_complaint():
    process = start("info", "--models")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


def wait_for_steps(out: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(out / "metrics.jsonl")) < steps:
        assert time.monotonic() < deadline, "training has not begun"
        time.sleep(0.02)
