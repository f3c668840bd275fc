"""What a person sees: a bar with a rate in a terminal, plain lines everywhere else."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from rich.console import Console
from training_helpers import Recorder

from ganvas import training
from ganvas.training import ClassifierConfig, progress
from ganvas.training.progress import PlainProgress, RichProgress, make_progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_plain_lines_give_the_rate_and_the_time_left(clock, capsys):
    display = PlainProgress(seconds=10)
    display.start(steps=100, done=20)
    for second in range(1, 21):
        clock.now = float(second)
        display.advance(64)
    assert capsys.readouterr().out.splitlines() == [
        "step 30/100  64 images/s  1:10 left",
        "step 40/100  64 images/s  1:00 left",
    ]


def test_output_that_is_no_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert type(make_progress()) is PlainProgress


def test_bar_shows_steps_and_rate_and_messages_stay(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with RichProgress(console) as display:
        display.start(steps=10, done=4)
        clock.now = 2.0
        display.advance(128)
        display.message("epoch 1/2  FD[digits-cnn@1a2b3c] 3.2")
    shown = console.file.getvalue()
    assert "5/10" in shown
    assert "64 images/s" in shown
    # Square brackets are markup to rich: they must come out as they went in.
    assert "FD[digits-cnn@1a2b3c] 3.2" in shown


def test_unreadable_files_that_are_left_out_are_listed(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for label in ("a", "b"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("L", (8, 8), 200 if label == "b" else 20).save(folder / f"{index}.png")
    (tmp_path / "data" / "train" / "a" / "broken.png").write_bytes(b"no image")
    config = ClassifierConfig(
        data="folder", root=tmp_path / "data", out=tmp_path / "run", model="mlp", epochs=1, batch_size=4,
        skip_unreadable=True, threads=1,
    )  # fmt: skip
    seen = Recorder()
    training.train(config, progress=seen)
    assert any(line.startswith("left out") and "broken.png" in line for line in seen.lines)
