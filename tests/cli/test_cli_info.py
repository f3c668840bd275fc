"""``ganvas info``: what is installed and what would run."""

from __future__ import annotations

import pytest
import torch

import ganvas as package
from ganvas import models, ops


def test_info_shows_versions_and_threads(ganvas):
    code, out, err = ganvas("info")
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if line)
    assert lines["ganvas"] == package.__version__
    assert lines["torch"] == torch.__version__
    assert f"{torch.get_num_threads()} threads" in lines["cpu"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", ["batch_norm_leaky_relu", "discriminator_loss", "generator_loss"])
def test_info_says_which_backend_runs_and_why_not_those_before_it(ganvas, monkeypatch, operation, dtype):
    monkeypatch.setattr(ops, "explain", lambda op, tensor: {"triton": f"no GPU for {op}", "reference": None})
    row = _row(ganvas("info").out, f"{operation} {dtype} cpu")
    assert row == f"reference; not triton: no GPU for {operation}"


def test_info_names_what_the_operation_would_choose_here(ganvas, monkeypatch):
    monkeypatch.delenv("GANVAS_BACKEND", raising=False)
    refusals = ops.explain("batch_norm_leaky_relu", torch.empty(2, 8, 4, 4))
    chosen = next(name for name, refusal in refusals.items() if refusal is None)
    assert _row(ganvas("info").out, "batch_norm_leaky_relu float32 cpu").split(";")[0] == chosen


def test_info_says_what_a_forced_backend_does(ganvas, monkeypatch):
    monkeypatch.setenv("GANVAS_BACKEND", "reference")
    assert _row(ganvas("info").out, "generator_loss float32 cpu") == "reference (GANVAS_BACKEND)"
    monkeypatch.setenv("GANVAS_BACKEND", "abacus")
    assert "there is no such backend" in _row(ganvas("info").out, "generator_loss float32 cpu")


def test_models_lists_every_network_with_its_description(ganvas):
    out = ganvas("info", "--models").out
    assert out.count("\n") == len(models.names())
    for name in models.names():
        assert _row(out, name) == models.describe(name)


def test_tuning_lists_what_was_measured_and_where_it_is_kept(ganvas, monkeypatch, tmp_path):
    monkeypatch.setenv("GANVAS_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("GANVAS_AUTOTUNE", "1")
    shape = ("conv3x3_padding1", "float32", "cpu", 2, 64, 32, 48, 17, 19)
    cases = [ops.tuning.Case(direction, *shape) for direction in "abcd"]
    entries = [
        ops.tuning.Entry(cases[0], 1.25, 2.5),
        ops.tuning.Entry(cases[1], 3.0, 2.0),
        ops.tuning.Entry(cases[2], 1.0, 2.0, "64x32"),
        ops.tuning.Entry(cases[3], None, 2.0),
    ]
    monkeypatch.setattr(ops.tuning, "entries", lambda: entries)
    code, out, err = ganvas("info", "--tuning")
    assert (code, err) == (0, "")
    assert _row(out, "file") == str(ops.tuning.path())
    assert ops.tuning.path().parent == tmp_path
    assert _row(out, "measuring") == "on"
    shape_columns = "direction convolution dtype device threads batch in channels out channels height width"
    assert f"{shape_columns} native ms torch ms choice".split() in [line.split() for line in out.splitlines()]
    rows = [" ".join(_row(out, direction).split()) for direction in "abcd"]
    assert rows == [
        "conv3x3_padding1 float32 cpu 2 64 32 48 17 19 1.250 2.500 native",
        "conv3x3_padding1 float32 cpu 2 64 32 48 17 19 3.000 2.000 torch",
        "conv3x3_padding1 float32 cpu 2 64 32 48 17 19 1.000 2.000 native 64x32",
        "conv3x3_padding1 float32 cpu 2 64 32 48 17 19 wrong 2.000 torch",
    ]


def test_tuning_says_that_nothing_was_measured_and_that_measuring_is_off(ganvas, monkeypatch, tmp_path):
    monkeypatch.setenv("GANVAS_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("GANVAS_AUTOTUNE", "0")
    out = ganvas("info", "--tuning").out
    assert _row(out, "measuring") == "off (GANVAS_AUTOTUNE=0)"
    assert "Nothing is remembered" in out


def _row(out: str, name: str) -> str:
    (line,) = (line for line in out.splitlines() if line.startswith(f"{name} "))
    return line.removeprefix(name).strip()
