"""benchmarks/gpu.py with the CPU in the GPU's place: every section, on tiny shapes, and its ends."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_host import Host, here

import ganvas
import gpu
from ganvas.nn.traced_forward import TracedForward
from on_gpu import cases, networks, plan, sides, tables
from on_gpu.device import Gpu
from shapes import CONVOLUTIONS, LayerShape, MapShape

SCRIPT = Path(gpu.__file__)
TINY = plan.Sizes(
    copy_bytes=2**16,
    matmul_side=32,
    activations={"bfloat16": (MapShape(4, 8, 9),), "float32": (MapShape(4, 8, 4),)},
    logits=1024,
    layers=[LayerShape(kind, 4, 8, 16, 8) for kind in CONVOLUTIONS] + [LayerShape("3x3", 3, 160, 12, 5)],
    chains=[MapShape(4, 16, 8)],
    models=[
        plan.Model("dcgan", 4, {"size": 16, "channels": 3, "width": 8, "num_classes": 10}),
        plan.Model("resnet", 4, {"size": 8, "channels": 3, "width": 8}),
    ],
    shapes_with_kernels=2,
)
TORCH_SIDES = {"eager", "eager graph", "max-autotune", "max-autotune-no-cudagraphs"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(sides, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(sides, "TURNS", 2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The whole program on the host: its JSON and its tables."""
    path = tmp_path_factory.mktemp("benchmark") / "gpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sides, "LEAST_SECONDS", 0.0)
        patch.setattr(sides, "TURNS", 2)
        report = gpu.measure(plan.stages(TINY), here(Host()), 60.0, path)
    return json.loads(path.read_text()), list(tables.lines(report))


def rows(measured, section):
    return {row["name"]: row for row in measured[0]["sections"][section]}


def test_every_section_is_measured_completely(measured):
    result, _ = measured
    assert result["complete"]
    assert result["summary"]["not measured"] == []
    assert {section: len(found) for section, found in result["sections"].items()} == {
        "machine": 3, "kernels": 4, "layers": 6, "chains": 1, "models": 2, "choices": 4,
    }  # fmt: skip


def test_versions_stand_beside_the_numbers(measured):
    result, lines = measured
    versions = rows(measured, "machine")["versions"]
    assert (versions["device"], versions["torch"], versions["ganvas"]) == (
        "host",
        torch.__version__,
        ganvas.__version__,
    )
    assert result["date"]
    assert f"| torch | {torch.__version__} |" in lines


def test_kernels_have_both_parts_and_the_backend_that_ran(measured):
    for name, row in rows(measured, "kernels").items():
        assert set(row["floor"]) == ({"call", "step"} if "loss" in name else {"forward", "backward"})
        assert row["backend"] == "cpu"
        assert "NVIDIA GPU" in row["why"]
        for side in row["sides"].values():
            assert all(side[f"{part}_ms"] > 0 for part in row["floor"])


@pytest.mark.parametrize("section", ["layers", "chains"])
def test_layers_and_chains_have_every_side_its_error_and_the_floors(measured, section):
    for row in rows(measured, section).values():
        assert set(row["sides"]) == TORCH_SIDES | {"ganvas", "ganvas graph"}
        assert row["compiled"]
        for side in row["sides"].values():
            assert side["forward_ms"] > 0
            assert side["step_ms"] > 0
            assert 1e-4 < side["errors"]["output"] < 2e-2
        assert row["copies"] > 1  # they would fit in the cache
        assert row["floor"]["step"]["operations"] == 3 * row["floor"]["forward"]["operations"] > 0
        assert set(row["kept_bytes"]) == set(row["peak_bytes"]) == {"eager", "ganvas"}


def test_models_have_rates_and_memory(measured):
    found = rows(measured, "models")
    assert set(found) == {"conditional dcgan 16x16 batch 4", "resnet 8x8 batch 4"}
    for row in found.values():
        assert set(row["sides"]) == TORCH_SIDES - {"max-autotune-no-cudagraphs"} | {"ganvas", "ganvas graph"}
        assert all(side["images_per_second"] > 0 for side in row["sides"].values())
        assert set(row["peak_bytes"]) == {"eager", "max-autotune", "ganvas"}
        assert all(size > 0 for size in row["peak_bytes"].values())
    losses = [side["first_losses"] for side in found["conditional dcgan 16x16 batch 4"]["sides"].values()]
    assert set(losses[0]) == {"discriminator_loss", "generator_loss"}


def test_choices_say_what_ran(measured):
    found = rows(measured, "choices")
    assert found["backends"]["operations"]["conv_bn_leaky_relu bfloat16"]["cpu"] is None
    assert "NVIDIA" in found["backends"]["operations"]["conv_bn_leaky_relu bfloat16"]["cuda"]
    assert any("_Chain" in kernel for kernel in found["4 × 3x3 4x16x8x8"]["kernels"])


def test_tables_have_a_line_for_each_row(measured):
    result, lines = measured
    for section in ("layers", "chains", "models", "kernels"):
        for row in result["sections"][section]:
            assert sum(line.startswith(f"| {row['name']} |") for line in lines) >= 1, row["name"]


def test_cells_are_as_many_as_columns(measured):
    _, lines = measured
    columns = 0
    for line, following in zip(lines, [*lines[1:], ""]):
        if set(following) == {"|", "-"}:
            columns = line.count(" | ")
        elif line.startswith("| "):
            assert line.count(" | ") == columns, line


def test_a_wrong_ganvas_is_reported_and_not_timed(host, monkeypatch):
    forward = ganvas.nn.FusedSequential.forward
    monkeypatch.setattr(ganvas.nn.FusedSequential, "forward", lambda self, x: forward(self, x) * 1.05)
    row = networks.measure_network(host, lambda: 100.0, layers=[TINY.layers[1]], compiled=False)
    assert row["status"] == "wrong"
    assert "error of output" in row["reason"]
    assert "step_ms" not in row["sides"]["ganvas"]
    assert row["sides"]["eager"]["step_ms"] > 0


def test_a_model_with_another_loss_than_eagers_is_wrong(host, monkeypatch):
    forward = TracedForward.__call__
    monkeypatch.setattr(TracedForward, "__call__", lambda self, x: forward(self, x) * 30)
    row, _ = cases.attempt(plan.stages(TINY, "models")[1].cases[1], host, 100.0)
    assert row["status"] == "wrong"
    assert "loss of the first step is" in row["reason"]


@pytest.mark.parametrize("graphs", [True, False])
def test_the_peak_of_torch_compile_has_what_its_graphs_hold(monkeypatch, graphs):
    class Recording(Host):
        held = 2**30

        def graph_bytes(self):
            return self.held

        def compiled(self, network, mode):
            self.held += 2**20  # also by a mode that then fails
            if mode == "max-autotune" and not graphs:
                raise RuntimeError("no graphs")
            return super().compiled(network, mode)

        def peak_bytes(self, call):
            return 5

    row, _ = cases.attempt(plan.stages(TINY, "models")[2].cases[1], Recording(), 100.0)
    of_compile = {"max-autotune": 5 + 2**20} if graphs else {"max-autotune-no-cudagraphs": 5}
    assert row["peak_bytes"] == {"eager": 5, "ganvas": 5, **of_compile}


def test_what_graphs_hold_is_what_lies_in_pools_of_their_own(monkeypatch):
    pools = {(0, 0): 7, (0, 1): 20, (3, 0): 100}
    segments = [{"segment_pool_id": pool, "total_size": size, "allocated_size": 3} for pool, size in pools.items()]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert Gpu.graph_bytes(None) == 120


def test_every_case_can_be_sent_to_a_process_of_its_own():
    of_the_plan = [case for stage in plan.stages(plan.Sizes()) for case in stage.cases]
    assert pickle.loads(pickle.dumps(of_the_plan)) == of_the_plan


def test_shares_of_the_time_make_a_whole():
    assert sum(stage.share for stage in plan.stages(plan.Sizes())) == pytest.approx(1.0)


def test_what_torch_compile_is_added_to_has_been_measured_without_it_before():
    first: dict[tuple[str, str], bool] = {}
    for stage in plan.stages(plan.Sizes()):
        for case in stage.cases:
            compiled = case.arguments.get("compiled", False)
            assert first.setdefault((stage.section, case.name), compiled) is False
            assert compiled == (case.least_seconds == plan.COMPILE_SECONDS)


def test_one_section_has_all_the_time():
    stages = plan.stages(TINY, "chains")
    assert [stage.section for stage in stages] == ["machine", "chains", "chains"]


def test_time_that_is_too_short_skips_and_says_so(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    report = gpu.measure(plan.stages(TINY, "layers"), here(Host()), 0.01, path)
    missing = json.loads(path.read_text())["summary"]["not measured"]
    assert len(missing) == len(list(report.missing())) == 3 + len(TINY.layers)
    assert all("skipped: 0 s of its share" in line for line in missing)
    assert "- layers, 1x1 4x8x8x8 → 16: skipped" in capsys.readouterr().out


def test_an_end_before_the_end_keeps_what_there_is(tmp_path, capsys):
    def execute(case, seconds):
        if case.name == "matmul":
            raise KeyboardInterrupt
        return {"status": "measured", "bytes_per_second": 5e9}

    path = tmp_path / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        gpu.measure(plan.stages(TINY), execute, 8.0, path)
    result = json.loads(path.read_text())
    assert not result["complete"]
    assert [row["name"] for row in result["sections"]["machine"]] == ["versions", "copy"]
    assert "5 GB/s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_script_says_so_in_one_line():
    ended = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "finds none" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--only", "nothing"], ["--json", "/no/such/folder/x.json"]])
def test_arguments_that_are_not_accepted_are_named(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err
