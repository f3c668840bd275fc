"""Where a raw gradient stays pending on a GPU. Times are imagined, results are real."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("ganvas._native")

from ganvas.ops import tuning
from ganvas.ops.backends import cpu
from ganvas.ops.backends.gpu import convolution, measure, raw_gradient
from ganvas.ops.backends.gpu.convolution import TritonConvolution
from ganvas.ops.backends.gpu.pending_coefficients import pending_gradient
from ganvas.ops.backends.trial import backward_trial, trial
from ganvas.ops.convolution import Geometry

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
BOTH = ("backward_weight", "backward_input")


@pytest.fixture(autouse=True)
def imagined_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("GANVAS_AUTOTUNE", "1")
    monkeypatch.setenv("GANVAS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("GANVAS_BACKEND", raising=False)
    monkeypatch.setattr(tuning, "decisions", {})
    monkeypatch.setattr(tuning, "_remembered", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(convolution, "device_name", lambda index: "imagined")
    monkeypatch.setattr(raw_gradient, "settle", cpu.settle)
    monkeypatch.setattr(raw_gradient, "trial", lambda kernels, *shape: trial(cpu, *shape))


@pytest.fixture
def times(monkeypatch) -> dict[str, float]:
    """Milliseconds of each way, "" for torch's."""
    times = {"": 3.0, "settled": 2.0, "pending": 1.0}
    monkeypatch.setattr(measure, "_time_in_turns", lambda ways: {name: times[name] for name in ways})
    return times


def choice(
    directions: tuple[str, ...] = BOTH, channels: tuple[int, int] = (5, 6), size: int = 3, backend: str | None = None,
    dtype: torch.dtype = torch.float32, batch: int = 2,
) -> bool:  # fmt: skip
    geometry, weight = Geometry(padding=(size // 2, size // 2)), torch.empty(channels[1], channels[0], size, size)
    readers = dict.fromkeys(directions, TritonConvolution(geometry))
    shape = torch.Size((batch, channels[0], 4, 5))
    return raw_gradient.stays_pending(geometry, weight, shape, dtype, readers, backend)


@pytest.mark.parametrize(("pending", "stays"), [(1.0, True), (2.5, False)])
@pytest.mark.parametrize(
    ("directions", "name"),
    [
        (BOTH, "settle_backward"),
        (BOTH[:1], "settle_backward_weight"),
        (BOTH[1:], "settle_backward_input"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_faster_way_is_taken_and_remembered(times, caplog, directions, name, dtype, pending, stays):
    times["pending"] = pending
    assert choice(directions, dtype=dtype) is stays
    assert caplog.text == ""  # both are right
    (entry,) = tuning.entries()
    dtype_name = str(dtype).removeprefix("torch.")
    assert entry.case == tuning.Case(name, "conv3x3_padding1", dtype_name, "imagined", 0, 2, 5, 6, 4, 5)
    assert (entry.native_ms, entry.torch_ms, entry.configuration) == (
        min(pending, 2.0), 3.0, "pending" if stays else "settled",
    )  # fmt: skip
    times["pending"] = 4.0 - pending
    tuning.decisions.clear()
    assert choice(directions, dtype=dtype, batch=3) is stays  # which is measured as 2


@pytest.mark.parametrize("wrong", ["alpha", "beta", "delta", "of_weight", "of_bias"])
def test_a_wrong_pending_gradient_is_left_out(times, caplog, monkeypatch, wrong):
    def made(*arguments):
        raw, *of_norm = pending_gradient(*arguments)
        if hasattr(raw, wrong):
            return raw._replace(**{wrong: 1.1 * getattr(raw, wrong)}), *of_norm
        at = ("of_weight", "of_bias").index(wrong)
        of_norm[at] = 1.1 * of_norm[at]
        return raw, *of_norm

    monkeypatch.setattr(raw_gradient, "pending_gradient", made)
    assert choice(BOTH[:1]) is False
    assert "pending of Case(direction='settle_backward_weight'" in caplog.text
    assert "is wrong by" in caplog.text
    assert tuning.entries()[0].configuration == "settled"


def test_each_way_begins_with_the_same_gradient(times, monkeypatch):
    results = []

    def calls_twice(case, natives, torchs, device):
        results.extend([way() for way in (*natives.values(), torchs, torchs)])
        return tuning.Entry(case, 1.0, 2.0, "settled")

    monkeypatch.setattr(raw_gradient, "fastest", calls_twice)
    assert choice() is False
    settled, pending, torchs, again = results
    assert [len(one) for one in results] == [6] * 4  # weight; g, γ and β of the input; γ and β
    for a, b, c, d in zip(settled, pending, torchs, again):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c, atol=1e-4, rtol=1e-4)
        assert torch.equal(c, d)


def test_the_norm_leaves_of_a_trials_gradient_what_sums_up_to_little():
    shape = (torch.Size((6, 5, 1, 1)), torch.Size((2, 5, 4, 5)), torch.float32, torch.device("cpu"))
    of_raw = trial(cpu, Geometry(), *shape, "backward_weight")
    of_both = backward_trial(of_raw)
    assert of_both.of.raw.mean((0, 2, 3)).abs().max() > 0.3
    raw, _, _ = cpu.settle(of_both.of.raw.clone(), of_both.sums, of_both.after)
    expected = of_both.after.scale.view(1, -1, 1, 1) * of_raw.raw
    torch.testing.assert_close(raw, expected, atol=20 * of_both.after.eps, rtol=1e-5)  # eps stands beside the variance


def test_what_does_not_fit_into_memory_is_settled(monkeypatch):
    calls = []

    def out_of_memory(*_):
        calls.append(1)
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(tuning, "remembered", out_of_memory)
    assert [choice(), choice()] == [False, False]
    assert calls == [1]


@pytest.mark.parametrize(
    ("directions", "channels", "size", "stays"),
    [
        (BOTH, (128, 256), 1, True),  # loaded once for the input's gradient, twice for the weight's
        (BOTH, (129, 256), 1, False),
        (BOTH[1:], (512, 16), 1, True),
        (BOTH, (16, 16), 3, False),
        (BOTH[1:], (16, 16), 3, False),
        (BOTH[:1], (21, 64), 3, True),  # 189 rows of the weight's gradient
        (BOTH[:1], (22, 64), 3, False),
    ],
)
def test_unmeasured_few_loads_are_pending(monkeypatch, directions, channels, size, stays):
    monkeypatch.setattr(tuning, "remembered", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choice(directions, channels, size) is stays
    assert tuning.decisions == {}  # the next call may be outside of a graph
    assert choice(directions, channels, size, backend="triton") is stays
    monkeypatch.setenv("GANVAS_AUTOTUNE", "0")
    assert choice(directions, channels, size) is stays
    monkeypatch.setenv("GANVAS_AUTOTUNE", "1")
    monkeypatch.setenv("GANVAS_BACKEND", "triton")
    assert choice(directions, channels, size) is stays
