"""Native adversarial losses: value, gradient and metrics from one call."""

from __future__ import annotations

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.arguments import address
from ganvas.ops.backends.cpu.arguments import dtype_of
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
    loss, metrics = _float32(real), _float32(real, 4)
    native.discriminator_loss(
        dtype_of(real), _KINDS[kind], label_smoothing, real.data_ptr(), real.numel(), fake.data_ptr(), fake.numel(),
        grad_real.data_ptr(), grad_fake.data_ptr(), loss.data_ptr(), metrics.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return _of_dtype(loss, real.dtype), grad_real, grad_fake, metrics


def generator_loss(fake_logits: Tensor, real_logits: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss (scalar), its gradient, and that of the real logits where they play a part."""
    fake = fake_logits.contiguous()
    real = None if real_logits is None else real_logits.contiguous()
    grad_fake = torch.empty_like(fake)
    grad_real = None if real is None else torch.empty_like(real)
    loss = _float32(fake)
    native.generator_loss(
        dtype_of(fake), _KINDS[kind], fake.data_ptr(), address(real), fake.numel(), grad_fake.data_ptr(),
        address(grad_real), loss.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return _of_dtype(loss, fake.dtype), grad_fake, grad_real


def _generator_loss_operator(fake_logits: Tensor, real_logits: Tensor | None, kind: str) -> tuple[Tensor, ...]:
    """The same with an empty tensor for None, which an operator cannot return."""
    loss, grad_fake, grad_real = generator_loss(fake_logits, real_logits, kind)
    return loss, grad_fake, fake_logits.new_empty((0,)) if grad_real is None else grad_real


def _float32(logits: Tensor, *size: int) -> Tensor:
    """Memory for a result beside the logits, wherever torch's default device may be."""
    return torch.empty(size, dtype=torch.float32, device=logits.device)


def _of_dtype(loss: Tensor, dtype: torch.dtype) -> Tensor:
    return loss if dtype is torch.float32 else loss.to(dtype)  # a call of to() costs as much as an allocation


library.impl("discriminator_loss", discriminator_loss, "CPU")
library.impl("generator_loss", _generator_loss_operator, "CPU")
