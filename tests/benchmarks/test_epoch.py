"""`benchmarks/epoch.py` names functions of the training loop: that they are still the ones that take its time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(("job", "model"), [("classifier", "mlp"), ("gan", "dcgan")])
def test_the_shares_of_an_epoch(job, model, tmp_path):
    done = subprocess.run(
        [sys.executable, "epoch.py", job, "--model", model, "--images", "256", "--threads", "1"],
        cwd=BENCHMARKS, env={**os.environ, "GANVAS_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shares = {part: float(value) for part, value in re.findall(r"^\| (.+) \| \d+\.\d+ \| ([\d.]+)%", done.stdout, re.M)}
    for part in ("forward", "backward", "optimiser", "batches", "log", "checkpoints"):
        assert shares[part] > 0, part
    kernels = shares["forward"] + shares["backward"] + shares["optimiser"]
    assert kernels + shares.pop("**not a kernel**") == pytest.approx(100, abs=0.1)
    assert sum(shares.values()) == pytest.approx(100, abs=0.2)
