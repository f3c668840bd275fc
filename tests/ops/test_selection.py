"""The choice of a backend: forced by argument or environment, automatic otherwise, always with a reason."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ganvas import ops
from ganvas.ops import selection
from ganvas.ops.backends import cuda


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch):
    monkeypatch.delenv("GANVAS_BACKEND", raising=False)
    monkeypatch.setattr(selection, "_said", set())


def test_native_kernel_is_chosen_where_it_can_run():
    assert selection.choose("batch_norm_leaky_relu", torch.randn(64, 64, 8, 8), None) == "cpu"


@pytest.mark.parametrize("tensor", [torch.randn(2, 3).double(), torch.empty(2, 3, device="meta"), torch.randn(2, 3, 4)])
def test_reference_runs_the_rest_and_says_so_once(tensor, caplog):
    caplog.set_level(logging.INFO, logger="ganvas")
    for _ in range(2):
        assert selection.choose("batch_norm_leaky_relu", tensor, None) == "reference"
    assert len(caplog.records) == 1
    assert "runs as plain torch (cpu: " in caplog.text


def test_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("GANVAS_BACKEND", "reference")
    assert selection.choose("discriminator_loss", torch.randn(4), None) == "reference"
    monkeypatch.setenv("GANVAS_BACKEND", "cpu")
    with pytest.raises(ValueError, match=r"GANVAS_BACKEND='cpu' cannot run .*float64"):
        ops.discriminator_loss(torch.randn(4).double(), torch.randn(4).double())
    monkeypatch.setenv("GANVAS_BACKEND", "gpu")
    with pytest.raises(ValueError, match="GANVAS_BACKEND must be one of cpu, cuda, reference; got 'gpu'"):
        ops.discriminator_loss(torch.randn(4), torch.randn(4))


def test_argument_comes_before_the_environment(monkeypatch):
    monkeypatch.setenv("GANVAS_BACKEND", "cpu")
    assert selection.choose("discriminator_loss", torch.randn(4).double(), "reference") == "reference"


def test_explain_gives_every_backend_a_reason_or_none():
    reasons = ops.explain("batch_norm_leaky_relu", torch.randn(2, 3).double())
    assert reasons["reference"] is None
    assert "float64" in reasons["cpu"]
    assert tuple(reasons) == ops.available_backends()


def test_without_the_native_module_plain_torch_runs(monkeypatch):
    from ganvas.ops.backends import cpu

    monkeypatch.setattr(cpu, "native", None)
    monkeypatch.setattr(cpu, "_missing", "the native module is not there")
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(
        ops.batch_norm_leaky_relu(x, None, None, None, None, training=True),
        torch.nn.functional.leaky_relu(torch.nn.functional.batch_norm(x, None, None, training=True), 0.01),
    )
    assert "not there" in ops.explain("batch_norm_leaky_relu", x)["cpu"]


@pytest.fixture
def imagined_gpu(monkeypatch):
    """A device for tensors without memory, which as far as anyone can ask takes the kernels: for the choice alone."""
    monkeypatch.setattr(cuda, "MISSING", "")
    monkeypatch.setattr(cuda, "_device_refusals", {})
    monkeypatch.setattr(cuda, "native", SimpleNamespace(cuda_refusal=lambda index: ""))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    with FakeTensorMode():
        yield torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kernel_no_gpu_has_timed_runs_on_request_only(imagined_gpu, monkeypatch, dtype):
    logits = torch.empty(4, device=imagined_gpu, dtype=dtype)
    assert selection.choose("discriminator_loss", logits, None) == "reference"
    assert "on request only" in ops.explain("discriminator_loss", logits)["cuda"]
    assert selection.choose("discriminator_loss", logits, "cuda") == "cuda"
    monkeypatch.setenv("GANVAS_BACKEND", "cuda")
    assert selection.choose("generator_loss", logits, None) == "cuda"
    assert ops.explain("generator_loss", logits)["cuda"] is None


def test_cuda_kernels_give_their_reason_to_refuse(imagined_gpu, monkeypatch):
    logits = torch.empty(4, device=imagined_gpu)
    assert "got one on cpu" in cuda.can_run("generator_loss", torch.empty(4))
    assert "got torch.float64" in cuda.can_run("generator_loss", logits.double())
    assert cuda.can_run("batch_norm_leaky_relu", logits) == "batch_norm_leaky_relu has no CUDA kernel yet"
    monkeypatch.setattr(cuda, "MISSING", "this build of ganvas has no CUDA kernels")
    assert "no CUDA kernels" in cuda.can_run("generator_loss", logits)


def test_a_device_is_asked_once_whether_the_kernels_run_there(imagined_gpu, monkeypatch):
    asked = []
    monkeypatch.setattr(cuda.native, "cuda_refusal", lambda index: asked.append(index) or "the driver is too old")
    for _ in range(2):
        reason = cuda.can_run("generator_loss", torch.empty(4, device=imagined_gpu))
        assert reason == "CUDA refuses the kernels: the driver is too old"
    assert asked == [0]


def test_an_older_or_another_makers_gpu_is_refused(imagined_gpu, monkeypatch):
    logits = torch.empty(4, device=imagined_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert cuda.can_run("generator_loss", logits) == "the CUDA kernels need compute capability 8.0; got 7.5"
    cuda._device_refusals.clear()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch is built for another maker's" in cuda.can_run("generator_loss", logits)


def test_a_forced_cuda_kernel_is_one_operator_to_torch_compile(imagined_gpu):
    class Losses(torch.nn.Module):
        def forward(self, real, fake):
            loss, metrics = ops.discriminator_loss(real, fake, "hinge", return_metrics=True, backend="cuda")
            return loss + ops.generator_loss(fake, real, "relativistic", backend="cuda"), metrics.real_accuracy

    logits = torch.empty(4, device=imagined_gpu), torch.empty(4, device=imagined_gpu)
    operators = [str(node.target) for node in torch.export.export(Losses(), logits).graph.nodes]
    assert "ganvas.discriminator_loss.default" in operators
    assert "ganvas.generator_loss.default" in operators
    torch._dynamo.reset()
    loss, accuracy = torch.compile(Losses(), backend="aot_eager", fullgraph=True)(*logits)
    assert loss.device == accuracy.device == imagined_gpu
