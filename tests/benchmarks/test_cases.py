"""Cases within a time, in a process that may die: nothing is lost, nothing left running, nothing dropped in silence."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import benchmark_host as helpers
import pytest
from benchmark_host import Host, LostHost

from on_gpu.cases import Case, Stage, Worker, attempt, run


class Clock:
    """Stands still but for the cases, each of which takes ``seconds`` of it."""

    def __init__(self, seconds):
        self.now, self.seconds, self.given = 0.0, seconds, []

    def execute(self, case, seconds):
        self.given.append((case.name, seconds))
        self.now += self.seconds[case.name]
        return {"status": "measured"}


def rows_of(stages, clock, seconds):
    rows = {}
    run(
        stages,
        clock.execute,
        seconds,
        lambda section, name, row: rows.update({(section, name): row}),
        lambda: clock.now,
    )
    return rows


def case(name, least_seconds=1.0):
    return Case(name, helpers.answer, least_seconds=least_seconds)


def test_a_stage_has_its_share_and_what_those_before_it_left():
    clock = Clock({"a": 10.0, "b": 5.0})
    rows_of([Stage("first", 1, [case("a")]), Stage("second", 3, [case("b")])], clock, 80.0)
    assert clock.given == [("a", 20.0), ("b", 70.0)]


def test_what_does_not_fit_into_its_share_is_a_row_that_says_so():
    clock = Clock({"a": 19.5, "b": 1.0, "c": 1.0})
    stages = [Stage("first", 1, [case("a"), case("b")]), Stage("second", 1, [case("c")])]
    rows = rows_of(stages, clock, 40.0)
    assert [name for name, _ in clock.given] == ["a", "c"]
    assert rows["first", "b"] == {
        "status": "skipped",
        "reason": "0 s of its share of the time were left, 1 are needed",
    }


def test_without_time_everything_is_skipped():
    clock = Clock({})
    rows = rows_of([Stage("first", 1, [case("a"), case("b")])], clock, 0.0)
    assert not clock.given
    assert [row["status"] for row in rows.values()] == ["skipped", "skipped"]


def test_an_exception_is_a_row_with_its_first_line():
    row, usable = attempt(Case("x", helpers.fail), Host(), 1.0)
    assert row == {"status": "failed", "reason": "OutOfMemoryError: tried to allocate too much"}
    assert usable


def test_a_case_is_told_how_much_time_is_left():
    def measure(device, remaining):
        return {"remaining": remaining()}

    row, _ = attempt(Case("x", measure), Host(), 100.0)
    assert 99.0 < row["remaining"] <= 100.0


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def worker(log):
    worker = Worker(Host, log)
    yield worker
    worker.close()


def answer(value):
    return Case(f"answer {value}", helpers.answer, {"value": value})


def test_cases_run_in_one_process_until_it_dies_and_then_in_another(worker, log):
    first, failed, second = (worker(c, 120.0) for c in (answer(1), Case("fails", helpers.fail), answer(2)))
    assert (first["status"], first["value"], first["device"]) == ("measured", 1, "host")
    assert failed["status"] == "failed"
    assert first["process"] == second["process"] != os.getpid()
    died = worker(Case("dies", helpers.die), 120.0)
    assert died == {"status": "failed", "reason": "its process ended with exit code -11, see the log"}
    after = worker(answer(3), 120.0)
    assert after["value"] == 3
    assert after["process"] != first["process"]
    assert "== dies" in log.read_text()


def test_a_process_that_dies_before_it_reads_its_case_is_replaced(worker):
    worker.start()
    process = worker._process.pid
    os.kill(process, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (process, signal.SIGKILL)).start()
    row = worker(answer(1), 120.0)
    assert row == {"status": "failed", "reason": "its process ended with exit code -9, see the log"}
    assert worker(answer(2), 120.0)["value"] == 2


def test_a_case_that_takes_too_long_is_stopped_with_all_its_processes(worker, tmp_path):
    assert worker(answer(1), 120.0)["status"] == "measured"
    child = tmp_path / "child"
    begin = time.monotonic()
    row = worker(Case("hangs", helpers.hang, {"child_file": str(child)}), 2.0)
    assert row == {"status": "stopped", "reason": "not done after the 2 s that were left"}
    assert time.monotonic() - begin < 10.0
    assert ended(int(child.read_text()))


def ended(process):
    """Also where nobody has asked for its exit code yet."""
    for _ in range(50):
        status = Path(f"/proc/{process}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_device_that_is_lost_is_replaced_with_its_process(log):
    worker = Worker(LostHost, log)
    try:
        first, second = (worker(answer(value), 120.0) for value in (1, 2))
    finally:
        worker.close()
    assert (first["value"], second["value"]) == (1, 2)
    assert first["process"] != second["process"]


def test_without_a_device_every_case_says_why(log):
    worker = Worker(helpers.no_device, log)
    try:
        rows = [worker(answer(value), 120.0) for value in (1, 2)]
    finally:
        worker.close()
    assert rows == [{"status": "failed", "reason": "RuntimeError: no device to be had"}] * 2
