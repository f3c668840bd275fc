"""Log windows that are read one later, as on a GPU, where the host does not wait for their numbers."""

from __future__ import annotations

import math

import pytest
import torch
from test_faults import PoisonedAt
from tiny_training_jobs import JOBS, STEPS, run_classifier, tiny_classifier
from torch import nn
from training_helpers import SignalAt, assert_same_results

from ganvas.training import Interrupted, averages, run
from ganvas.training.averages import Averages
from ganvas.training.device_time import Moment
from ganvas.training.metrics_log import read_metrics

CPU = torch.device("cpu")


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setitem(run.WINDOWS_IN_FLIGHT, "cpu", 1)


@pytest.mark.parametrize("job", JOBS)
def test_log_is_that_of_windows_read_at_once(job, tmp_path, undisturbed, late):
    JOBS[job](tmp_path / "run")
    assert_same_results(tmp_path / "run", undisturbed(job))


def test_window_is_read_when_the_next_one_has_ended_and_the_last_at_the_end_of_the_epoch(tmp_path, late, monkeypatch):
    seen = []
    take, means = Averages.take, averages.Reading.means
    monkeypatch.setattr(Averages, "take", lambda self: seen.append("taken") or take(self))
    monkeypatch.setattr(averages.Reading, "means", lambda self: seen.append("read") or means(self))
    run_classifier(tmp_path / "run", epochs=2, log_every=1)
    assert seen == 2 * ["taken", "taken", "read", "taken", "read", "read"]


def test_run_interrupted_in_every_step_equals_the_undisturbed_one(tmp_path, undisturbed, late):
    for step in range(1, STEPS + 1):
        with pytest.raises(Interrupted):
            run_classifier(tmp_path / "run", resume=step > 1, progress=SignalAt(step))
    run_classifier(tmp_path / "run", resume=True)
    assert_same_results(tmp_path / "run", undisturbed("classifier"))


def poisoned(folder, step, **changes):
    torch.manual_seed(0)
    run_classifier(folder, model=PoisonedAt({step}), log_every=1, **changes)


@pytest.mark.parametrize("step", [1, 4, 5, 6])
@pytest.mark.parametrize("changes", [{}, {"checkpoint_seconds": 0}])
def test_fault_is_reported_for_the_window_it_was_in_and_what_came_after_is_gone(step, changes, tmp_path, monkeypatch):
    poisoned(tmp_path / "at once", step, **changes)
    monkeypatch.setitem(run.WINDOWS_IN_FLIGHT, "cpu", 1)
    poisoned(tmp_path / "late", step, **changes)
    assert_same_results(tmp_path / "late", tmp_path / "at once")
    fault, *_ = [line for line in read_metrics(tmp_path / "late" / "metrics.jsonl") if "event" in line]
    assert (fault["step"], fault["message"]) == (step, "train/loss is nan")


def test_windows_that_have_ended_are_logged_when_a_step_raises(tmp_path, late):
    class FailsAt(nn.Module):
        def __init__(self, call):
            super().__init__()
            self.inner, self.left = tiny_classifier(), call

        def forward(self, images):
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("out of memory")
            return self.inner(images)

    with pytest.raises(RuntimeError, match="out of memory"):
        run_classifier(tmp_path / "run", model=FailsAt(3), log_every=1)
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_means_of_values_that_are_not_there_in_every_step():
    window = Averages(CPU)
    for step in range(4):
        values = {"a": torch.tensor(float(step))} | ({"b": torch.tensor(8.0)} if step % 2 else {})
        window.add(values)
        window.count(values)
    reading = window.take()
    window.add({"a": torch.tensor(math.inf)})
    window.count("a")
    assert (reading.steps, reading.means()) == (4, {"a": 1.5, "b": 8.0})
    assert window.take().means() == {"a": math.inf}
    assert (window.take().steps, window.take().means()) == (0, {})


def test_seconds_between_moments_are_those_of_the_clock():
    first, second = Moment(CPU), Moment(CPU)
    second.wait()
    assert 0 <= second.seconds_since(first) < 60
