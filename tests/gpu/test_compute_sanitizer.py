"""The CUDA and Triton kernels under NVIDIA's compute-sanitizer: accesses outside of memory, and races."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SANITIZER = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
OURS = re.compile(r"ganvas::|(?<!\w)_kernel\b")
"""What a report names: the CUDA kernels' namespace, and the Triton kernels. Torch's own are not looked at."""

TESTS = {  # every kernel, in whole vectors and in parts of them
    "test_batch_norm_cuda.py": (
        "test_groups_have_statistics_of_their_own",
        "test_with_a_residual_it_is_as_accurate_as_torch",
        "test_a_slice_at_an_odd_address_is_read_in_place",
        "test_pending_activations_are_the_cpus",
        "test_batch_statistics_and_an_activation_that_is_written_later_are_trainings",
        "test_tiles_of_statistics_are_joined",
        "test_max_pooling_is_the_cpus",
    ),
    "test_gan_loss_cuda.py": (
        "test_discriminator_is_as_accurate_as_torch",
        "test_generator_is_as_accurate_as_torch",
        "test_a_slice_at_an_odd_address_is_read_in_place",
    ),
    "test_chain_cuda.py": (
        "test_a_step_is_as_accurate_as_torchs",
        "test_pooled",
        "test_a_residual_block",
        "test_slices_that_begin_anywhere",
    ),
    "test_triton_convolutions.py": ("test_as_accurate_as_torch",),
}


@pytest.mark.parametrize("file", TESTS)
def test_there_are_such_tests(file):
    defined = re.findall(r"^def (test_\w+)\(", (HERE / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert set(TESTS[file]) <= set(defined)


@pytest.mark.gpu
@pytest.mark.exhaustive
@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("file", TESTS)
def test_no_error_is_found(tool, file):
    tests = [f"{HERE / file}::{name}" for name in TESTS[file]]
    # Without its caching allocator, torch's every tensor has memory of its own that the tool knows the end of.
    done = subprocess.run(
        [str(SANITIZER), f"--tool={tool}", "--error-exitcode=99", "--target-processes=all", sys.executable, "-m",
         "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    report = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    assert not [line for line in report if OURS.search(line)], "\n".join(report[:60])
    assert done.returncode in (0, 99), done.stdout[-4000:]  # 99: the tool has found something in other kernels
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE), done.stdout[-4000:]
