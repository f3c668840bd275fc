"""CUDA adversarial losses: value, gradient and metrics from one launch on the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.arguments import address
from ganvas.ops.backends.cuda.arguments import dtype_of, enqueue, workspace
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
    grad_real, grad_fake = torch.empty_like(real), torch.empty_like(fake)
    loss, metrics = real.new_empty(()), real.new_empty((4,), dtype=torch.float32)
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
    grad_fake = torch.empty_like(fake)
    grad_real = None if real is None else torch.empty_like(real)
    loss, scratch = fake.new_empty(()), workspace(fake, native.GAN_LOSS_WORKSPACE_BYTES)
    enqueue(
        native.generator_loss_cuda, fake, dtype_of(fake), _KINDS[kind], fake.data_ptr(), address(real), fake.numel(),
        grad_fake.data_ptr(), address(grad_real), loss.data_ptr(), address(scratch),
    )  # fmt: skip
    return loss, grad_fake, fake.new_empty((0,)) if grad_real is None else grad_real


library.impl("discriminator_loss", discriminator_loss, "CUDA")
library.impl("generator_loss", generator_loss, "CUDA")
