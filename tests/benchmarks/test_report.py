"""What the rows say: ratios, floors, claims, and everything that is missing."""

from __future__ import annotations

import json
import math

import pytest

from on_gpu import plan, tables
from on_gpu.report import Report, ratios


def times(**milliseconds):
    return {
        name.replace("_", " ") if name != "max_autotune" else "max-autotune": {
            "status": "measured",
            "step_ms": value,
            "forward_ms": value / 3,
            "ready_seconds": 0.5,
            "errors": {"output": 0.002, "gradient of the input": 0.004},
        }
        for name, value in milliseconds.items()
    }


def row(channels=64, **milliseconds):
    floor = {"bytes": 6_000_000, "operations": 4_000_000_000}
    return {
        "status": "measured",
        "channels": channels,
        "compiled": "max_autotune" in milliseconds,
        "sides": times(**milliseconds),
        "floor": {"forward": floor, "step": floor},
        "kept_bytes": {"eager": 100, "ganvas": 45},
        "peak_bytes": {"eager": 2**21, "ganvas": 2**20},
    }


@pytest.fixture
def report(tmp_path):
    report = Report(tmp_path / "gpu.json", 8.0, plan.SECTIONS)
    report.add("machine", "copy", {"status": "measured", "bytes_per_second": 3e12})
    report.add("machine", "matmul", {"status": "measured", "operations_per_second": 8e14})
    return report


def test_ganvas_counts_by_its_faster_side_against_the_better_of_torch():
    found = ratios(row(eager=6.0, eager_graph=3.0, max_autotune=4.0, ganvas=2.5, ganvas_graph=2.0), "step")
    assert found == {"eager": 3.0, "eager graph": 1.5, "compile": 2.0, "best": 2.0}


def test_without_torch_compile_there_is_no_best():
    assert ratios(row(eager=6.0, ganvas=2.0), "step") == {"eager": 3.0}


def test_floors_are_bytes_and_operations_at_the_measured_rates(report):
    of_memory, of_arithmetic = report.floor_ms(row(eager=1.0, ganvas=1.0), "step")
    assert of_memory == pytest.approx(0.002)
    assert of_arithmetic == pytest.approx(0.005)


def test_the_mean_is_of_narrow_layers_and_the_worst_of_all(report):
    report.add("layers", "a", row(64, eager=8.0, max_autotune=4.0, ganvas=1.0))
    report.add("layers", "b", row(128, eager=3.0, max_autotune=1.0, ganvas=1.0))
    report.add("layers", "wide", row(512, eager=0.9, max_autotune=1.0, ganvas=1.0))
    report.add("layers", "not compiled", row(64, eager=1.0, ganvas=2.0))
    best, eager = (report.summary()[f"layers: step against {key}"] for key in ("best", "eager"))
    assert best == {
        "geometric mean up to 128 channels": pytest.approx(2.0),
        "rows in it": 2,
        "worst": ["wide", 0.9],
        "rows": 3,
    }
    assert (eager["rows in it"], eager["worst"]) == (3, ["not compiled", 0.5])


def test_shares_of_the_bandwidth_are_of_ganvas_kernels(report):
    sides = {"eager": {"status": "measured", "call_ms": 9.0}, "ganvas": {"status": "measured", "call_ms": 4.0}}
    floor = {"call": {"bytes": 9_000_000_000, "operations": 0}}
    report.add("kernels", "k", {"status": "measured", "backend": "cuda", "bytes": 3, "sides": sides, "floor": floor})
    assert report.summary()["least share of the bandwidth"] == pytest.approx(0.75)
    assert any("75%" in line and "cuda" in line for line in tables.lines(report))


def test_a_later_stage_replaces_a_row_and_its_failure_does_not(report):
    report.add("layers", "a", row(eager=2.0, ganvas=1.0))
    report.add("layers", "a", {"status": "stopped", "reason": "not done after the 9 s that were left"})
    assert report.sections["layers"]["a"]["sides"]["ganvas"]["step_ms"] == 1.0
    assert ("layers, a", "with torch.compile stopped: not done after the 9 s that were left") in report.missing()
    report.add("layers", "a", row(eager=2.0, max_autotune=1.5, ganvas=1.0))
    assert report.sections["layers"]["a"]["compiled"]
    assert not list(report.missing())


def test_everything_without_numbers_is_listed(report):
    report.add("layers", "a", {"status": "skipped", "reason": "no time"})
    sides = times(eager=1.0, ganvas=1.0)
    sides["ganvas graph"] = {"status": "wrong", "reason": "far off"}
    sides["ganvas"]["note"] = "runs without a CUDA graph"
    report.add("models", "b", {"status": "measured", "compiled": False, "batch": 1, "sides": sides, "peak_bytes": {}})
    text = "\n".join(tables.lines(report))
    assert "- layers, a: skipped: no time" in text
    assert "- models, b, ganvas graph: wrong: far off" in text
    assert "- models, b, ganvas: runs without a CUDA graph" in text


@pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
def test_a_models_memory_stands_beside_that_of_torch_compile(report, mode):
    peaks = {"eager": 8 * 2**20, "ganvas": 2 * 2**20, mode: 5 * 2**20}
    report.add("models", "a", {**row(eager=2.0, ganvas=1.0), "peak_bytes": peaks})
    line = next(line for line in tables.lines(report) if line.startswith("| a |"))
    assert line.endswith("| 8 | 2 | 0.25 | 5 |")


def test_a_side_that_is_wrong_stands_as_such_in_the_table(report):
    of_layer = row(eager=1.0, ganvas=1.0)
    of_layer["sides"]["ganvas graph"] = {"status": "wrong", "reason": "far off"}
    report.add("layers", "a", of_layer)
    cells = next(line for line in tables.lines(report) if line.startswith("| a |")).split(" | ")
    assert cells[6] == "wrong"


def test_the_file_is_whole_after_each_row_and_has_no_nan(report, tmp_path):
    report.add("layers", "a", {"status": "measured", **row(eager=math.nan, ganvas=1.0)})
    found = json.loads((tmp_path / "gpu.json").read_text(), parse_constant=pytest.fail)
    assert found["sections"]["layers"][0]["sides"]["eager"]["step_ms"] is None
    assert not found["complete"]
    assert found["minutes"] == 8.0
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_claims_without_numbers_are_left_open(tmp_path):
    report = Report(None, 8.0, plan.SECTIONS)
    summary = report.summary()
    assert summary["least share of the bandwidth"] is None
    assert summary["layers: step against best"]["worst"] is None
    assert summary["models"] == {}
    assert any(line.startswith("| layers: step against best | ≥ 1.5") for line in tables.lines(report))
