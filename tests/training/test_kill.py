"""kill -9 at any moment loses nothing that was reported saved, and the resumed run is the undisturbed one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_helpers import assert_same_results


class Driver:
    """Starts runs in processes that can be killed; see kill_driver.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "kill_driver.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("ready")

    def run(self, job: str, folder: Path, *, kill_after: float | None = None) -> int:
        """Start or resume a run, kill it after so many seconds (None: never), return its exit status."""
        mode = "resume" if (folder / "config.json").exists() else "start"
        print(job, folder, mode, file=self._process.stdin, flush=True)
        pid = int(self._expect("started"))
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it had finished
                os.kill(pid, signal.SIGKILL)
        return int(self._expect("ended"))

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(timeout=60) == 0

    def _expect(self, word: str) -> str:
        answer = self._process.stdout.readline()
        assert answer.startswith(word), answer
        return answer.removeprefix(word).strip()


@pytest.fixture(scope="module")
def driver():
    driver = Driver()
    yield driver
    driver.close()


def newest_step(folder: Path) -> int:
    """Of the newest checkpoint with a manifest; all that have one are complete."""
    manifests = sorted((folder / "checkpoint").glob("save-*/manifest.json"))
    return json.loads(manifests[-1].read_bytes())["step"] if manifests else 0


def kill_and_compare(driver: Driver, job: str, folder: Path, expected: Path, kills: int, seed: int) -> None:
    """Kill a run so many times, evenly spread over the time a whole run takes, then let it finish."""
    started = time.monotonic()
    assert driver.run(job, folder.with_name("timed")) == 0
    duration = time.monotonic() - started
    moments = random.Random(seed)
    for _ in range(kills):
        driver.run(job, folder, kill_after=moments.uniform(0, duration))
        reported = folder.with_name(folder.name + ".saved")
        if reported.exists() and (lines := reported.read_text().split("\n")[:-1]):
            assert newest_step(folder) >= int(lines[-1])
    assert driver.run(job, folder) == 0
    assert_same_results(folder, expected)


@pytest.mark.parametrize("job", ["classifier", "gan"])
def test_killed_run_resumes_to_the_undisturbed_result(job, driver, tmp_path, undisturbed):
    kill_and_compare(driver, job, tmp_path / "run", undisturbed(job), kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["classifier", "gan", "autoencoder"])
def test_fifty_kills_lose_nothing(job, driver, tmp_path, undisturbed):
    """Five runs of ten kills: a run that is killed at every turn makes little way, so fifty of one would end early."""
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        kill_and_compare(driver, job, folder / "run", undisturbed(job), kills=10, seed=attempt)
