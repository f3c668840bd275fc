"""The CUDA and Triton kernels under NVIDIA's compute-sanitizer: accesses outside of memory, and races."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.exhaustive]

HERE = Path(__file__).parent
sanitizer = shutil.which("compute-sanitizer")


@pytest.mark.skipif(sanitizer is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize(
    ("file", "tests"),
    [
        ("test_chain_cuda.py", "accurate and bfloat16 or pooled or slices"),
        ("test_gan_loss_cuda.py", "accurate and hinge"),
    ],
)
def test_no_error_is_found(tool, file, tests):
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", HERE / file, "-k", tests]
    # Without its caching allocator, torch's every tensor has memory of its own that the tool knows the end of.
    done = subprocess.run(
        [sanitizer, f"--tool={tool}", "--error-exitcode=99", "--target-processes=all", *pytest_command],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
