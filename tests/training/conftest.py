from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# The helper modules are also imported by processes that tests start, so they are found by path.
sys.path.insert(0, str(Path(__file__).parent))

from tiny_training_jobs import JOBS


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """More threads only wait for one another on images this small, all the more beside other processes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a whole run of a job, made once."""
    made: dict[str, Path] = {}

    def folder(job: str) -> Path:
        if job not in made:
            made[job] = JOBS[job](tmp_path_factory.mktemp("undisturbed") / job)
        return made[job]

    return folder
