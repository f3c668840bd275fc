"""Cases of a benchmark one after the other: each guarded, within a time, in a process that may die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from on_gpu.device import Device

Row = dict[str, Any]
Remaining = Callable[[], float]
"""Seconds that are left to the case."""


@dataclass(frozen=True)
class Case:
    """A row to be. ``measure(device, remaining, **arguments)`` is a module's function, so that it can be sent away."""

    name: str
    measure: Callable[..., Row]
    arguments: dict[str, Any] = field(default_factory=dict)
    least_seconds: float = 3.0
    """With less than that left the case is not begun."""


class Stage(NamedTuple):
    """Cases of one section, in turn, for a share of the time. A section may have several stages."""

    section: str
    share: float
    cases: Sequence[Case]


class Executor(Protocol):
    """Runs a case within so many seconds: a row with a ``status``, and a ``reason`` where that is not "measured"."""

    def __call__(self, case: Case, seconds: float) -> Row: ...


def run(
    stages: Sequence[Stage],
    execute: Executor,
    seconds: float,
    add: Callable[[str, str, Row], None],
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Run all cases for which there is time, each to ``add(section, name, row)``; the others are rows that say so.

    A stage has its share of ``seconds`` and what those before it have left.
    """
    begin, total, share = now(), sum(stage.share for stage in stages), 0.0
    for stage in stages:
        share += stage.share
        deadline = begin + seconds * share / total
        for case in stage.cases:
            left = deadline - now()
            if left < case.least_seconds:
                reason = f"{max(left, 0):.0f} s of its share of the time were left, {case.least_seconds:.0f} are needed"
                row: Row = {"status": "skipped", "reason": reason}
            else:
                row = execute(case, left)
            add(stage.section, case.name, row)


def attempt(case: Case, device: Device, seconds: float) -> tuple[Row, bool]:
    """Measure here: the row, whatever is raised being its reason, and whether the device is still usable."""
    deadline = time.monotonic() + seconds
    try:
        row = {"status": "measured", **case.measure(device, lambda: deadline - time.monotonic(), **case.arguments)}
    except Exception as error:
        row = {"status": "failed", "reason": reason_of(error)}
    return row, device.recover()


def reason_of(error: BaseException) -> str:
    """One line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:300]}" if lines else type(error).__name__


class Worker:
    """Runs cases in a process of their own, which is started anew after it died, was stopped or lost its device.

    Args:
        make_device: called there.
        log: what the process prints is appended to.
    """

    def __init__(self, make_device: Callable[[], Device], log: Path | str = os.devnull) -> None:
        self._make_device = make_device
        self._log = str(log)
        self._process: Any = None
        self._connection: Connection | None = None

    def __call__(self, case: Case, seconds: float) -> Row:
        begin = time.monotonic()
        connection = self.start()
        with suppress(ConnectionError):  # then there is nothing to receive either
            connection.send((case, seconds))
        if not connection.poll(max(0.0, seconds - (time.monotonic() - begin))):
            self.close()
            return {"status": "stopped", "reason": f"not done after the {seconds:.0f} s that were left"}
        try:
            row, usable = connection.recv()
        except (EOFError, ConnectionError):  # the latter if it has not read the case
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            return {"status": "failed", "reason": f"its process ended with exit code {code}, see the log"}
        if not usable:
            self.close()
        return row

    def start(self) -> Connection:
        """So that the first case need not wait for it."""
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._make_device, self._log))
            self._process.start()
            theirs.close()
        return self._connection

    def close(self) -> None:
        """End the process, and those it has started."""
        if self._connection is None:
            return
        with suppress(ProcessLookupError, PermissionError):  # it has ended, or has no group of its own yet
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._connection = self._process = None


def _serve(connection: Connection, make_device: Callable[[], Device], log: str) -> None:
    os.setsid()
    with open(log, "ab", buffering=0) as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    device: Device | None = None
    while True:
        try:
            case, seconds = connection.recv()
        except EOFError:
            return
        try:
            device = device or make_device()
        except Exception as error:
            connection.send(({"status": "failed", "reason": reason_of(error)}, False))
            return
        print(f"== {case.name}", flush=True)
        connection.send(attempt(case, device, seconds))
