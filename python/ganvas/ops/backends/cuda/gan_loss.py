"""CUDA adversarial losses: value, gradient and metrics from one launch on the current stream."""

from __future__ import annotations

from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.arguments import address
from ganvas.ops.backends.cuda.arguments import dtype_of, empty, empty_like, enqueue, workspace
from ganvas.ops.schemas import library

_KINDS = {kind.name: kind for kind in native.GanLoss}


def discriminator_loss(
    real_logits: Tensor,  # any shape
    fake_logits: Tensor,  # any shape
    kind: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (scalar), its gradients (like the logits), metrics (4,) float32."""
    real, fake = real_logits.contiguous(), fake_logits.contiguous()
    grad_real, grad_fake = empty_like(real), empty_like(fake)
    loss, metrics = empty(real, dtype=real.dtype), empty(real, 4)
    scratch = workspace(real, native.GAN_LOSS_WORKSPACE_BYTES)
    enqueue(
        native.discriminator_loss_cuda, real, dtype_of(real), _KINDS[kind], label_smoothing, real.data_ptr(),
        real.numel(), fake.data_ptr(), fake.numel(), grad_real.data_ptr(), grad_fake.data_ptr(), loss.data_ptr(),
        metrics.data_ptr(), address(scratch),
    )  # fmt: skip
    return loss, grad_real, grad_fake, metrics


def generator_loss(fake_logits: Tensor, real_logits: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (scalar) and its gradients; that of the real logits is empty where they play no part."""
    fake = fake_logits.contiguous()
    real = None if real_logits is None else real_logits.contiguous()
    grad_fake, grad_real = empty_like(fake), empty(fake, 0, dtype=fake.dtype) if real is None else empty_like(real)
    loss, scratch = empty(fake, dtype=fake.dtype), workspace(fake, native.GAN_LOSS_WORKSPACE_BYTES)
    enqueue(
        native.generator_loss_cuda, fake, dtype_of(fake), _KINDS[kind], fake.data_ptr(), address(real), fake.numel(),
        grad_fake.data_ptr(), grad_real.data_ptr(), loss.data_ptr(), address(scratch),
    )  # fmt: skip
    return loss, grad_fake, grad_real


library.impl("discriminator_loss", discriminator_loss, "CUDA")
library.impl("generator_loss", generator_loss, "CUDA")
