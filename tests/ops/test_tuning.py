"""Choice by measurement: what is measured, what is chosen, what is remembered, and what a bad cache file does."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("ganvas._native")

from ganvas._native import ConvolutionKind
from ganvas.ops import conv_bn_leaky_relu, tuning
from ganvas.ops.backends.cpu.convolution import chosen_convolution
from ganvas.ops.chain import Layer, can_chain, conv_bn_leaky_relu_chain
from ganvas.ops.convolution import Geometry

CONV3X3 = Geometry(padding=(1, 1))
STRIDE_2 = Geometry(stride=(2, 2), padding=(1, 1))
UPSAMPLED = Geometry(padding=(1, 1), upsampled=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Iterator[Path]:
    """Tuning as a user has it, with a folder of its own and nothing remembered."""
    monkeypatch.setenv("GANVAS_AUTOTUNE", "1")
    monkeypatch.setenv("GANVAS_CACHE_DIR", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    _next_process()
    yield tmp_path / "cache"
    _next_process()
    torch.set_num_threads(before)


class Clock:
    """Takes the place of measuring: answers with the times it was given, and counts."""

    def __init__(self) -> None:
        self.native, self.torch = 1.0, 2.0
        self.measurements = 0
        self.meanwhile: Callable[[], object] = lambda: None

    def __call__(self, ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        self.measurements += 1
        self.meanwhile()
        return {name: self.native if name else self.torch for name in ways}


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tuning, "_time_in_turns", clock)
    return clock


def _next_process() -> None:
    tuning._remembered.clear()
    tuning.decisions.clear()
    tuning._said.clear()


def choice(
    input: tuple[int, ...] = (8, 16, 16, 16), geometry: Geometry = CONV3X3, size: int = 3, channels: int = 16,
    direction: str = "forward", dtype: torch.dtype = torch.float32,
) -> bool:  # fmt: skip
    """Whether the native kernels run."""
    weight = torch.empty(channels, input[1], size, size)
    return chosen_convolution(geometry, weight, torch.Size(input), dtype, direction) is not None  # type: ignore[arg-type]


def case(threads: int = 1, batch: int = 8) -> tuning.Case:
    return tuning.Case("forward", "conv3x3_padding1", "float32", "cpu", threads, batch, 16, 16, 16, 16)


def nothing() -> tuple[dict[str, Callable[[], object]], Callable[[], object]]:
    return {"winograd": lambda: None}, (lambda: None)


@pytest.mark.parametrize(
    ("native", "torchs", "chosen"), [(1, 2, True), (2, 1, False), (1.02, 1, True), (1.05, 1, False)]
)
def test_the_faster_way_is_taken_and_the_native_one_within_the_margin(clock, native, torchs, chosen):
    clock.native, clock.torch = native, torchs
    assert choice() is chosen


@pytest.mark.parametrize(
    ("geometry", "size", "name"),
    [
        (Geometry(), (1, 1), "conv1x1"),
        (Geometry(stride=(2, 2), padding=(1, 1)), (4, 4), "conv4x4_stride2_padding1"),
        (
            Geometry(stride=(2, 2), transposed=True, output_padding=(1, 0)),
            (4, 4),
            "conv_transpose4x4_stride2_output_padding1x0",
        ),
        (Geometry(padding=(1, 1), upsampled=True), (3, 3), "upsample2_conv3x3_padding1"),
        (Geometry(padding=(2, 0), dilation=(2, 2)), (3, 5), "conv3x5_padding2x0_dilation2"),
    ],
)
def test_convolutions_are_told_apart_by_name(geometry, size, name):
    assert geometry.named(torch.Size((1, 1, *size))) == name


def test_forward_and_backward_are_choices_of_their_own(clock):
    assert choice(direction="forward_with_statistics")
    clock.native = 3.0
    assert not choice(direction="backward_weight")
    assert choice(direction="forward_with_statistics")
    assert clock.measurements == 2


@pytest.mark.parametrize(
    ("first", "second", "measurements"),
    [
        ((64, 32, 16, 16), (64, 32, 16, 16), 1),
        ((64, 32, 16, 16), (100, 32, 16, 16), 1),  # batches with the same power of two below
        ((64, 32, 16, 16), (63, 32, 16, 16), 2),
        ((512, 32, 16, 16), (4096, 32, 16, 16), 1),  # the ratio no longer depends on the batch
        ((4, 32, 64, 64), (1, 32, 128, 128), 1),  # as many pixels in maps that are large anyway
        ((4, 32, 64, 64), (4, 32, 63, 63), 2),
        ((4, 32, 66, 64), (4, 32, 70, 64), 1),
        ((4, 32, 66, 64), (4, 32, 65, 64), 2),  # other tiles at the edge
        ((4, 32, 16, 16), (4, 48, 16, 16), 2),
    ],
)
def test_similar_shapes_share_a_choice(clock, first, second, measurements):
    choice(first)
    choice(second)
    assert clock.measurements == measurements


def test_the_fastest_family_is_taken_and_remembered(monkeypatch, clock):
    def in_turns(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        assert list(ways) == ["winograd", "direct", ""]
        return {"winograd": 2.0, "direct": 1.0, "": 3.0}

    monkeypatch.setattr(tuning, "_time_in_turns", in_turns)
    arguments = (CONV3X3, torch.empty(16, 16, 3, 3), torch.Size((8, 16, 16, 16)), torch.float32, "forward")
    for _ in range(2):
        assert chosen_convolution(*arguments).kind is ConvolutionKind.direct
        _next_process()
    assert [entry.configuration for entry in tuning.entries()] == ["direct"]


def test_direct_products_are_measured_beside_winograds_only_where_they_have_a_chance(monkeypatch):
    measured: list[list[str]] = []
    monkeypatch.setattr(tuning, "_time_in_turns", lambda ways: measured.append(list(ways)) or dict.fromkeys(ways, 1.0))
    choice((8, 64, 32, 32), channels=64)
    choice((1, 64, 8, 8), channels=64)  # few pixels
    choice((8, 3, 32, 32), channels=64)  # few channels
    assert measured == [["winograd", ""], ["winograd", "direct", ""], ["winograd", "direct", ""]]


def test_where_the_processor_has_tiles_coarse_products_are_of_them(monkeypatch):
    measured: list[list[str]] = []
    monkeypatch.setattr(tuning, "_time_in_turns", lambda ways: measured.append(list(ways)) or dict.fromkeys(ways, 1.0))
    monkeypatch.setattr("ganvas._native.has_bfloat16_tiles", lambda: True)
    shape = torch.Size((8, 32, 32, 32))
    for dtype in (torch.bfloat16, torch.float32):
        chosen_convolution(CONV3X3, torch.empty(32, 32, 3, 3), shape, dtype, "forward")
    upsampled = Geometry(padding=(1, 1), upsampled=True)
    chosen_convolution(upsampled, torch.empty(32, 32, 3, 3), shape, torch.bfloat16, "forward")
    assert measured == [["tiles", ""], ["winograd", "direct", ""], ["tiles", ""]]


def test_dtypes_and_numbers_of_threads_have_choices_of_their_own(clock):
    choice()
    choice(dtype=torch.bfloat16)
    torch.set_num_threads(2)
    choice()
    assert clock.measurements == 3


@pytest.mark.parametrize("shape", [(1, 16, 4096, 4096), (4096, 16, 8, 8), (1, 1024, 4, 4), (3, 512, 70, 1)])
def test_what_is_measured_is_small(monkeypatch, shape):
    outputs: list[Tensor] = []

    def run(ways: Mapping[str, Callable[[], tuple[Tensor]]]) -> dict[str, float]:
        outputs.extend(way()[0] for way in ways.values())
        return dict.fromkeys(ways, 1.0)

    monkeypatch.setattr(tuning, "_time_in_turns", run)
    choice(shape, channels=shape[1])
    assert max(output.nbytes for output in outputs) <= 24 * 2**20


@pytest.mark.parametrize(
    ("arguments", "native"),
    [
        ({"input": (1, 16, 4, 4)}, True),
        ({"input": (3, 16, 8, 8), "geometry": STRIDE_2}, True),
        ({"input": (1, 3, 4, 4)}, False),  # few channels
        (
            {"input": (1, 16, 4, 4), "geometry": UPSAMPLED},
            False,
        ),  # not direct
    ],
)
def test_a_little_work_is_not_measured(clock, arguments, native):
    assert choice(**arguments) is native
    assert clock.measurements == 0
    assert tuning.entries() == []


def test_autotune_0_takes_the_native_kernels_wherever_they_can(clock, monkeypatch):
    monkeypatch.setenv("GANVAS_AUTOTUNE", "0")
    clock.native = 3.0
    assert choice()
    assert choice((1, 16, 2, 2))
    assert not choice((8, 15, 16, 16))
    assert clock.measurements == 0


def test_autotune_takes_no_other_values(monkeypatch):
    monkeypatch.setenv("GANVAS_AUTOTUNE", "off")
    with pytest.raises(ValueError, match="GANVAS_AUTOTUNE must be 0 or 1; got 'off'"):
        choice()


@pytest.mark.parametrize("faster", ["native", "torch"])
def test_the_next_process_chooses_alike_without_measuring(clock, faster):
    setattr(clock, faster, 0.1)
    first = choice()
    _next_process()
    setattr(clock, faster, 10.0)
    assert choice() is first
    assert clock.measurements == 1


def test_a_choice_that_another_process_wrote_meanwhile_counts(clock):
    clock.meanwhile = lambda: tuning._write(tuning.Entry(case(), 9.0, 1.0))
    assert not choice()
    assert [entry.native_ms for entry in tuning.entries()] == [9.0]


def test_what_another_process_wrote_meanwhile_stays(clock):
    clock.meanwhile = lambda: tuning._write(tuning.Entry(case(threads=64), 9.0, 1.0))
    choice()
    _next_process()
    assert [(entry.case.threads, entry.native) for entry in tuning.entries()] == [(1, True), (64, False)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_processes_that_write_at_the_same_time_lose_nothing(clock):
    children = []
    for child in range(3):
        process = os.fork()
        if process == 0:
            for batch in range(10):
                tuning.measured(case(batch=10 * child + batch), nothing)
            os._exit(0)
        children.append(process)
    assert [os.waitpid(process, 0)[1] for process in children] == [0, 0, 0]
    assert [entry.case.batch for entry in tuning.entries()] == list(range(30))


def test_threads_that_meet_a_shape_together_measure_it_once(clock):
    clock.meanwhile = lambda: time.sleep(0.05)
    threads = [threading.Thread(target=tuning.measured, args=(case(), nothing)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.measurements == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_leaves_torchs_convolution_alone_where_it_would_wait_for_threads(clock):
    clock.native = 3.0
    torch.set_num_threads(2)
    assert not choice()
    with tuning._lock:  # as another thread of the parent may
        child = os.fork()
        if child == 0:
            several = choice()
            torch.set_num_threads(1)
            os._exit(0 if several and not choice() else 1)
    assert os.waitpid(child, 0)[1] == 0


_GOOD = {**case()._asdict(), "native_ms": 1.0, "torch_ms": 2.0, "configuration": ""}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"entries": 3}',
        b'{"entries": [3]}',
        b"[" * 100_000,
        json.dumps({"entries": [{**_GOOD, "batch": "8"}]}).encode(),
        json.dumps({"entries": [{**_GOOD, "native_ms": float("nan")}]}).encode(),
        json.dumps({"entries": [{**_GOOD, "torch_ms": None}]}).encode(),
        json.dumps({"entries": [{**_GOOD, "more": 1}]}).encode(),
        json.dumps({"entries": [{**_GOOD, "configuration": 3}]}).encode(),
        json.dumps({"entries": [case()._asdict()]}).encode(),
    ],
)
def test_a_damaged_file_is_named_once_and_begun_anew(clock, caplog, content):
    tuning.path().parent.mkdir(parents=True)
    tuning.path().write_bytes(content)
    assert choice()
    assert choice(direction="backward_weight")
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "measured choices of kernels cannot be read"
    ]
    assert str(tuning.path()) in caplog.text
    _next_process()
    assert len(tuning.entries()) == 2


def test_a_folder_that_cannot_be_written_is_named_once_and_choices_last_as_long_as_the_process(clock, caplog, cache):
    cache.write_text("a file where the folder should be")
    choice()
    choice(direction="backward_weight")
    tuning.decisions.clear()
    choice()
    assert clock.measurements == 2
    assert len({record.message for record in caplog.records}) == len(caplog.records) == 2  # reading, writing


def test_what_stands_in_the_files_place_and_cannot_be_read_is_left_alone(clock, caplog):
    tuning.path().mkdir(parents=True)
    assert choice()
    assert tuning.path().is_dir()
    assert "not kept for the next process" in caplog.text


def test_a_process_that_never_gives_the_file_free_holds_nobody_up(clock, caplog, monkeypatch, cache):
    import fcntl

    monkeypatch.setattr(tuning, "_LOCK_SECONDS", 0.02)
    cache.mkdir()
    with open(tuning.path().with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert choice()
    assert "another process holds" in caplog.text


def test_clear_forgets_in_the_process_and_in_the_file(clock):
    choice()
    tuning.clear()
    assert tuning.entries() == []
    assert not tuning.path().exists()
    choice()
    assert clock.measurements == 2


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(clock, cache, monkeypatch):
    choice()
    old = tuning.path().read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    choice(direction="backward_weight")
    assert tuning.path().read_bytes() == old
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock"]


def test_the_folder_is_ganvas_own_or_in_the_users_cache(monkeypatch, tmp_path):
    assert tuning.path().parent == tmp_path / "cache"
    monkeypatch.delenv("GANVAS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.path().parent == tmp_path / "xdg" / "ganvas"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.path().parent == tmp_path / ".cache" / "ganvas"


def test_the_file_is_of_one_processor_instruction_set_and_build(clock, monkeypatch):
    choice()
    for part in ("cpu", "isa", "ganvas", "torch", "build"):
        with monkeypatch.context() as patch:
            patch.setitem(tuning._key_of_process, part, "another")
            tuning._remembered.clear()
            assert tuning.entries() == []


def _spinning(seconds: float, calls: list[float]) -> Callable[[], object]:
    def call() -> None:
        calls.append(seconds)
        begin = time.thread_time()
        while time.thread_time() - begin < seconds:
            pass

    return call


def test_measuring_ends_early_where_the_native_way_is_clearly_faster():
    calls: list[float] = []
    ways = {"slow": _spinning(0.002, calls), "fast": _spinning(0.001, calls), "": _spinning(0.004, calls)}
    times = tuning._time_in_turns(ways)
    assert 0.001 <= times["fast"] < times["slow"] < times[""]
    assert times[""] >= 0.004
    assert calls == [0.002, 0.001, 0.004] * 4  # one of them to warm up


def test_the_usual_way_is_given_up_after_all_turns_only(monkeypatch):
    monkeypatch.setattr(tuning, "_MOST_SECONDS", 60.0)
    calls: list[float] = []
    tuning._time_in_turns({"native": _spinning(0.004, calls), "": _spinning(0.001, calls)})
    assert calls == [0.004, 0.001] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["forward", "forward_with_statistics", "backward_input", "backward_weight"])
@pytest.mark.parametrize(
    ("geometry", "size"),
    [
        (CONV3X3, 3),
        (STRIDE_2, 3),
        (STRIDE_2, 4),
        (STRIDE_2._replace(transposed=True), 4),
        (UPSAMPLED, 3),
    ],
)
def test_every_native_convolution_can_be_measured(geometry, size, direction, dtype):
    choice((8, 16, 17, 17), geometry, size, direction=direction, dtype=dtype)
    (entry,) = tuning.entries()
    assert (entry.case.direction, entry.case.dtype) == (direction, str(dtype).removeprefix("torch."))
    assert entry.native_ms > 0 < entry.torch_ms


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_measuring_leaves_random_numbers_gradient_mode_and_autocast_alone(mode):
    state = torch.get_rng_state()
    with mode(), torch.autocast("cpu", torch.bfloat16):
        grad_mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        choice()
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == grad_mode
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state)


def _layer(geometry: Geometry = CONV3X3) -> Layer:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(16, 16, 3, 3, generator=generator) / 12
    return Layer(
        geometry, weight, None, True, torch.rand(16, generator=generator) + 0.5,
        torch.randn(16, generator=generator), negative_slope=0.2,
    )  # fmt: skip


def _image() -> Tensor:
    return torch.randn(8, 16, 16, 16, generator=torch.Generator().manual_seed(2))


def test_training_and_inference_measure_what_they_run():
    layer, x = _layer(), _image()
    weight = layer.weight.requires_grad_()
    running = torch.zeros(16), torch.ones(16)
    arguments = (weight, None, layer.bn_weight, layer.bn_bias, *running)
    conv_bn_leaky_relu(x, *arguments, padding=1, training=True).sum().backward()
    assert {e.case.direction for e in tuning.entries()} == {"backward_weight", "forward_with_statistics"}
    with torch.inference_mode():
        conv_bn_leaky_relu(x, *arguments, padding=1)
    assert {e.case.direction for e in tuning.entries()} == {"backward_weight", "forward", "forward_with_statistics"}


def test_a_compiled_chain_measures_when_it_runs():
    layer = _layer()
    weight = layer.weight.requires_grad_()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def train(x: Tensor) -> Tensor:
        return conv_bn_leaky_relu(x, weight, None, layer.bn_weight, layer.bn_bias, None, None, padding=1, training=True)

    train(_image()).sum().backward()
    assert {entry.case.direction for entry in tuning.entries()} == {"backward_weight", "forward_with_statistics"}


def _choose(forward: bool, of_weight: bool, of_input: bool) -> None:
    """As if it had been measured."""
    directions = {"forward_with_statistics": forward, "backward_weight": of_weight, "backward_input": of_input}
    for direction, native in directions.items():
        known = case()._replace(direction=direction)
        tuning._remembered[known] = tuning.Entry(known, 1.0, 2.0 if native else 0.5, "winograd")


@pytest.mark.parametrize("faster", [True, False])
def test_few_channels_are_native_only_where_that_was_measured(monkeypatch, faster):
    x, weight = torch.randn(8, 64, 16, 16), torch.randn(3, 64, 3, 3)
    convolution = (CONV3X3, weight, x.shape, x.dtype, "forward")
    monkeypatch.setattr(tuning, "measured", lambda case, _: tuning.Entry(case, 1.0, 2.0 if faster else 0.5, "direct"))
    assert (chosen_convolution(*convolution) is not None) is faster
    tuning.clear()
    monkeypatch.setenv("GANVAS_AUTOTUNE", "0")
    assert chosen_convolution(*convolution) is None


@pytest.mark.parametrize("native", list(itertools.product((True, False), repeat=3)))
def test_a_chain_is_taken_where_one_of_its_ways_is_native(native):
    _choose(*native)
    assert can_chain(_image(), [_layer()]) is any(native)
    with torch.no_grad():
        assert can_chain(_image(), [_layer()]) is native[0]


@pytest.mark.parametrize("choices", list(itertools.product((True, False), repeat=3))[1:])
def test_every_choice_gives_the_same_gradients(accuracy, choices):
    x, layers = _image(), [_layer(), _layer()]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

    def gradients(dtype: torch.dtype, run: Callable[[Tensor, list[Layer]], Tensor]) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        own = [replace(layer, **{n: getattr(layer, n).to(dtype).requires_grad_() for n in _GRADS}) for layer in layers]
        output = run(leaf, own)
        wanted = [leaf, *(getattr(layer, name) for layer in own for name in _GRADS)]
        return [output.detach(), *torch.autograd.grad(output, wanted, grad.to(dtype))]

    _choose(*choices)
    ours = gradients(torch.float32, conv_bn_leaky_relu_chain)
    _choose(True, True, True)
    tuning.decisions.clear()
    native = gradients(torch.float32, conv_bn_leaky_relu_chain)
    exact, torchs = (gradients(dtype, _one_after_the_other) for dtype in (torch.float64, torch.float32))
    assert any(not torch.equal(a, b) for a, b in zip(ours, native))  # the choice was followed
    for index, (a, b, c) in enumerate(zip(ours, exact, torchs)):
        accuracy.check(f"gradient {index}", a, b, c, b, 3.0)


_GRADS = ("weight", "bn_weight", "bn_bias")


def _one_after_the_other(x: Tensor, layers: list[Layer]) -> Tensor:
    for layer in layers:
        x = F.conv2d(x, layer.weight, None, padding=1)
        x = F.batch_norm(x, None, None, layer.bn_weight, layer.bn_bias, training=True, eps=layer.eps)
        x = F.leaky_relu(x, layer.negative_slope)
    return x
