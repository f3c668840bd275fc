"""The CUDA kernel of the GAN losses, run by the processor (``cuda_on_host/``): the same formulas, chunks and barriers.

What only a GPU shows is in ``tests/gpu``.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from kernels_on_host import DTYPES, FencedMemory, compiled, needs_compiler
from torch import Tensor

from ganvas.ops.backends import reference
from ganvas.ops.gan_loss import KINDS

CHUNK = 2048  # logits_per_chunk
ONE_BLOCK = 8 * CHUNK  # chunks_for_one_block
pytestmark = needs_compiler


class KernelOnHost:
    """Called as :mod:`ganvas.ops.backends.cuda.gan_loss` calls the real one; notices steps outside the arrays."""

    guard = 64  # elements on either side of each result

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.memory = library, FencedMemory()
        for function in (self.library.discriminator_loss, self.library.generator_loss):
            function.restype = ctypes.c_char_p

    def discriminator(self, real: Tensor, fake: Tensor, kind: str, smoothing: float = 0.0) -> list[Tensor]:
        """Loss, its gradients, metrics."""
        real, fake = self.memory.copy(real), self.memory.copy(fake)
        results = self._results(real.dtype, real.numel(), fake.numel(), 1)
        results.append(self._results(torch.float32, 4)[0])
        grad_real, grad_fake, loss, metrics = [buffer[self.guard : -self.guard] for buffer in results]
        workspace = self._workspace()
        self._raise(
            self.library.discriminator_loss(
                DTYPES.index(real.dtype), KINDS.index(kind), ctypes.c_float(smoothing),
                *self._array(real), *self._array(fake), *map(self._address, (grad_real, grad_fake, loss, metrics)),
                self._address(workspace),
            )
        )  # fmt: skip
        self._check_guards(results)
        return [loss[0], grad_real, grad_fake, metrics]

    def generator(self, fake: Tensor, real: Tensor, kind: str) -> list[Tensor]:
        """Loss and its gradients."""
        fake, real = self.memory.copy(fake), self.memory.copy(real)
        results = self._results(fake.dtype, fake.numel(), real.numel(), 1)
        grad_fake, grad_real, loss = [buffer[self.guard : -self.guard] for buffer in results]
        pairs = kind == "relativistic"
        if not pairs:
            grad_real.zero_()
        workspace = self._workspace()
        self._raise(
            self.library.generator_loss(
                DTYPES.index(fake.dtype), KINDS.index(kind), self._address(fake),
                self._address(real if pairs else None), ctypes.c_int64(fake.numel()), self._address(grad_fake),
                self._address(grad_real if pairs else None), self._address(loss), self._address(workspace),
            )
        )  # fmt: skip
        self._check_guards(results)
        return [loss[0], grad_fake, grad_real]

    def _results(self, dtype: torch.dtype, *counts: int) -> list[Tensor]:
        return [torch.full((count + 2 * self.guard,), float("nan"), dtype=dtype) for count in counts]

    def _workspace(self) -> Tensor:
        return torch.full((self.library.workspace_bytes() // 8,), float("nan"), dtype=torch.float64)

    def _check_guards(self, results: list[Tensor]) -> None:
        for buffer in results:
            assert buffer[: self.guard].isnan().all()
            assert buffer[-self.guard :].isnan().all()

    @staticmethod
    def _address(tensor: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    def _array(self, tensor: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
        return self._address(tensor), ctypes.c_int64(tensor.numel())

    @staticmethod
    def _raise(message: bytes) -> None:
        if message:
            raise RuntimeError(message.decode())


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> KernelOnHost:
    return KernelOnHost(compiled(tmp_path_factory.mktemp("cuda_on_host"), "gan_loss"))


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
