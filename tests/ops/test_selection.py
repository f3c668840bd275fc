"""The choice of a backend: forced by argument or environment, automatic otherwise, always with a reason."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ganvas import ops
from ganvas.ops import selection, steps_on_gpu, tuning
from ganvas.ops.backends import cuda, triton


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
    with pytest.raises(ValueError, match="GANVAS_BACKEND must be one of cpu, triton, cuda, reference; got 'gpu'"):
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
def test_unmeasured_a_cuda_kernel_runs_wherever_it_can(imagined_gpu, dtype):
    logits = torch.empty(4, device=imagined_gpu, dtype=dtype)
    assert selection.choose("discriminator_loss", logits, None) == "cuda"
    assert "has none" in ops.explain("discriminator_loss", logits)["triton"]
    maps = torch.empty(2, 3, 4, 4, device=imagined_gpu, dtype=dtype)
    assert selection.choose("batch_norm_leaky_relu", maps, None) == "cuda"
    sequences = torch.empty(2, 3, 4, device=imagined_gpu, dtype=dtype)
    assert selection.choose("batch_norm_leaky_relu", sequences, None) == "reference"


@pytest.fixture
def measured(imagined_gpu, monkeypatch) -> SimpleNamespace:
    """What measuring answers with."""
    answer = SimpleNamespace(kernel=1.0, torch=2.0, measurements=0, error=None)

    def remembered(case, measure):
        answer.measurements += 1
        if answer.error is not None:
            raise answer.error
        return tuning.Entry(case, answer.kernel, answer.torch)

    monkeypatch.setenv("GANVAS_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "remembered", remembered)
    monkeypatch.setattr(tuning, "decisions", {})
    monkeypatch.setattr(steps_on_gpu, "device_name", lambda index: "imagined")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return answer


@pytest.mark.parametrize(
    ("op", "shape"),
    [("batch_norm_leaky_relu", (6, 3, 4, 4)), ("discriminator_loss", (9,)), ("generator_loss", (3, 3))],
)
def test_on_a_gpu_the_automatic_choice_is_measured_once(imagined_gpu, measured, op, shape):
    tensor = torch.empty(shape, device=imagined_gpu)
    assert ops.explain(op, tensor)["cuda"] is None
    assert measured.measurements == 0  # explaining measures nothing
    for _ in range(2):
        assert selection.choose(op, tensor, None) == "cuda"
    assert measured.measurements == 1
    measured.kernel = 3.0
    assert selection.choose(op, torch.empty((20, *shape[1:]), device=imagined_gpu), None) == "reference"
    assert measured.measurements == 2
    smaller = torch.empty((17, *shape[1:]), device=imagined_gpu)
    assert ops.explain(op, smaller)["cuda"] == "torch is faster here: 2.000 ms against 3.000 ms"
    assert selection.choose(op, smaller, "cuda") == "cuda"


def test_on_a_gpu_a_wrong_kernel_and_one_that_does_not_fit_are_left_alone(imagined_gpu, measured, caplog):
    logits = torch.empty(4, device=imagined_gpu)
    measured.kernel = None
    assert selection.choose("generator_loss", logits, None) == "reference"
    assert "failed or gave a wrong result" in ops.explain("generator_loss", logits)["cuda"]
    measured.error = torch.OutOfMemoryError("full")
    for _ in range(2):
        assert selection.choose("discriminator_loss", logits, None) == "reference"
    assert measured.measurements == 2
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert record.message.startswith("there is no memory for measuring Case(direction='step'")


def test_whether_there_is_a_kernel_is_told_without_measuring(imagined_gpu, measured, monkeypatch):
    maps = torch.empty(2, 3, 4, 4, device=imagined_gpu)
    assert selection.could_choose_kernel("batch_norm_leaky_relu", maps)
    assert not selection.could_choose_kernel("batch_norm_leaky_relu", maps.double())
    assert not selection.could_choose_kernel("batch_norm_leaky_relu", maps, "reference")
    with pytest.raises(ValueError, match="backend='cpu' cannot run"):
        selection.could_choose_kernel("batch_norm_leaky_relu", maps, "cpu")
    assert measured.measurements == 0


def test_nothing_is_measured_while_a_graph_is_captured(imagined_gpu, measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert selection.choose("generator_loss", torch.empty(4, device=imagined_gpu), None) == "cuda"
    assert measured.measurements == 0


def test_cuda_kernels_give_their_reason_to_refuse(imagined_gpu, monkeypatch):
    logits = torch.empty(4, device=imagined_gpu)
    assert "got one on cpu" in cuda.can_run("generator_loss", torch.empty(4))
    assert "got torch.float64" in cuda.can_run("generator_loss", logits.double())
    assert cuda.can_run("linear", logits) == "linear has no CUDA kernel"
    monkeypatch.setattr(cuda, "MISSING", "this build of ganvas has no CUDA kernels")
    assert "no CUDA kernels" in cuda.can_run("generator_loss", logits)


def test_a_device_is_asked_once_whether_the_kernels_run_there(imagined_gpu, monkeypatch):
    asked = []
    monkeypatch.setattr(cuda.native, "cuda_refusal", lambda index: asked.append(index) or "the driver is too old")
    for _ in range(2):
        reason = cuda.can_run("generator_loss", torch.empty(4, device=imagined_gpu))
        assert reason == "CUDA refuses the kernels: the driver is too old"
    assert asked == [0]


UNUSABLE = [
    ("build", "ganvas was built without CUDA kernels"),
    ("driver", "CUDA refuses the kernels: cudaErrorInsufficientDriver, CUDA driver version is insufficient"),
    ("generation", "the CUDA kernels need compute capability 8.0; got 7.5"),
]


@pytest.fixture(params=UNUSABLE, ids=[name for name, _ in UNUSABLE])
def unusable(request, imagined_gpu, monkeypatch) -> str:
    """Why the GPU takes no kernel."""
    what, reason = request.param
    if what == "build":
        monkeypatch.setattr(cuda, "MISSING", reason)
    elif what == "driver":
        monkeypatch.setattr(cuda.native, "cuda_refusal", lambda index: reason.partition(": ")[2])
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    return reason


def test_a_gpu_that_takes_no_kernel_runs_plain_torch_and_one_warning_says_why(imagined_gpu, unusable, caplog):
    logits, maps = torch.empty(4, device=imagined_gpu), torch.empty(2, 3, 4, 4, device=imagined_gpu)
    for _ in range(2):
        assert selection.choose("generator_loss", logits, None) == "reference"
        assert selection.choose("batch_norm_leaky_relu", maps, None) == "reference"
        assert selection.choose("conv_bn_leaky_relu", maps, None) == "reference"
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", f"on cuda:0 ganvas runs as plain torch: {unusable}")
    ]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_is_asked_for_raises_with_what_the_gpu_lacks(imagined_gpu, unusable, monkeypatch, backend):
    monkeypatch.setattr(triton, "is_installed", lambda: True)
    maps = torch.empty(2, 3, 4, 4, device=imagined_gpu)
    with pytest.raises(ValueError, match=f"backend='{backend}' cannot run conv_bn_leaky_relu: {unusable}"):
        selection.choose("conv_bn_leaky_relu", maps, backend)
    monkeypatch.setenv("GANVAS_BACKEND", backend)
    with pytest.raises(ValueError, match=f"GANVAS_BACKEND='{backend}' cannot run generator_loss: {unusable}"):
        ops.generator_loss(maps)


def test_tritons_convolutions_have_the_cuda_kernels_around_them(imagined_gpu, monkeypatch):
    logits = torch.empty(4, device=imagined_gpu)
    with pytest.raises(ValueError, match=r"backend='triton' cannot run generator_loss: .* has none"):
        selection.choose("generator_loss", logits, "triton")
    monkeypatch.setenv("GANVAS_BACKEND", "triton")
    assert selection.choose("generator_loss", logits, None) == "triton"
    assert ops.explain("generator_loss", logits)["triton"] is None
    with pytest.raises(ValueError, match=r"GANVAS_BACKEND='triton' cannot run generator_loss: .*float64"):
        selection.choose("generator_loss", logits.double(), None)


def test_an_older_or_another_makers_gpu_is_refused(imagined_gpu, monkeypatch):
    logits = torch.empty(4, device=imagined_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert cuda.can_run("generator_loss", logits) == "the CUDA kernels need compute capability 8.0; got 7.5"
    cuda._device_refusals.clear()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch is built for another maker's" in cuda.can_run("generator_loss", logits)


def test_a_convolution_that_triton_does_not_take_is_refused_where_triton_is_asked_for(imagined_gpu, monkeypatch):
    monkeypatch.setattr(triton, "is_installed", lambda: True)
    maps, weight = torch.empty(2, 4, 6, 6, device=imagined_gpu), torch.empty(4, 2, 3, 3, device=imagined_gpu)
    with pytest.raises(ValueError, match=r"backend='triton' cannot run this convolution: .*groups=2, padding=0"):
        ops.conv_bn_leaky_relu(maps, weight, *[None] * 5, groups=2, training=True, backend="triton")


@pytest.mark.parametrize("installed", [True, False])
def test_triton_has_the_convolutions_where_it_is_installed(imagined_gpu, monkeypatch, installed):
    monkeypatch.setattr(triton, "is_installed", lambda: installed)
    maps = torch.empty(2, 3, 4, 4, device=imagined_gpu)
    assert selection.choose("conv_bn_leaky_relu", maps, None) == ("triton" if installed else "cuda")
    assert triton.can_run("conv_bn_leaky_relu", maps) == (None if installed else "Triton is not installed")
    monkeypatch.setattr(cuda, "MISSING", "this build of ganvas has no CUDA kernels")
    assert selection.choose("conv_bn_leaky_relu", maps, None) == "reference"


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
