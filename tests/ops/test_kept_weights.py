"""In evaluation the kernels keep weights as they multiply by them, and know them by their numbers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from chains import layer
from instruction_sets import passes, with_lesser_instruction_sets
from torch import Tensor

pytest.importorskip("ganvas._native")

from ganvas import _native as native
from ganvas import ops
from ganvas.nn import ConvBNLeakyReLU
from ganvas.ops.backends import cpu
from ganvas.ops.backends.cpu import direct
from ganvas.ops.backends.cpu.convolution import native_convolution
from ganvas.ops.chain import Layer
from ganvas.ops.pending import Pending

PLAIN = ("3x3", "3x3 unpadded", "stride 2", "1x1", "4x4 stride 2", "4x4 stride 2 transposed")
CASES = [(name, False) for name in (*PLAIN, "upsampled")]
CASES += [(name, True) for name in (*PLAIN, "5x5", "dilated", "transposed with output padding")]


@pytest.fixture(autouse=True)
def _empty_store():
    native.release_workspace()
    yield
    native.release_workspace()


def pixels(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return numbers.contiguous(memory_format=torch.channels_last)


def evaluated(of: Layer, input: Tensor, by_definition: bool = False) -> Tensor:
    """The convolution's output as its activation, which has statistics that are fixed."""
    if by_definition:
        convolution = direct.convolution(of.geometry, of.weight.shape, input.shape, input.dtype)
    else:
        make = native_convolution(of.geometry, of.weight, input.shape, input.dtype)
        convolution = make(of.weight.shape, input.shape, input.dtype)
    channels = convolution.output_shape[1]
    pending = Pending(convolution.output(), torch.ones(1, channels), torch.zeros(1, channels), negative_slope=0.1)
    return convolution.activated(Pending(input), of.weight, of.bias, pending)


def held(of: Layer, input: Tensor, **options: bool) -> list[int]:
    """Bytes that are held after each of three calls, beside what the first has as scratch; all have the same bits."""
    found, outputs = [], []
    for _ in range(3):
        outputs.append(evaluated(of, input, **options).clone())
        found.append(native.workspace_bytes_held())
    assert torch.equal(outputs[1], outputs[0]), "a weight that is being kept"
    assert torch.equal(outputs[2], outputs[0]), "a weight that was kept"
    return [count - found[0] for count in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "by_definition"), CASES)
def test_a_kept_weight_gives_the_same_bits(name, by_definition, dtype):
    of = layer(36, 50, name, False, dtype=dtype)
    _, second, third = held(of, pixels(2, 36, 10, 14, dtype=dtype), by_definition=by_definition)
    has_tiles = native.has_bfloat16_tiles() and dtype is torch.bfloat16
    assert third == second
    assert (second > 0) is not has_tiles


def exchange_two(numbers: Tensor) -> None:
    numbers[[0, 128]] = numbers[[128, 0]]


def negate_some(numbers: Tensor) -> None:
    numbers[:512:128] *= -1


# Numbers 128 apart go through the same lane of the same vector, in the widest kernel.
CHANGES = {
    "the first number": lambda numbers: numbers[0].add_(0.5),
    "the last number": lambda numbers: numbers[-1].add_(0.5),
    "two numbers change places": exchange_two,
    "four signs": negate_some,
    "all signs": Tensor.neg_,
    "an average moves": lambda numbers: numbers.mul_(0.999),
    "zeros": Tensor.zero_,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("by_definition", [False, True])
def test_a_weight_that_was_changed_behind_torchs_back_is_another_one(change, by_definition):
    of, input = layer(32, 32, "3x3", False), pixels(1, 32, 8, 8)
    before = [evaluated(of, input, by_definition) for _ in range(3)][-1]
    version = of.weight._version
    change(of.weight.data.view(-1))
    assert of.weight._version == version
    after = evaluated(of, input, by_definition)
    native.release_workspace()
    assert torch.equal(after, evaluated(of, input, by_definition))
    assert not torch.equal(after, before)


def test_equal_numbers_in_another_arrangement_are_another_weight():
    numbers = torch.randn(32 * 32 * 9, generator=torch.Generator().manual_seed(0))
    arranged = [
        numbers.view(32, 32, 3, 3),
        numbers.view(32, 3, 3, 32).permute(0, 3, 1, 2),
        numbers.view(32, 32, 3, 3).permute(1, 0, 2, 3),
        numbers.view(32, 32, 3, 3).permute(0, 1, 3, 2),
    ]
    input = pixels(1, 32, 8, 8)
    of = layer(32, 32, "3x3", False)
    for _ in range(3):
        for weight in arranged:
            of.weight = weight
            expected = F.leaky_relu(F.conv2d(input, weight, padding=1), 0.1)
            torch.testing.assert_close(evaluated(of, input), expected, rtol=1e-4, atol=1e-3)


def test_paddings_of_one_weight_do_not_share_what_hangs_on_them():
    of, input = layer(16, 24, "4x4 stride 2 transposed", False), pixels(1, 16, 6, 6)
    for _ in range(3):
        for padding in (0, 1, 2):
            of.geometry = of.geometry._replace(padding=(padding, padding))
            expected = F.conv_transpose2d(input, of.weight, stride=2, padding=padding)
            torch.testing.assert_close(evaluated(of, input), F.leaky_relu(expected, 0.1), rtol=1e-4, atol=1e-4)


def test_maps_of_all_sizes_share_a_weight():
    of = layer(32, 32, "3x3", False)
    for size in (8, 12):
        held(of, pixels(1, 32, size, size))
    kept = native.workspace_bytes_held()
    for size in (9, 10, 11, 12):
        evaluated(of, pixels(1, 32, size, size))
    assert native.workspace_bytes_held() == kept


def test_nothing_is_kept_of_many_pixels_or_in_training():
    of = layer(32, 32, "3x3", False)
    assert held(of, pixels(8, 32, 32, 32)) == [0, 0, 0]
    block, input = ConvBNLeakyReLU(32, 32, 3, padding=1), pixels(1, 32, 8, 8)
    found = []
    for _ in range(3):
        block(input).sum().backward()
        found.append(native.workspace_bytes_held())
    assert found[1:] == found[:1] * 2


def test_weights_that_change_every_time_are_not_kept():
    of, input = layer(64, 64, "3x3", False), pixels(1, 64, 8, 8)
    evaluated(of, input)
    scratch = native.workspace_bytes_held()
    for _ in range(20):
        of.weight.add_(1e-3)
        evaluated(of, input)
    assert native.workspace_bytes_held() == scratch


def test_what_is_held_is_bounded():
    of, input = layer(128, 128, "3x3", False), pixels(1, 128, 4, 4)
    most = 0
    for _ in range(130):  # of more than 2 MiB each
        of.weight.add_(1e-3)
        for _ in range(2):
            evaluated(of, input)
        most = max(most, native.workspace_bytes_held())
    assert 128 << 20 < most < 288 << 20
    before = native.workspace_bytes_held()
    assert ops.release_memory() == before
    assert native.workspace_bytes_held() == ops.release_memory() == 0


def test_threads_share_weights_while_others_give_memory_back():
    layers, input = [layer(24, 40, "3x3", False) for _ in range(4)], pixels(1, 24, 9, 9)
    expected = [evaluated(of, input) for of in layers]
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(evaluated, layers[i % 4], input) for i in range(200)]
        for _ in range(20):
            native.release_workspace()
        assert all(torch.equal(result.result(), expected[i % 4]) for i, result in enumerate(results))


def test_a_network_in_evaluation_follows_its_weights():
    """An average of weights is moved through .data by many who train GANs, and is never trained itself."""
    block, input = ConvBNLeakyReLU(32, 32, 3, padding=1).eval(), pixels(1, 32, 8, 8)
    with torch.inference_mode():
        for _ in range(4):
            first = block(input)
        block.conv.weight.data.mul_(2)
        second = block(input)
    torch.testing.assert_close(second, 2 * first, rtol=1e-4, atol=1e-4)


def test_without_the_native_module_there_is_nothing_to_give_back(monkeypatch):
    monkeypatch.setattr(cpu, "native", None)
    assert ops.release_memory() == 0


@with_lesser_instruction_sets
def test_lesser_instruction_sets(isa):
    passes(__file__, isa)
