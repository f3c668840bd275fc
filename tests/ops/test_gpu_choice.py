"""Which way a GPU takes: the fastest right one. Times are imagined, results are real."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("ganvas._native")
pytest.importorskip("triton")

from ganvas.ops import steps_on_gpu, tuning
from ganvas.ops.backends import cpu
from ganvas.ops.backends.gpu import convolution, measure
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending, with_statistics

CASE = tuning.Case("forward", "conv3x3_padding1", "float32", "imagined", 0, 8, 16, 16, 16, 16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gpu_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "decisions", {})
    monkeypatch.delenv("GANVAS_BACKEND", raising=False)


@pytest.fixture
def times(monkeypatch) -> dict[str, float]:
    """Milliseconds by configuration, "" for torch's way."""
    times = {"": 2.0}
    monkeypatch.setattr(measure, "_time_in_turns", lambda ways: {name: times[name] for name in ways})
    return times


def right() -> tuple[Tensor, ...]:
    return (torch.linspace(-1, 1, 64),)


def wrong() -> tuple[Tensor, ...]:
    return (torch.linspace(-1, 1.1, 64),)


def not_finite() -> tuple[Tensor, ...]:
    return (torch.linspace(-1, 1, 64).index_fill(0, torch.tensor([3]), float("nan")),)


def not_finite_in_the_second() -> tuple[Tensor, ...]:
    return *right(), *not_finite()


def right_twice() -> tuple[Tensor, ...]:
    return *right(), *right()


def out_of_memory() -> tuple[Tensor, ...]:
    raise torch.OutOfMemoryError("CUDA out of memory")


def does_not_compile() -> tuple[Tensor, ...]:
    raise RuntimeError("out of resource: shared memory")


def test_the_fastest_configuration_stands_beside_torch(times):
    times |= {"a": 3.0, "b": 1.5, "c": 1.75}
    entry = measure.fastest(CASE, {"a": right, "b": right, "c": right}, right, CPU)
    assert entry == tuning.Entry(CASE, 1.5, 2.0, "b")
    assert entry.native
    times["b"] = 9.0
    assert measure.fastest(CASE, {"b": right}, right, CPU) == tuning.Entry(CASE, 9.0, 2.0, "b")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (wrong, "is wrong by 0.0"),
        (not_finite, "is wrong by nan"),
        (out_of_memory, "does not fit into memory"),
        (does_not_compile, "RuntimeError: out of resource: shared memory"),
    ],
)
def test_what_is_wrong_or_fails_is_left_out_and_named(times, caplog, bad, message):
    times["good"] = 1.0
    entry = measure.fastest(CASE, {"bad": bad, "good": right}, right, CPU)
    assert entry.configuration == "good"
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert caplog.records[0].message.startswith("bad of Case(")
    assert message in caplog.text


def test_what_no_way_has_memory_for_is_not_remembered_as_wrong(times, monkeypatch, tmp_path, caplog):
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        measure.fastest(CASE, {"bad": wrong, "large": out_of_memory}, right, CPU)
    monkeypatch.setenv("GANVAS_AUTOTUNE", "1")
    monkeypatch.setenv("GANVAS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_remembered", {})
    monkeypatch.setattr(convolution, "device_name", lambda index: "imagined")
    monkeypatch.setattr(convolution, "trial", lambda *_: out_of_memory())
    caplog.clear()
    assert choice() is None
    assert choice() is None
    assert tuning.entries() == []
    assert [record.message.split(" (")[0] for record in caplog.records] == ["there is no memory for measuring"]


def test_every_result_has_to_be_finite(times):
    assert measure.fastest(CASE, {"bad": not_finite_in_the_second}, right_twice, CPU).native_ms is None


class Timeline:
    """A processor that launches kernels and a GPU that runs them, each with a clock of its own, in seconds."""

    def __init__(self) -> None:
        self.processor = self.gpu = 0.0

    def launch(self, launching: float, running: float) -> None:
        self.processor += launching
        self.gpu = max(self.processor, self.gpu) + running

    def way(self, launching: float, running: float):
        return lambda: self.launch(launching, running)

    def sleep(self, cycles: int) -> None:
        self.launch(5e-6, cycles / 1.5e9)

    def event(self, enable_timing: bool):
        """Of torch.cuda.Event as much as is used."""
        event = SimpleNamespace()

        def record() -> None:
            event.time = max(self.processor, self.gpu)

        def synchronize() -> None:
            self.processor = max(self.processor, event.time)

        event.record, event.synchronize = record, synchronize
        event.elapsed_time = lambda end: 1000 * (end.time - event.time)
        return event


def test_what_launching_takes_does_not_count(monkeypatch):
    timeline = Timeline()
    monkeypatch.setattr(torch.cuda, "Event", timeline.event)
    monkeypatch.setattr(torch.cuda, "_sleep", timeline.sleep, raising=False)
    ways = {"slow to launch": (1e-4, 1e-5), "quick to launch": (2e-5, 2e-5), "large": (5e-5, 3e-3)}
    times = measure._time_in_turns({name: timeline.way(*of_way) for name, of_way in ways.items()})
    assert times == pytest.approx({name: 1000 * running for name, (_, running) in ways.items()}, rel=1e-3)


def test_where_nothing_is_right_torch_runs(times):
    entry = measure.fastest(CASE, {"bad": wrong}, right, CPU)
    assert entry == tuning.Entry(CASE, None, 2.0)
    assert not entry.native


def test_a_rounding_of_each_value_is_not_wrong(times):
    times["rounded"] = 1.0
    values = torch.randn(4096)

    def rounded() -> tuple[Tensor, ...]:
        return ((values * (1 + 2**-9 * torch.randn(4096))).bfloat16(),)

    entry = measure.fastest(CASE, {"rounded": rounded}, lambda: (values.bfloat16(),), CPU)
    assert entry.configuration == "rounded"


@pytest.fixture
def measured(monkeypatch) -> list[tuning.Case]:
    """The cases that are measured; each answers that its last configuration is the fastest."""
    cases: list[tuning.Case] = []

    def remembered(case: tuning.Case, _) -> tuning.Entry:
        cases.append(case)
        return tuning.Entry(case, 1.0, 2.0, names(case)[-1])

    monkeypatch.setenv("GANVAS_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "remembered", remembered)
    monkeypatch.setattr(convolution, "device_name", lambda index: "imagined")
    return cases


def names(case: tuning.Case) -> list[str]:
    weight = torch.Size((case.out_channels, case.in_channels, 3, 3))
    shape = convolution.shape_of(case)
    found = convolution._candidates(Geometry(padding=(1, 1)), weight, shape, torch.bfloat16, case.direction)
    return [str(one) for one in found]


def choice(direction: str = "forward", channels: int = 64, batch: int = 32, side: int = 16, **options):
    weight = torch.empty(channels, channels, 3, 3)
    shape = torch.Size((batch, channels, side, side))
    return convolution.chosen_convolution(
        options.pop("geometry", Geometry(padding=(1, 1))), weight, shape, torch.bfloat16, direction, **options
    )


@pytest.mark.parametrize("direction", ["forward", "forward_with_statistics", "backward_input", "backward_weight"])
def test_each_direction_is_measured_once_and_gets_its_configuration(measured, direction):
    chosen = choice(direction)
    assert str(chosen) == names(measured[0])[-1]
    assert chosen.activates is (direction != "backward_input")
    assert choice(direction) is chosen
    assert measured == [tuning.Case(direction, "conv3x3_padding1", "bfloat16", "imagined", 0, 32, 64, 64, 16, 16)]


@pytest.mark.parametrize("direction", ["forward", "forward_with_statistics", "backward_input", "backward_weight"])
@pytest.mark.parametrize("side", [1, 3])
def test_several_taps_may_read_a_written_activation(direction, side):
    kernel = convolution._weight_gradient() if direction == "backward_weight" else convolution._convolution()
    arguments = (Geometry(), torch.Size((64, 64, side, side)), torch.Size((32, 64, 16, 16)), torch.bfloat16, direction)
    found = kernel.configurations(*arguments)
    candidates = convolution._candidates(*arguments)
    assert [one.configuration for one in candidates if not one.activates] == found
    worth_it = side > 1 and direction != "backward_input"
    assert [one.configuration for one in candidates if one.activates] == (found[:4] if worth_it else [])
    assert len({str(one) for one in candidates}) == len(candidates)


@pytest.mark.parametrize("activates", [False, True])
def test_a_written_activation_is_what_the_kernels_read(monkeypatch, activates):
    read: list[Pending] = []

    def kernel(geometry, *arguments, configuration) -> tuple[Tensor, ...]:
        assert configuration == "a configuration"
        read.extend(one for one in arguments if isinstance(one, Pending))
        return (x,) * 4

    names = ("forward", "forward_with_statistics", "backward_input", "backward_weight")
    for module in ("_convolution", "_weight_gradient"):
        monkeypatch.setattr(convolution, module, lambda: SimpleNamespace(**dict.fromkeys(names, kernel)))
    monkeypatch.setattr(convolution, "activate", cpu.activate)
    monkeypatch.setattr(convolution, "finish_statistics", lambda *_: None)
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    pending = with_statistics(x, None, None, torch.zeros(1, 4), torch.ones(1, 4), 0.0, 0.5, False, True)
    native = convolution.TritonConvolution(Geometry(), "a configuration", activates)
    native.forward(pending, x, None)
    native.forward_with_statistics(pending, x, *[None] * 5, 0.0, 0.0, 0.0, False, 1)
    native.backward_weight(x, x, pending)
    native.backward_input(x, x, pending)
    assert read[3] is pending  # whose kink it needs
    for one in read[:3]:
        assert (one.scale is None) is activates
        torch.testing.assert_close(one.stored, torch.where(x > 0, x, 0.5 * x) if activates else x)


def test_batches_between_two_powers_of_two_share_a_choice_and_large_ones_are_cut(measured):
    choice(batch=33)
    choice(batch=63)
    choice(batch=2**15, side=64)
    assert [case.batch for case in measured] == [32, 32, 512]


def test_a_configuration_that_there_is_no_more_is_not_taken(measured, monkeypatch):
    monkeypatch.setattr(tuning, "remembered", lambda case, _: tuning.Entry(case, 1.0, 2.0, "of an older version"))
    assert choice() is None


def test_what_does_not_fit_into_memory_is_torchs(measured, monkeypatch):
    def remembered(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(tuning, "remembered", remembered)
    assert choice() is None
    assert choice() is None


@pytest.mark.parametrize(("channels", "native"), [(128, True), (129, False)])
def test_unmeasured_few_channels_are_tritons(measured, monkeypatch, channels, native):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert (choice(channels=channels) is not None) is native
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("GANVAS_AUTOTUNE", "0")
    assert (choice(channels=channels) is not None) is native
    assert measured == []


def test_a_backend_that_is_asked_for_leaves_no_choice(measured, monkeypatch):
    assert choice(backend="cuda") is None
    assert choice(channels=512, backend="triton").configuration is None
    monkeypatch.setenv("GANVAS_BACKEND", "cuda")
    assert choice() is None
    monkeypatch.setenv("GANVAS_BACKEND", "triton")
    assert choice().configuration is None
    assert measured == []


def test_what_triton_does_not_take_is_torchs(measured):
    assert choice(geometry=Geometry(padding=(1, 1), groups=2)) is None
    assert measured == []


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("op", steps_on_gpu.steps_on_gpu)
def test_a_step_is_measured_in_whatever_mode_an_op_is_called_first(monkeypatch, tmp_path, op, mode):
    monkeypatch.setenv("GANVAS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_remembered", {})
    monkeypatch.setattr(steps_on_gpu, "device_name", lambda index: "imagined")
    with mode():
        step = steps_on_gpu.steps_on_gpu[op](torch.randn(6, 8, 4, 4))

        def measured() -> tuning.Entry:
            _, torchs = step.ways()
            output, *grads = torchs()
            assert grads
            assert all(result.isfinite().all() for result in (output, *grads))
            return tuning.Entry(step.case, 1.0, 2.0)

        assert tuning.remembered(step.case, measured).native
