"""The native module itself: instruction sets, one OpenMP runtime, fork, and checks of what it is handed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ganvas
from ganvas.ops import batch_norm_leaky_relu

native = pytest.importorskip("ganvas._native")

COMPARE = """
import torch, ganvas, ganvas._native as native
assert native.selected_isa() == "{isa}", native.selected_isa()
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for order in ("conv_bn_act", "conv_act_bn"):
        for shape in ((5, 3, 7, 5), (8, 48, 9, 9), (64, 130)):
            x = torch.randn(shape).to(dtype)
            for residual in (None, 10 * torch.ones_like(x))[: 2 if order == "conv_bn_act" else 1]:
                results = []
                for backend in ("cpu", "reference"):
                    leaf, weight = x.clone().requires_grad_(), torch.ones(shape[1], requires_grad=True)
                    # Far from the kink: on the wrong side of it no tolerance holds.
                    slope = 1.0 if residual is None else 0.2
                    out = ganvas.ops.batch_norm_leaky_relu(leaf, weight, None, None, None, training=True, order=order,
                        negative_slope=slope, residual=residual, backend=backend)
                    out.backward(torch.linspace(-1, 1, x.numel()).view(shape).to(dtype))
                    results.append([out.detach(), leaf.grad, weight.grad])
                tolerance = 2e-5 if dtype is torch.float32 else 3e-2
                for ours, theirs in zip(*results):
                    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
                    assert error < tolerance, (dtype, order, shape, error)
    for kind in ganvas.ops.gan_loss.KINDS:
        real, fake = torch.randn(2, 77).to(dtype).requires_grad_().unbind()
        ours = ganvas.ops.discriminator_loss(real, fake, kind, backend="cpu")
        theirs = ganvas.ops.discriminator_loss(real, fake, kind, backend="reference")
        torch.testing.assert_close(ours, theirs)
print("agree")
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("isa", native.build_info()["cpu_isas"])
def test_every_instruction_set_this_machine_has_gives_the_same_numbers(isa):
    best = run("import ganvas, ganvas._native as n; print(n.selected_isa())").stdout.strip()
    known = native.build_info()["cpu_isas"]
    if known.index(isa) > known.index(best):
        pytest.skip(f"this processor has {best} at most")
    done = run(COMPARE.format(isa=isa), GANVAS_CPU_ISA=isa)
    assert done.stdout.strip() == "agree", done.stderr


def test_unknown_instruction_set_is_refused_by_name():
    done = run("import ganvas, ganvas._native as n; n.selected_isa()", GANVAS_CPU_ISA="sse9")
    assert "GANVAS_CPU_ISA must be portable, avx2, avx512 or amx; got 'sse9'" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime_serves_torch_and_ganvas():
    done = run("""
import torch
from ganvas.ops import batch_norm_leaky_relu
batch_norm_leaky_relu(torch.randn(64, 64, 32, 32), None, None, None, None, training=True, backend="cpu")
print(open("/proc/self/maps").read())
""")
    mapped = {line.split()[-1] for line in done.stdout.splitlines() if "/" in line}
    runtimes = {path for path in mapped if any(name in Path(path).name for name in ("libgomp", "libomp", "libiomp"))}
    assert len(runtimes) == 1, runtimes or done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_forked_child_does_not_wait_for_threads_it_does_not_have():
    x = torch.randn(64, 64, 32, 32)
    batch_norm_leaky_relu(x, None, None, None, None, training=True, backend="cpu")  # the parent's threads now run
    child = os.fork()
    if child == 0:
        native.batch_norm_leaky_relu_forward(*_forward_arguments(torch.randn(65536, 64), threads=2))
        os._exit(0)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            assert status == 0
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hung")


_KEEP: list[torch.Tensor] = []


def _forward_arguments(x: torch.Tensor, *, threads: int = 1, **changes: int) -> tuple:
    rows, channels = x.shape
    mean, var, out = torch.empty(1, channels), torch.empty(1, channels), torch.empty_like(x)
    _KEEP[:] = [x, mean, var, out]
    arguments = {
        "dtype": native.Dtype.float32, "rows": rows, "channels": channels, "groups": 1, "eps": 1e-5, "slope": 0.1,
        "activation_first": False, "training": True, "input": x.data_ptr(), "weight": 0, "bias": 0,
        "mean": mean.data_ptr(), "var": var.data_ptr(), "running_mean": 0, "running_var": 0, "momentum": 0.0,
        "output": out.data_ptr(), "threads": threads,
    }  # fmt: skip
    return tuple({**arguments, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows and channels must be at least 1; got 0 and 5"),
        ({"groups": 3}, "groups must divide rows; got 3 groups, 4 rows"),
        ({"input": 0}, "input must not be null"),
        ({"output": 6}, "output must be aligned to 4 bytes; got address 6"),
        ({"running_mean": 8}, "running_mean and running_var go together"),
    ],
)
def test_sizes_and_addresses_are_validated(changes, message):
    with pytest.raises(ValueError, match=message):
        native.batch_norm_leaky_relu_forward(*_forward_arguments(torch.randn(4, 5), **changes))


@pytest.mark.parametrize("dtype", [-1, len(native.Dtype), 2**70, 1.0, "float32", None])
def test_what_is_no_dtype_is_refused(dtype):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.generator_loss(dtype, native.GanLoss.bce, 8, 0, 1, 8, 0, 8, 1)


def test_a_slope_that_hides_the_kink_is_refused():
    x = torch.randn(4, 5)
    channels = [torch.ones(5) for _ in range(4)]
    mean, var, grad_weight, grad_bias = (values.data_ptr() for values in channels)
    arrays = x.data_ptr(), x.data_ptr(), x.data_ptr(), 0, 0, mean, var, x.data_ptr(), grad_weight, grad_bias
    with pytest.raises(ValueError, match=r"a slope below 0 leaves no trace of the kink's side .* got -0\.1"):
        native.batch_norm_add_leaky_relu_backward(
            native.Dtype.float32, 4, 5, 1, 1e-5, -0.1, True, *arrays, x.data_ptr(), 1
        )


def test_build_info_tells_version_and_instruction_sets():
    info = native.build_info()
    assert info["version"] == ganvas.__version__
    assert "portable" in info["cpu_isas"]
