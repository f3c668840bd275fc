"""What benchmarks/gpu.py asks of a GPU, and the whole of it on small shapes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from on_gpu import plan, sides  # noqa: E402
from on_gpu.cases import Worker, attempt, run  # noqa: E402
from on_gpu.device import Gpu  # noqa: E402
from on_gpu.report import Report  # noqa: E402
from shapes import CONVOLUTIONS, LayerShape, MapShape  # noqa: E402

SMALL = plan.Sizes(
    copy_bytes=2**24,
    matmul_side=512,
    activations={"bfloat16": (MapShape(16, 32, 16),)},
    logits=2**16,
    layers=[LayerShape(kind, 16, 32, 64, 16) for kind in CONVOLUTIONS],
    chains=[MapShape(16, 32, 16)],
    models=[
        plan.Model("dcgan", 8, {"size": 32, "channels": 3, "num_classes": 10}),
        plan.Model("resnet", 16, {"size": 32, "channels": 3}),
    ],
    shapes_with_kernels=2,
)


@pytest.fixture
def gpu():
    before = torch.backends.cudnn.benchmark
    yield Gpu()
    torch.backends.cudnn.benchmark = before


def test_a_captured_call_runs_again_on_what_its_inputs_are_then(gpu):
    x = torch.ones(8, device="cuda")
    captured = gpu.capture(lambda: 3 * x)
    x.fill_(2.0)
    captured.replay()
    assert captured.results.tolist() == [6.0] * 8


def test_after_a_capture_that_failed_the_device_asks_to_be_replaced():
    script = """
        import torch
        from on_gpu.device import Gpu
        gpu = Gpu()
        assert gpu.recover()
        x = torch.ones(8, device="cuda")
        try:
            gpu.capture(lambda: x.sum().item())
        except RuntimeError:
            pass
        else:
            raise AssertionError("a capture cannot hold .item()")
        assert not gpu.recover()
    """
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}  # its own process: this one has other tests to run
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=True, timeout=300)


def test_seconds_are_those_of_the_gpu(gpu):
    cycles = 20_000_000  # 5 to 40 ms
    one, four = (gpu.seconds(lambda: torch.cuda._sleep(cycles), count) for count in (1, 4))
    assert 0.001 < one < 0.2
    assert four == pytest.approx(4 * one, rel=0.3)


def test_the_peak_is_over_what_lived_before(gpu):
    kept = torch.empty(2**24, device="cuda")  # noqa: F841
    peak = gpu.peak_bytes(lambda: torch.empty(2**22, dtype=torch.uint8, device="cuda"))
    assert peak == 2**22


def test_what_a_graph_holds_is_counted_apart_from_the_peak(gpu):
    x = torch.zeros(2**22, device="cuda")
    captured = gpu.capture(lambda: (x + 1).sum())
    assert gpu.graph_bytes() >= 2**24
    assert gpu.peak_bytes(captured.replay) == 0


def test_kernels_are_those_of_the_gpu(gpu):
    a = torch.randn(512, 512, device="cuda")
    milliseconds = gpu.kernels(lambda: (a @ a).relu())
    assert len(milliseconds) >= 2
    assert all(value > 0 for value in milliseconds.values())
    assert not any(name.startswith("aten::") for name in milliseconds)


@pytest.mark.exhaustive
def test_every_section_is_measured_but_for_what_the_time_is_too_short_for(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(sides, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(plan, "COMPILE_SECONDS", 1e9)
    report = Report(tmp_path / "gpu.json", 5.0, plan.SECTIONS)
    run(plan.stages(SMALL), lambda case, seconds: attempt(case, gpu, seconds)[0], 300.0, report.add)
    missing = [reason for _, reason in report.missing() if not reason.startswith("with torch.compile skipped")]
    assert missing == []


@pytest.mark.exhaustive
def test_a_process_of_its_own_measures_with_torch_compile():
    worker = Worker(Gpu)
    try:
        case = next(case for stage in plan.stages(SMALL, "layers")[2:] for case in stage.cases)
        row = worker(case, 300.0)
    finally:
        worker.close()
    assert row["status"] == "measured", row
    assert row["sides"]["max-autotune"]["status"] == "measured", row["sides"]["max-autotune"]
