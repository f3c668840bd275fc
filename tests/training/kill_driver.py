"""A process of its own for the kill tests: imports once, then forks a run for every line on its standard input.

``JOB FOLDER resume|start`` starts a run. Answers: ``started PID``, then ``ended STATUS`` with the exit status (0 for a
run that finished, -9 for a killed one). The run appends the step of each checkpoint that it reports as saved to
FOLDER.saved.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from tiny_training_jobs import JOBS

from ganvas.training import SilentProgress


class ReportingProgress(SilentProgress):
    def __init__(self, path: Path) -> None:
        self._path = path

    def saved(self, step: int) -> None:
        with open(self._path, "a") as file:
            file.write(f"{step}\n")


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        job, folder, mode = line.split()
        child = os.fork()
        if child == 0:
            progress = ReportingProgress(Path(folder + ".saved"))
            JOBS[job](Path(folder), resume=mode == "resume", progress=progress, checkpoint_seconds=0.0)
            os._exit(0)
        print(f"started {child}", flush=True)
        print(f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)


if __name__ == "__main__":
    main()
