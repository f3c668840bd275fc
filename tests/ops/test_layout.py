"""Maps between channels_last and contiguous memory, beside torch's copies."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import passes, with_lesser_instruction_sets
from torch import Tensor, nn

pytest.importorskip("ganvas._native")

from ganvas import _native as native
from ganvas.nn import FusedSequential
from ganvas.ops import layout
from ganvas.ops.backends.cpu import transposition

DTYPES = [torch.float32, torch.bfloat16]
# Whole squares of a vector's side, tails of rows and columns, a single row or column.
SHAPES = [(4, 64, 16, 16), (3, 17, 19, 5), (1, 33, 1, 31), (2, 1, 7, 9), (2, 40, 1, 1), (1, 16, 40, 1), (5, 31, 3, 11)]
LARGE = (8, 48, 14, 13)  # that is worth a call


@pytest.fixture
def copies(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of what the kernel copied, in order."""
    seen: list[tuple[int, ...]] = []
    original = transposition._transposed

    def transposed(maps: Tensor, *rest: object) -> Tensor:
        seen.append(tuple(maps.shape))
        return original(maps, *rest)

    monkeypatch.setattr(transposition, "_transposed", transposed)
    return seen


def maps(shape: tuple[int, ...] = LARGE, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return numbers.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3])
def test_copies_are_torchs_bit_for_bit(threads, shape, dtype, count):
    threads(count)
    there = maps(shape, dtype)
    numbers = there.view(torch.int32 if dtype is torch.float32 else torch.int16)
    numbers.flatten()[:1].fill_(-1)  # a NaN keeps its bits
    back = transposition.to_contiguous(there)
    assert back.is_contiguous()
    assert torch.equal(back.view(numbers.dtype), numbers)
    again = transposition.to_channels_last(back)
    assert torch.equal(again.view(numbers.dtype), numbers)
    assert again.permute(0, 2, 3, 1).is_contiguous()


@with_lesser_instruction_sets
def test_lesser_instruction_sets_pass_the_same_tests(isa):
    passes(__file__, isa, "-k", "bit_for_bit")


@pytest.mark.parametrize("dtype", DTYPES)
def test_flatten_and_its_gradient_are_torchs(copies, dtype):
    ours, theirs = (maps(dtype=dtype).requires_grad_() for _ in range(2))
    found, expected = layout.flatten(ours), theirs.flatten(1)
    assert torch.equal(found, expected)
    weights = torch.randn(expected.shape).to(dtype)
    for output in (found, expected):
        (output * weights).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert ours.grad.stride() == ours.stride(), "channels_last, as a convolution takes it"
    assert copies == [LARGE, LARGE]


def test_gradients_of_second_order_are_plain_torchs():
    x = maps().requires_grad_()
    (gradient,) = torch.autograd.grad(layout.flatten(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, 6 * x.detach())


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.contiguous(),
        lambda x: x[:, :, 1:],
        lambda x: x[:, :3],
        lambda x: x[:1],
        lambda x: x.double(),
        lambda x: x[0],
        lambda x: x[:0],
        lambda x: x.to("meta"),
    ],
)
def test_what_the_kernel_does_not_take_is_torchs(copies, other):
    x = other(maps())
    found = layout.flatten(x)
    assert found.shape == x.flatten(1).shape
    assert x.is_meta or torch.equal(found, x.flatten(1))
    assert copies == []


def test_no_kernel_without_backends(copies, monkeypatch):
    monkeypatch.setenv("GANVAS_BACKEND", "reference")
    assert torch.equal(layout.flatten(maps()), maps().flatten(1))
    assert copies == []


def test_in_a_graph_and_under_function_transforms_it_is_torchs(copies):
    compiled = torch.compile(layout.flatten, backend="eager", fullgraph=True)
    assert torch.equal(compiled(maps()), maps().flatten(1))
    assert torch.equal(torch.func.vmap(layout.flatten)(maps()[None])[0], maps().flatten(1))
    _, tangent = torch.func.jvp(layout.flatten, (maps(),), (maps(),))
    assert torch.equal(tangent, maps().flatten(1))
    assert copies == []


def test_a_dense_layer_after_convolutions_and_before_them_copies_natively(copies):
    network = FusedSequential(
        nn.Linear(8, 32 * 36), nn.Unflatten(1, (32, 6, 6)), nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 4),
    )  # fmt: skip
    x = torch.randn(64, 8, requires_grad=True)
    network(x).square().sum().backward()
    ours = [x.grad.clone(), *(p.grad.clone() for p in network.parameters())]
    assert len(copies) >= 4, "into the chain and out of it, and back"
    x.grad = None
    network.zero_grad()
    nn.Sequential(*network)(x).square().sum().backward()
    for found, expected in zip(ours, [x.grad, *(p.grad for p in network.parameters())]):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_a_flatten_with_hooks_or_of_other_axes_is_called():
    x, seen = maps(), []
    hooked = nn.Flatten()
    hooked.register_forward_hook(lambda *_: seen.append(True))
    for module in (hooked, nn.Flatten(1, 2), nn.Flatten(0)):
        assert torch.equal(FusedSequential(module)(x), module(x))
    assert len(seen) == 2


def test_bad_arguments():
    x = torch.zeros(16)
    with pytest.raises(ValueError, match="sizes must be positive; got 1 of 0x4"):
        native.transpose(native.Dtype.float32, 1, 0, 4, x.data_ptr(), x.data_ptr(), 1)
    with pytest.raises(ValueError, match="from must not be null"):
        native.transpose(native.Dtype.float32, 1, 4, 4, 0, x.data_ptr(), 1)
    with pytest.raises(ValueError, match="the CPU kernels take float32 and bfloat16; got float16"):
        native.transpose(native.Dtype.float16, 1, 4, 4, x.data_ptr(), x.data_ptr(), 1)
