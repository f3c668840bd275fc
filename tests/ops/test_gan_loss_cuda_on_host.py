"""The CUDA kernel of the GAN losses, run by the processor (``cuda_on_host/``): the same formulas, chunks and barriers.

What only a GPU shows is in ``tests/gpu``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels_on_host import FencedMemory, HostNative, check_arguments, compiled, needs_compiler, stand_in
from torch import Tensor

from ganvas.ops.backends import reference
from ganvas.ops.gan_loss import KINDS

pytest.importorskip("ganvas._native")

from ganvas.ops.backends.cuda import gan_loss

CHUNK = 2048  # logits_per_chunk
ONE_BLOCK = 8 * CHUNK  # chunks_for_one_block
pytestmark = needs_compiler


FUNCTIONS = {
    "discriminator_loss_cuda": "iifplplpppppip",
    "generator_loss_cuda": "iipplppppip",
}


class KernelOnHost:
    """The module that calls the real kernel, calling this one, on memory that ends where the arrays do."""

    def __init__(self, host: HostNative, memory: FencedMemory, losses: Any) -> None:
        self.library, self._memory, self._losses = host.library, memory, losses

    def discriminator(self, real: Tensor, fake: Tensor, kind: str, smoothing: float = 0.0) -> list[Tensor]:
        """Loss, its gradients, metrics."""
        return list(self._losses.discriminator_loss(*map(self._memory.copy, (real, fake)), kind, smoothing))

    def generator(self, fake: Tensor, real: Tensor, kind: str) -> list[Tensor]:
        """Loss and its gradients."""
        fake, real = self._memory.copy(fake), self._memory.copy(real)
        if kind == "relativistic":
            return list(self._losses.generator_loss(fake, real, kind))
        loss, grad_fake, grad_real = self._losses.generator_loss(fake, None, kind)
        assert grad_real.numel() == 0
        return [loss, grad_fake, torch.zeros_like(real)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_native_module_takes_the_same_arguments(name):
    check_arguments(name, FUNCTIONS[name])


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> HostNative:
    native = HostNative(compiled(tmp_path_factory.mktemp("cuda_on_host"), "gan_loss", "gan_loss"), FUNCTIONS)
    native.GAN_LOSS_WORKSPACE_BYTES = native.library.workspace_bytes()
    return native


@pytest.fixture
def kernel(host, monkeypatch):
    memory = FencedMemory()
    yield KernelOnHost(host, memory, stand_in(monkeypatch, gan_loss, host, memory))
    memory.check()


def value_and_gradients(loss_of, *logits):
    logits = [value.detach().clone().requires_grad_() for value in logits]
    loss = loss_of(*logits)
    return [loss.detach(), *torch.autograd.grad(loss, logits, allow_unused=True, materialize_grads=True)]


def check(accuracy, ours, exact, theirs, logits):
    for name, a, b, c in zip(("loss", "gradient", "other gradient"), ours, exact, theirs):
        # A loss may cancel (wgan's does): its terms are as large as the logits.
        terms = logits.double().abs().mean() + b.abs() if name == "loss" else None
        accuracy.check(name, a, b, c, b, 2.0, terms=terms)


# One logit, a part of a chunk, whole chunks and one more, several chunks of one block, several blocks.
COUNTS = [(1, 1), (31, CHUNK - 1), (CHUNK, CHUNK + 1), (3 * CHUNK - 1, 2), (ONE_BLOCK, 1), (CHUNK + 7, ONE_BLOCK + 5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "real_count", "fake_count"),
    [*((torch.float32, *counts) for counts in COUNTS), (torch.bfloat16, 300, 2300), (torch.float16, 2300, 300)],
)
def test_discriminator_is_as_accurate_as_torch(kernel, accuracy, kind, dtype, real_count, fake_count):
    torch.manual_seed(real_count)
    if kind == "relativistic":
        real_count = fake_count = max(real_count, fake_count)
    real, fake = (3 * torch.randn(real_count)).to(dtype), (3 * torch.randn(fake_count)).to(dtype)
    smoothing = 0.1 if kind in ("bce", "lsgan") else 0.0
    *ours, metrics = kernel.discriminator(real, fake, kind, smoothing)
    theirs = value_and_gradients(lambda r, f: reference.discriminator_loss(r, f, kind, smoothing), real, fake)
    exact = value_and_gradients(
        lambda r, f: reference.discriminator_loss(r, f, kind, smoothing), real.double(), fake.double()
    )
    check(accuracy, ours, exact, theirs, real)
    torch.testing.assert_close(metrics, reference.discriminator_metrics(real, fake), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "count"),
    [(torch.float32, 1), (torch.float32, ONE_BLOCK + 1), (torch.bfloat16, 333), (torch.float16, 333)],
)
def test_generator_is_as_accurate_as_torch(kernel, accuracy, kind, dtype, count):
    torch.manual_seed(count)
    fake, real = (3 * torch.randn(count)).to(dtype), (3 * torch.randn(count)).to(dtype)
    ours = kernel.generator(fake, real, kind)
    theirs = value_and_gradients(lambda f, r: reference.generator_loss(f, r, kind), fake, real)
    exact = value_and_gradients(lambda f, r: reference.generator_loss(f, r, kind), fake.double(), real.double())
    check(accuracy, ours, exact, theirs, fake)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_end_where_torchs_end(kernel, kind, bad):
    real, fake = torch.tensor([0.5, bad, -2.0]), torch.tensor([1.0, 0.0, -1.0])
    for first, second in ((real, fake), (fake, real)):
        *ours, _ = kernel.discriminator(first, second, kind)
        theirs = value_and_gradients(
            lambda r, f: reference.discriminator_loss(r, f, kind), first.double(), second.double()
        )
        torch.testing.assert_close(ours, [value.float() for value in theirs], equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_ten_thousand_stay_finite(kernel, kind):
    real = torch.tensor([-1e4, 1e4, 0.0, 88.0, -104.0])
    for results in (kernel.discriminator(real, -real, kind), kernel.generator(real, -real, kind)):
        assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize(
    ("counts", "grid"),
    [
        ((1, 1), 1),
        ((7 * CHUNK, CHUNK), 1),
        ((7 * CHUNK, CHUNK + 1), 6),  # two blocks on each of three multiprocessors
        ((100 * CHUNK, CHUNK), 6),
    ],
)
def test_one_launch_whose_blocks_all_run_at_once(kernel, counts, grid):
    before = kernel.library.launches()
    kernel.discriminator(torch.randn(counts[0]), torch.randn(counts[1]), "hinge")
    assert kernel.library.launches() == before + 1
    assert kernel.library.last_grid() == grid


def test_no_more_blocks_than_a_multiprocessor_has_room_for_wait_for_each_other(kernel):
    real, fake = torch.randn(7 * CHUNK), torch.randn(2 * CHUNK)
    expected = kernel.discriminator(real, fake, "bce")
    kernel.library.set_resident_blocks(1)
    results = kernel.discriminator(real, fake, "bce")
    kernel.library.set_resident_blocks(2)
    assert kernel.library.last_grid() == 3
    torch.testing.assert_close(results, expected)


def test_a_block_for_each_chunk_is_enough(kernel):
    kernel.library.set_multiprocessors(148)
    real, fake = torch.randn(ONE_BLOCK), torch.randn(1)
    many = kernel.discriminator(real, fake, "bce")
    assert kernel.library.last_grid() == 9
    kernel.library.set_multiprocessors(3)
    torch.testing.assert_close(many, kernel.discriminator(real, fake, "bce"))


def test_same_input_gives_the_same_bits(kernel):
    real, fake = torch.randn(50_000), torch.randn(40_000)
    first, second = (kernel.discriminator(real, fake, "non_saturating") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_refused_launch_names_the_kernel(kernel):
    kernel.library.fail_next_launch()
    message = "generator_loss: CUDA error cudaErrorCooperativeLaunchTooLarge: too many blocks in cooperative launch"
    with pytest.raises(RuntimeError, match=message):
        kernel.generator(torch.randn(3), torch.randn(3), "bce")
