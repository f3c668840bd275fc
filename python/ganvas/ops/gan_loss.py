"""Adversarial losses on logits: value, gradient and the numbers one logs, in one pass over the logits.

The formulas and their sources stand in :mod:`ganvas.ops.backends.reference.gan_loss`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ganvas.ops import checks
from ganvas.ops.backends import reference
from ganvas.ops.batch_norm_leaky_relu import reference_gradients
from ganvas.ops.direct import runs_directly
from ganvas.ops.kernels import kernels_of
from ganvas.ops.schemas import ops
from ganvas.ops.selection import choose

KINDS = ("bce", "non_saturating", "lsgan", "hinge", "wgan", "relativistic")


class DiscriminatorMetrics(NamedTuple):
    """0-dim float32 tensors on the logits' device, outside the graph; an accuracy is a share in [0, 1]."""

    real_logit: Tensor
    fake_logit: Tensor
    real_accuracy: Tensor
    fake_accuracy: Tensor


@overload
def discriminator_loss(
    real_logits: Tensor, fake_logits: Tensor, kind: str = ..., *, label_smoothing: float = ...,
    return_metrics: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def discriminator_loss(
    real_logits: Tensor, fake_logits: Tensor, kind: str = ..., *, label_smoothing: float = ...,
    return_metrics: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, DiscriminatorMetrics]: ...  # fmt: skip
def discriminator_loss(
    real_logits: Tensor,
    fake_logits: Tensor,
    kind: str = "bce",
    *,
    label_smoothing: float = 0.0,
    return_metrics: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, DiscriminatorMetrics]:
    """The discriminator's loss, averaged over the logits; stable for any finite logit.

    Args:
        real_logits, fake_logits: of any shape, same dtype and device; ``relativistic`` pairs them, so same shape there.
        kind: bce | non_saturating | lsgan | hinge | wgan | relativistic.
        label_smoothing: in [0, 1), bce and lsgan only: the real label is 1 − label_smoothing (Salimans 2016).
        return_metrics: also return :class:`DiscriminatorMetrics`.

    Returns:
        A scalar of the logits' dtype (accumulated in float32), or (scalar, metrics). Gradients of every order.

    Raises:
        TypeError, ValueError: naming the argument, what was got and what is accepted.
    """
    real, fake = checks.tensor("real_logits", real_logits), checks.tensor("fake_logits", fake_logits)
    _check_pair(real, fake, kind)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1); got {label_smoothing}")
    if label_smoothing and kind not in ("bce", "lsgan"):
        raise ValueError(f"label_smoothing needs kind 'bce' or 'lsgan', whose labels it smooths; got kind={kind!r}")
    if choose("discriminator_loss", real, backend) == "reference":
        loss = reference.discriminator_loss(real, fake, kind, label_smoothing)
        if not return_metrics:
            return loss
        metrics = reference.discriminator_metrics(real, fake)
    elif not runs_directly(real):
        loss, metrics = _DiscriminatorLoss.apply(real, fake, kind, label_smoothing)
    else:
        result = kernels_of(real).gan_loss.discriminator_loss(real, fake, kind, label_smoothing)
        if torch.is_grad_enabled() and (real.requires_grad or fake.requires_grad):
            loss, metrics = _attach_discriminator_loss(real, fake, kind, label_smoothing, result)
        else:
            loss, _, _, metrics = result
    return (loss, DiscriminatorMetrics(*metrics.unbind())) if return_metrics else loss


def generator_loss(
    fake_logits: Tensor, real_logits: Tensor | None = None, kind: str = "bce", *, backend: str | None = None
) -> Tensor:
    """The generator's loss, averaged over the logits; stable for any finite logit.

    Args:
        fake_logits: of any shape.
        real_logits: needed by ``relativistic`` (same shape), unused by the other kinds.
        kind: bce | non_saturating | lsgan | hinge | wgan | relativistic.

    Returns:
        A scalar of the logits' dtype (accumulated in float32). Gradients of every order.

    Raises:
        TypeError, ValueError: naming the argument, what was got and what is accepted.
    """
    fake = checks.tensor("fake_logits", fake_logits)
    if kind == "relativistic":
        if real_logits is None:
            raise ValueError("real_logits is required by kind='relativistic', which compares pair by pair; got None")
        real = checks.tensor("real_logits", real_logits)
        _check_pair(real, fake, kind)
    else:
        _check_kind(kind)
        _check_not_empty("fake_logits", fake)
        real = None
    if choose("generator_loss", fake, backend) == "reference":
        return reference.generator_loss(fake, real, kind)
    if not runs_directly(fake):
        return _GeneratorLoss.apply(fake, real, kind)
    result = kernels_of(fake).gan_loss.generator_loss(fake, real, kind)
    if torch.is_grad_enabled() and (fake.requires_grad or (real is not None and real.requires_grad)):
        return _attach_generator_loss(fake, real, kind, result)
    return result[0]


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")


def _check_not_empty(name: str, logits: Tensor) -> None:
    if logits.numel() == 0:
        raise ValueError(
            f"{name} must hold at least one logit, the mean of none is undefined; got {tuple(logits.shape)}"
        )


def _check_pair(real: Tensor, fake: Tensor, kind: str) -> None:
    _check_kind(kind)
    _check_not_empty("real_logits", real)
    _check_not_empty("fake_logits", fake)
    if real.dtype != fake.dtype:
        raise TypeError(f"fake_logits must be of real_logits' dtype {real.dtype}; got {fake.dtype}")
    if real.device != fake.device:
        raise ValueError(f"fake_logits must be on real_logits' device {real.device}; got {fake.device}")
    if kind == "relativistic" and real.shape != fake.shape:
        raise ValueError(
            f"kind='relativistic' pairs the logits: fake_logits must have real_logits' shape {tuple(real.shape)}; "
            f"got {tuple(fake.shape)}"
        )


# The gradients stay plain attributes of the context: nobody else holds them, so nothing that save_for_backward guards
# against can happen to them. The logits do go through it, and are looked at where the gradient is differentiated again.


class _DiscriminatorLoss(torch.autograd.Function):
    """The gradient is known with the value: backward is one multiplication.

    ``result``: what the kernel returned; None if it has not run yet and torch is to see it as an operator.
    """

    @staticmethod
    def forward(ctx, real, fake, kind, label_smoothing, result=None):  # type: ignore[override]
        result = result or ops.discriminator_loss(real, fake, kind, label_smoothing)
        loss, *ctx.gradients, metrics = result
        ctx.save_for_backward(real, fake)
        ctx.options = (kind, label_smoothing)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)  # no zeros for the gradient that metrics do not have
        return loss, metrics

    @staticmethod
    def backward(ctx, grad_loss, _grad_metrics):  # type: ignore[override]
        if torch.is_grad_enabled():
            real, fake = ctx.saved_tensors
            loss = reference.discriminator_loss(real, fake, *ctx.options)
            return (*reference_gradients(loss, (real, fake), grad_loss), None, None, None)
        return (*_scaled(ctx, grad_loss), None, None, None)


class _GeneratorLoss(torch.autograd.Function):
    """As above, for the generator."""

    @staticmethod
    def forward(ctx, fake, real, kind, result=None):  # type: ignore[override]
        loss, *ctx.gradients = result or ops.generator_loss(fake, real, kind)
        ctx.save_for_backward(fake, real)
        ctx.kind = kind
        return loss

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[override]
        if torch.is_grad_enabled():
            fake, real = ctx.saved_tensors
            loss = reference.generator_loss(fake, real, ctx.kind)
            return (*reference_gradients(loss, (fake, real), grad_loss), None, None)
        return (*_scaled(ctx, grad_loss), None, None)


# What Function.apply does after it has looked for functorch's wrappers, of which choose() has made sure that there are
# none: a seventh of a call saved.
_attach_discriminator_loss = super(torch.autograd.Function, _DiscriminatorLoss).apply
_attach_generator_loss = super(torch.autograd.Function, _GeneratorLoss).apply


def _scaled(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients with respect to the two sets of logits, where they are asked for."""
    (first, second), needed = ctx.gradients, ctx.needs_input_grad
    return first * grad_loss if needed[0] else None, second * grad_loss if needed[1] else None
