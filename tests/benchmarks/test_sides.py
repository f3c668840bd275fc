"""Sides are checked before they are timed, and fail one by one."""

from __future__ import annotations

import math

import pytest
import torch

from on_gpu import sides as module
from on_gpu.sides import COMPILE_MODES, Side, Sides, WrongResultError, in_turn, relative_errors


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "LEAST_SECONDS", 0.0)


@pytest.fixture
def sides(host):
    return Sides(host, lambda: 100.0)


def side(called=None, **errors):
    return Side({"step": lambda: called is not None and called.append(1)}, errors)


@pytest.mark.parametrize(
    ("errors", "status"),
    [
        ({"output": 0.020}, "measured"),
        ({"output": 0.030}, "wrong"),
        ({"output": 0.01, "gradient": 0.030}, "measured"),
        ({"output": 0.01, "gradient": 0.040}, "wrong"),
        ({"output": math.nan}, "wrong"),
    ],
)
def test_a_result_further_off_than_torchs_allows_is_wrong_and_not_timed(sides, errors, status):
    called = []
    sides.add("eager", lambda: side(output=0.01, gradient=0.01))
    sides.add("ganvas", lambda: side(called, **errors))
    sides.time("step")
    assert sides.rows["ganvas"]["status"] == status
    assert ("step_ms" in sides.rows["ganvas"]) == (status == "measured") == bool(called)
    assert sides.status()["status"] == status


def test_what_cannot_be_made_leaves_the_others(sides):
    def no_memory():
        raise torch.OutOfMemoryError("too much")

    sides.add("eager", lambda: side(output=0.01))
    sides.add("eager graph", no_memory)
    sides.add("ganvas", lambda: side(output=0.01))
    sides.time("step")
    assert sides.rows["eager graph"] == {"status": "failed", "reason": "OutOfMemoryError: too much"}
    assert all("step_ms" in sides.rows[name] for name in ("eager", "ganvas"))
    assert sides.status() == {"status": "measured"}


def test_a_first_call_that_fails_counts_as_a_failure(sides):
    sides.add("eager", lambda: Side({"step": lambda: 1 / 0}))
    assert sides.rows["eager"]["status"] == "failed"
    assert "eager" not in sides.sides


def test_a_row_without_eager_is_no_comparison(sides):
    sides.add("eager", lambda: 1 / 0)
    sides.add("ganvas", lambda: side())
    assert sides.status() == {"status": "failed", "reason": "eager: ZeroDivisionError: division by zero"}


def test_modes_of_compile_are_tried_while_there_is_time(host, monkeypatch):
    clock = iter([0.0, 0.0, 0.1, 40.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    sides = Sides(host, lambda: 30.0)
    sides.add_compiled(lambda mode: side(), every_mode=True)
    assert sides.rows[COMPILE_MODES[0]]["status"] == "measured"
    assert sides.rows[COMPILE_MODES[1]] == {
        "status": "skipped",
        "reason": "30 s were left, the mode before took 40 s",
    }


@pytest.mark.parametrize("first_works", [True, False])
def test_the_second_mode_stands_in_for_one_that_fails(sides, first_works):
    def make(mode):
        if mode == COMPILE_MODES[0] and not first_works:
            raise WrongResultError("a loss of 3")
        return side()

    sides.add_compiled(make, every_mode=False)
    assert list(sides.sides) == [COMPILE_MODES[0 if first_works else 1]]
    if not first_works:
        assert sides.rows[COMPILE_MODES[0]] == {"status": "wrong", "reason": "a loss of 3"}


def test_errors_are_relative_to_the_norm_and_nan_for_another_shape():
    exact = {"output": torch.tensor([3.0, 4.0]).double(), "gradient": torch.ones(2).double()}
    errors = relative_errors({"output": torch.tensor([3.0, 4.5]), "gradient": torch.ones(1)}, exact)
    assert errors["output"] == pytest.approx(0.1)
    assert math.isnan(errors["gradient"])


def test_inputs_take_turns():
    assert [call() for call in [in_turn([lambda: 1, lambda: 2, lambda: 3])] * 5] == [1, 2, 3, 1, 2]
