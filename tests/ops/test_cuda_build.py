"""What the build promises about the CUDA kernels, checked where nvcc is but no GPU need be."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

native = pytest.importorskip("ganvas._native")

CUDA_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
nvcc = shutil.which("nvcc")


def output_of(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# Of each source the number of kernels, and the registers of a thread that leave a multiprocessor's 65536 for as many
# threads as the launches count on.
KERNELS = {
    "batch_norm_backward": (24, 128),
    "batch_norm_forward": (24, 128),
    "device": (1, 255),
    "gan_loss": (3, 64),
    "max_pool": (18, 128),
    "statistics": (3, 64),
}


@pytest.mark.skipif(nvcc is None, reason="needs nvcc")
@pytest.mark.skipif(not CUDA_SOURCES.is_dir(), reason="needs the source tree")
@pytest.mark.parametrize("generation", [*(pytest.param(g, marks=pytest.mark.exhaustive) for g in ("80", "100")), "90"])
@pytest.mark.parametrize("source", KERNELS)
def test_no_kernel_spills_registers_to_memory(tmp_path, source, generation):
    if not re.search(rf"sm_{generation}\b", output_of(nvcc, "--list-gpu-code")):
        pytest.skip(f"this nvcc does not know sm_{generation}")
    target = f"-gencode=arch=compute_{generation},code=sm_{generation}"
    options = ["-std=c++17", "-O3", "-fatbin", "-Xptxas=-v", target]
    report = output_of(nvcc, *options, CUDA_SOURCES / f"{source}.cu", "-o", tmp_path / f"{source}.fatbin")
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    kernels, registers = KERNELS[source]
    assert len(spills) == kernels
    assert set(spills) == {("0", "0", "0")}
    assert max(map(int, re.findall(r"Used (\d+) registers", report))) <= registers


@pytest.mark.skipif(not CUDA_SOURCES.is_dir(), reason="needs the source tree")
def test_every_source_is_looked_at():
    assert {source.stem for source in CUDA_SOURCES.glob("*.cu")} == set(KERNELS)


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


BATCH_NORM_FORWARD = {
    "dtype": native.Dtype.bfloat16, "rows": 60_000, "channels": 8, "groups": 1, "eps": 1e-5, "negative_slope": 0.2,
    "activation_first": False, "training": True, "input": 16, "weight": 0, "bias": 0, "mean": 16, "var": 16,
    "running_mean": 0, "running_var": 0, "momentum": 0.1, "residual": 0, "output": 16, "workspace": 0,
    "workspace_bytes": 0, "device": 0, "stream": 0,
}  # fmt: skip
BATCH_NORM_BACKWARD = {
    "dtype": native.Dtype.bfloat16, "rows": 60, "channels": 8, "groups": 1, "eps": 1e-5, "negative_slope": 0.2,
    "activation_first": False, "training": True, "grad_output": 16, "output": 16, "input": 16, "weight": 0, "bias": 0,
    "mean": 16, "var": 16, "grad_input": 16, "grad_weight": 16, "grad_bias": 16, "grad_residual": 16, "workspace": 0,
    "workspace_bytes": 0, "device": 0, "stream": 0,
}  # fmt: skip
STATISTICS = {
    "dtype": native.Dtype.bfloat16, "rows": 60_000, "channels": 8, "groups": 1, "eps": 1e-5, "negative_slope": 0.2,
    "activation_first": False, "input": 16, "weight": 0, "bias": 0, "running_mean": 0, "running_var": 0,
    "momentum": 0.1, "mean": 16, "var": 16, "scale": 16, "shift": 16, "workspace": 0, "workspace_bytes": 0, "device": 0,
    "stream": 0,
}  # fmt: skip
SETTLE = {
    "dtype": native.Dtype.float32, "rows": 60, "channels": 8, "groups": 2, "eps": 1e-5, "negative_slope": 0.2,
    "activation_first": False, "training": True, "grad": 16, "stored": 16, "weight": 0, "mean": 16, "var": 16,
    "sums": 16, "grad_weight": 16, "grad_bias": 16, "device": 0, "stream": 0,
}  # fmt: skip
FINISH = {
    "groups": 1, "tiles": 100_000, "channels": 8, "counts": 16, "means": 16, "deviations": 16, "weight": 0, "bias": 0,
    "eps": 1e-5, "running_mean": 0, "running_var": 0, "momentum": 0.1, "mean": 16, "var": 16, "scale": 16, "shift": 16,
    "workspace": 16, "workspace_bytes": 100_000, "device": 0, "stream": 0,
}  # fmt: skip
MAX_POOL = {
    "dtype": native.Dtype.float16, "input_shape": (4, 8, 6, 6), "groups": 2, "input": 16, "weight": 0, "bias": 0,
    "mean": 16, "var": 16, "eps": 1e-5, "negative_slope": 0.2, "activation_first": False, "output": 16, "index": 16,
    "device": 0, "stream": 0,
}  # fmt: skip


@pytest.mark.skipif(not native.build_info()["cuda"], reason="built without CUDA kernels")
@pytest.mark.parametrize(
    ("function", "arguments", "changes", "message"),
    [
        ("batch_norm_leaky_relu_forward", BATCH_NORM_FORWARD, {"rows": 0}, "must be at least 1; got 0 and 8"),
        ("batch_norm_leaky_relu_forward", BATCH_NORM_FORWARD, {"groups": 7}, "groups must divide rows; got 7 groups"),
        ("batch_norm_leaky_relu_forward", BATCH_NORM_FORWARD, {"input": 17}, "aligned to 2 bytes; got address 17"),
        ("batch_norm_leaky_relu_forward", BATCH_NORM_FORWARD, {"running_var": 16}, "go together"),
        ("batch_norm_leaky_relu_forward", BATCH_NORM_FORWARD, {"residual": 3}, "residual must be aligned to 2 bytes"),
        (
            "batch_norm_leaky_relu_forward", BATCH_NORM_FORWARD, {"residual": 16, "activation_first": True},
            "a residual is added before the activation",
        ),
        ("batch_statistics", STATISTICS, {"rows": 0}, "must be at least 1; got 0 and 8"),
        ("batch_statistics", STATISTICS, {"input": 17}, "aligned to 2 bytes; got address 17"),
        ("batch_statistics", STATISTICS, {"scale": 0}, "statistics must not be null"),
        ("batch_statistics", STATISTICS, {"running_mean": 16}, "go together"),
        ("batch_norm_leaky_relu_backward", BATCH_NORM_BACKWARD, {"output": 0}, "output and grad_residual go together"),
        ("batch_norm_leaky_relu_backward", BATCH_NORM_BACKWARD, {"negative_slope": -0.5}, "leaves no trace"),
        ("batch_norm_leaky_relu_backward", BATCH_NORM_BACKWARD, {"grad_input": 0}, "must not be null"),
        ("settle_pending_gradient", SETTLE, {"sums": 18}, "must be aligned to 4 bytes; got address 18"),
        ("settle_pending_gradient", SETTLE, {"grad": 18}, "must be aligned to 4 bytes; got address 18"),
        ("finish_statistics", FINISH, {"tiles": 0}, "must be at least 1; got 1, 0 and 8"),
        ("finish_statistics", FINISH, {"workspace": 0}, "workspace must not be null"),
        ("finish_statistics", FINISH, {"workspace_bytes": 8}, "workspace must hold 4352 bytes; got 8"),
        ("max_pool_forward", MAX_POOL, {"input_shape": (4, 8, 1, 6)}, "at least 2×2 is pooled; got 1×6"),
        ("max_pool_forward", MAX_POOL, {"groups": 3}, "groups must divide the batch; got 3 groups, batch 4"),
        ("max_pool_forward", MAX_POOL, {"index": 0}, "index must not be null"),
    ],
)  # fmt: skip
def test_what_the_norms_kernels_are_handed_is_validated(function, arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        getattr(native, f"{function}_cuda")(*{**arguments, **changes}.values())


@pytest.mark.skipif(not native.build_info()["cuda"], reason="built without CUDA kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_without_a_driver_the_kernels_say_so_and_raise_nothing_else():
    refusal = native.cuda_refusal(0)
    assert re.search(r"^cudaError\w+, .*(driver|device)", refusal)
    with pytest.raises(RuntimeError, match=r"^discriminator_loss: CUDA error cudaError\w+: .*(driver|device)"):
        native.discriminator_loss_cuda(
            native.Dtype.float32, native.GanLoss.bce, 0.0, 16, 4, 16, 4, 16, 16, 16, 16, 16, 0, 0
        )


def test_cpu_kernels_refuse_float16():
    with pytest.raises(ValueError, match="the CPU kernels take float32 and bfloat16; got float16"):
        native.generator_loss(native.Dtype.float16, native.GanLoss.bce, 16, 0, 4, 16, 0, 16, 1)
