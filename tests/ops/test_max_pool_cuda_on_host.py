"""The CUDA kernels of 2×2 max-pooling over pending activations, run by the processor, beside those of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels_on_host import DTYPES, FencedMemory, HostNative, check_arguments, compiled, needs_compiler, stand_in
from torch import Tensor
from torch.nn import functional as F

from ganvas.ops.pending import Pending

pytest.importorskip("ganvas._native")

from ganvas.ops.backends import cpu
from ganvas.ops.backends.cuda import max_pool

pytestmark = needs_compiler

FUNCTIONS = {
    "max_pool_workspace_cuda": "Lisli",
    "max_pool_forward_cuda": "islpppppffippip",
    "max_pool_backward_cuda": "islpppppffippipppplip",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_native_module_takes_the_same_arguments(name):
    check_arguments(name, FUNCTIONS[name])


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> HostNative:
    folder = tmp_path_factory.mktemp("cuda_on_host")
    return HostNative(compiled(folder, "max_pool", "max_pool", "statistics"), FUNCTIONS)


@pytest.fixture
def memory():
    fenced = FencedMemory()
    yield fenced
    fenced.check()


@pytest.fixture
def kernels(host, memory, monkeypatch) -> Any:
    return stand_in(monkeypatch, max_pool, host, memory)


EPS = 1e-5


def pending_of(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, groups: int = 1, activation_first: bool = False,
    batch_statistics: bool = True, slope: float = 0.2,
) -> Pending:  # fmt: skip
    torch.manual_seed(sum(shape))
    channels = shape[1]
    stored = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels)
    mean, var = torch.randn(groups, channels) / 4, torch.rand(groups, channels) + 0.5
    scale = weight * (var + EPS).rsqrt()
    return Pending(
        stored, scale, bias - mean * scale, mean, var, weight, bias, EPS, slope, activation_first, batch_statistics
    )


def fenced(pending: Pending, memory: FencedMemory) -> Pending:
    return Pending(*(memory.copy(value) if isinstance(value, Tensor) else value for value in pending))


def activation(pending: Pending) -> Tensor:
    """In float64."""

    def per_pixel(values: Tensor) -> Tensor:
        each = pending.stored.shape[0] // values.shape[0]
        return values.double().repeat_interleave(each, 0)[:, :, None, None]

    def lrelu(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, pending.negative_slope * x)

    x = pending.stored.double()
    deviation = (lrelu(x) if pending.activation_first else x) - per_pixel(pending.mean)
    scale = per_pixel((pending.var.double() + EPS).rsqrt()) * pending.weight.double().view(1, -1, 1, 1)
    value = scale * deviation + pending.bias.double().view(1, -1, 1, 1)
    return value if pending.activation_first else lrelu(value)


SHAPES = [
    (1, 1, 2, 2), (2, 3, 4, 6), (2, 7, 5, 3), (2, 8, 4, 4), (4, 17, 7, 4), (2, 32, 3, 9), (6, 64, 6, 6), (2, 130, 2, 5),
    (2, 9, 33, 31),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation_first", [False, True])
def test_the_largest_of_four_and_which_it_is(kernels, memory, shape, dtype, activation_first):
    pending = pending_of(shape, dtype, groups=min(2, shape[0]), activation_first=activation_first)
    pooled, index = kernels.max_pool(fenced(pending, memory))
    values = activation(pending)
    expected, _ = F.max_pool2d(values, 2, return_indices=True)
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(pooled.double(), expected, rtol=precision, atol=1e-6)
    height, width = (2 * (side // 2) for side in shape[2:])
    four = values[:, :, :height, :width].unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    chosen = four.gather(4, index.long()[..., None])[..., 0]
    torch.testing.assert_close(chosen, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation_first", [False, True])
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_gradients_are_the_cpu_kernels(kernels, memory, shape, dtype, activation_first, batch_statistics):
    pending = pending_of(
        shape, dtype, groups=min(2, shape[0]), activation_first=activation_first, batch_statistics=batch_statistics
    )
    pooled, index = cpu.max_pool(pending)
    grad = torch.randn(pooled.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    expected = cpu.max_pool_backward(grad, index, pending)
    results = kernels.max_pool_backward(memory.copy(grad), memory.copy(index), fenced(pending, memory))
    precision = 2 * torch.finfo(dtype).eps
    for result, cpus in zip(results, expected):
        torch.testing.assert_close(result, cpus, rtol=max(precision, 1e-5), atol=max(precision, 1e-5))


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_of_equals_the_first_wins_and_nan_before_all(kernels, slope):
    pending = pending_of((2, 8, 6, 6), slope=slope)
    stored = pending.stored.round()  # many equals
    stored[0, 1, 2, 3] = stored[0, 2, 0, 0] = stored[1, 3, 5, 5] = stored[1, 3, 4, 4] = float("nan")
    pending = pending._replace(stored=stored)
    pooled, index = kernels.max_pool(pending)
    expected, cpus_index = cpu.max_pool(pending)
    assert torch.equal(index, cpus_index)
    torch.testing.assert_close(pooled, expected, equal_nan=True)


@pytest.mark.parametrize("skipped", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_at_any_address_are_read_in_place(kernels, skipped, dtype):
    pending = pending_of((2, 16, 4, 4), dtype)
    stored = torch.empty(skipped + pending.stored.numel(), dtype=dtype)[skipped:].as_strided(
        pending.stored.shape, pending.stored.stride()
    )
    moved = pending._replace(stored=stored.copy_(pending.stored))
    pooled, index = kernels.max_pool(pending)
    for result, expected in zip(kernels.max_pool(moved), (pooled, index)):
        assert torch.equal(result, expected)
    grad = torch.randn(pooled.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    results = kernels.max_pool_backward(grad, index, moved)
    for result, expected in zip(results, kernels.max_pool_backward(grad, index, pending)):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_byte_moves_once_in_a_pass(kernels, host, dtype):
    pending = pending_of((4, 64, 8, 6), dtype)
    size = pending.stored.nbytes // 16
    (pooled, index), *of_forward = host.vectors_moved(lambda: kernels.max_pool(pending))
    _, *of_backward = host.vectors_moved(lambda: kernels.max_pool_backward(pooled, index, pending))
    assert of_forward == [size, size // 4]
    assert of_backward == [2 * (size + size // 4), size]


@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (2, 64, 9, 33)])
def test_threads_may_take_turns_in_any_order(kernels, host, shape):
    pending = pending_of(shape, groups=2)

    def pooled_and_gradients() -> list[Tensor]:
        pooled, index = kernels.max_pool(pending)
        return [pooled, index, *kernels.max_pool_backward(pooled, index, pending)]

    for first, second in zip(*host.in_both_orders(pooled_and_gradients)):
        assert torch.equal(first, second)
