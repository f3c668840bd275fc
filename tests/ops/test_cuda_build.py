"""What the build promises about the CUDA kernels, checked where nvcc is but no GPU need be."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

native = pytest.importorskip("ganvas._native")

CUDA_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
GENERATIONS = ("80", "90", "100")
nvcc = shutil.which("nvcc")


def output_of(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(nvcc is None, reason="needs nvcc")
@pytest.mark.skipif(not CUDA_SOURCES.is_dir(), reason="needs the source tree")
def test_no_kernel_spills_registers_to_memory(tmp_path):
    known = output_of(nvcc, "--list-gpu-code")
    generations = [g for g in GENERATIONS if re.search(rf"sm_{g}\b", known)]
    targets = [f"-gencode=arch=compute_{g},code=sm_{g}" for g in generations]
    options = ["-std=c++17", "-O3", "-fatbin", "-Xptxas=-v", *targets]
    report = output_of(nvcc, *options, CUDA_SOURCES / "gan_loss.cu", "-o", tmp_path / "gan_loss.fatbin")
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == 3 * len(generations)  # a kernel for each dtype
    assert set(spills) == {("0", "0", "0")}
    # The cooperative launch counts on two blocks of 512 threads in the 65536 registers of a multiprocessor.
    assert max(map(int, re.findall(r"Used (\d+) registers", report))) <= 64


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_module_loads_without_any_cuda_library():
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "--dynamic", native.__file__))
    assert needed
    assert not [name for name in needed if "cuda" in name]
    symbols = output_of("readelf", "--wide", "--dyn-syms", native.__file__)
    # Static CUDA runtime: were its symbols visible, the loader could bind them to the runtime that torch brings.
    assert "PyInit__native" in symbols
    assert not re.search(r"\b_*cuda[A-Z]\w*", symbols)


def test_build_info_and_functions_agree_on_whether_there_are_cuda_kernels():
    compiled_for = native.build_info()["cuda"]
    assert hasattr(native, "discriminator_loss_cuda") == bool(compiled_for)
    assert re.fullmatch(r"|(sm_\w+|compute_\w+)(, (sm_\w+|compute_\w+))*", compiled_for)


@pytest.mark.skipif(not native.build_info()["cuda"], reason="built without CUDA kernels")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"real_count": 0}, "at least one logit of each; got 0 real and 4 fake"),
        ({"kind": native.GanLoss.relativistic, "real_count": 5}, "pairs logits; got 5 real and 4 fake"),
        ({"fake": 0}, "must not be null"),
        ({"grad_real": 18}, "must be aligned to 4 bytes; got address 18"),
        ({"workspace": 12}, "workspace must be aligned to 8 bytes; got address 12"),
    ],
)
def test_sizes_and_addresses_are_validated_before_any_call_to_cuda(changes, message):
    arguments = {
        "dtype": native.Dtype.float32, "kind": native.GanLoss.bce, "label_smoothing": 0.0, "real": 16, "real_count": 4,
        "fake": 16, "fake_count": 4, "grad_real": 16, "grad_fake": 16, "loss": 16, "metrics": 16, "workspace": 16,
        "device": 0, "stream": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        native.discriminator_loss_cuda(*{**arguments, **changes}.values())


def test_cpu_kernels_refuse_float16():
    with pytest.raises(ValueError, match="the CPU kernels take float32 and bfloat16; got float16"):
        native.generator_loss(native.Dtype.float16, native.GanLoss.bce, 16, 0, 4, 16, 0, 16, 1)
