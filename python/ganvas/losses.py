"""Losses of GANs: the adversarial ones as modules over :mod:`ganvas.ops`, and the terms that keep training stable.

==========================  ==========================================  =================================
Term                        Formula                                     Source
==========================  ==========================================  =================================
:class:`DiscriminatorLoss`  six kinds, see :mod:`ganvas.ops`            there
:class:`GeneratorLoss`      six kinds, see :mod:`ganvas.ops`            there
:func:`r1_penalty`          γ/2 · E ‖∇ₓ D(x)‖², x real                  Mescheder et al. 2018, eq. 9
:func:`r2_penalty`          γ/2 · E ‖∇ₓ D(x)‖², x generated             Mescheder et al. 2018, eq. 10
:func:`gradient_penalty`    λ · E (‖∇ₓ D(x)‖₂ − 1)², x between the two  Gulrajani et al. 2017, eq. 3
:func:`feature_matching`    ‖E f(x) − E f(G(z))‖²                       Salimans et al. 2016, section 3.1
==========================  ==========================================  =================================

The penalties hold a gradient themselves, so a step on them differentiates twice: every module in the discriminator must
support double backward, as ganvas' do. All terms are scalars to be added to a loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ganvas import ops
from ganvas.ops.gan_loss import KINDS, DiscriminatorMetrics


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")


class DiscriminatorLoss(nn.Module):
    """:func:`ganvas.ops.discriminator_loss` with its options fixed.

    Args:
        kind: bce | non_saturating | lsgan | hinge | wgan | relativistic.
        label_smoothing: in [0, 1); one-sided, for the kinds with labels (bce and lsgan).

    Raises:
        ValueError: unknown kind, label smoothing out of range or for a kind without labels.
    """

    def __init__(self, kind: str = "bce", *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        _check_kind(kind)
        self.kind = kind
        self.label_smoothing = label_smoothing
        # The operation knows which kinds it smooths. Asked now, a wrong combination is an error of the configuration
        # and not one of the first training step.
        ops.discriminator_loss(
            torch.zeros(1), torch.zeros(1), kind, label_smoothing=label_smoothing, backend="reference"
        )

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Scalar loss of logits of any shape; ``relativistic`` pairs them and needs equal shapes."""
        return ops.discriminator_loss(real_logits, fake_logits, self.kind, label_smoothing=self.label_smoothing)

    def with_metrics(self, real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, DiscriminatorMetrics]:
        """The loss and, from the same pass over the logits, the mean logits and the shares classified right."""
        return ops.discriminator_loss(
            real_logits, fake_logits, self.kind, label_smoothing=self.label_smoothing, return_metrics=True
        )

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, label_smoothing={self.label_smoothing}"


class GeneratorLoss(nn.Module):
    """:func:`ganvas.ops.generator_loss` of one kind.

    Args:
        kind: bce | non_saturating | lsgan | hinge | wgan | relativistic.

    Raises:
        ValueError: unknown kind.
    """

    def __init__(self, kind: str = "bce") -> None:
        super().__init__()
        _check_kind(kind)
        self.kind = kind

    def forward(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        """Scalar loss of logits of any shape; ``relativistic`` needs ``real_logits`` of the same shape."""
        return ops.generator_loss(fake_logits, real_logits, self.kind)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


def r1_penalty(real_logits: Tensor, real_images: Tensor, gamma: float = 10.0) -> Tensor:
    """γ/2 · E ‖∇ₓ D(x)‖² on real images: a discriminator flat where the data are, so that training converges locally.

    Mescheder, Geiger & Nowozin 2018, "Which Training Methods for GANs do actually Converge?", eq. 9.

    Logits and not the discriminator are passed, so that one forward pass serves the adversarial loss and the penalty::

        real_images.requires_grad_()
        real_logits = discriminator(real_images)
        loss = adversarial(real_logits, fake_logits) + r1_penalty(real_logits, real_images, gamma)

    The gradient is that of the sum of the logits. With batch normalisation in the discriminator a logit depends on the
    other images of the batch as well, and their share is included, as in every implementation.

    Args:
        real_logits: one logit per image, any shape of N values, computed from ``real_images``.
        real_images: (N, ...) floating point, ``requires_grad`` set before the forward pass.
        gamma: weight γ ≥ 0; times k when the penalty is applied every k-th step only (Karras et al. 2020).

    Returns:
        0-dim float32 (float64 for float64 images), differentiable.

    Raises:
        ValueError: no images, not one logit per image, logits without a graph back to the images, negative gamma.
    """
    return _squared_gradient(real_logits, real_images, gamma, "real")


def r2_penalty(fake_logits: Tensor, fake_images: Tensor, gamma: float = 10.0) -> Tensor:
    """:func:`r1_penalty` on generated images (Mescheder et al. 2018, eq. 10); detach them from the generator first."""
    return _squared_gradient(fake_logits, fake_images, gamma, "fake")


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor],
    real_images: Tensor,
    fake_images: Tensor,
    weight: float = 10.0,
    *,
    rng: torch.Generator | None = None,
) -> Tensor:
    """λ · E (‖∇ₓ D(x)‖₂ − 1)² at x = ε·real + (1 − ε)·fake, ε ~ U[0, 1] per pair.

    WGAN-GP (Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", eq. 3), for kind ``wgan``.

    A discriminator with batch normalisation has no gradient of its own per image; the paper leaves the layer out.

    Args:
        discriminator: images (N, ...) to one logit per image; with labels as ``lambda images: d(images, labels)``.
        real_images: (N, ...) floating point.
        fake_images: of the same shape, dtype and device. No gradient flows back to either.
        weight: λ ≥ 0.
        rng: source of ε, on the images' device; torch's global one when None.

    Returns:
        0-dim float32 (float64 for float64 images), differentiable with respect to the discriminator's parameters.

    Raises:
        ValueError: shapes, dtypes or devices that differ, no images, not one logit per image, negative weight.
    """
    if (real_images.shape, real_images.dtype, real_images.device) != (
        fake_images.shape,
        fake_images.dtype,
        fake_images.device,
    ):
        raise ValueError(
            "fake_images must have the shape, dtype and device of real_images,"
            f" got {tuple(fake_images.shape)} {fake_images.dtype} {fake_images.device}"
            f" and {tuple(real_images.shape)} {real_images.dtype} {real_images.device}"
        )
    _check_weight("weight", weight)
    _check_images("real_images", real_images)
    mix = torch.rand(
        (real_images.shape[0], *[1] * (real_images.dim() - 1)),
        dtype=real_images.dtype,
        device=real_images.device,
        generator=rng,
    )
    between = torch.lerp(fake_images.detach(), real_images.detach(), mix).requires_grad_()
    norms = torch.linalg.vector_norm(_image_gradients(discriminator(between), between, "the images between"), dim=1)
    return weight * (norms - 1).square().mean()


def feature_matching(real_features: Tensor, fake_features: Tensor) -> Tensor:
    """‖E f(x) − E f(G(z))‖², the generator's feature matching term (Salimans et al. 2016, section 3.1).

    Args:
        real_features: (N, ...) of an inner layer of the discriminator on real images; no gradient flows into it.
        fake_features: (M, ...) of the same layer on generated images.

    Returns:
        0-dim float32 (float64 for float64 features), differentiable with respect to ``fake_features``.

    Raises:
        ValueError: features of different shape beyond the batch, no samples.
    """
    if real_features.dim() < 2 or fake_features.shape[1:] != real_features.shape[1:]:
        raise ValueError(
            "real_features and fake_features must be (N, ...) and (M, ...) with the same features,"
            f" got {tuple(real_features.shape)} and {tuple(fake_features.shape)}"
        )
    if real_features.shape[0] == 0 or fake_features.shape[0] == 0:
        raise ValueError(
            "real_features and fake_features must hold at least one sample,"
            f" got {tuple(real_features.shape)} and {tuple(fake_features.shape)}"
        )
    difference = _widen(real_features.detach()).mean(dim=0) - _widen(fake_features).mean(dim=0)
    return difference.square().sum()


def _squared_gradient(logits: Tensor, images: Tensor, gamma: float, side: str) -> Tensor:
    _check_weight("gamma", gamma)
    _check_images(f"{side}_images", images)
    gradients = _image_gradients(logits, images, f"{side}_images")
    return 0.5 * gamma * gradients.square().sum(dim=1).mean()


def _image_gradients(logits: Tensor, images: Tensor, name: str) -> Tensor:
    """(N, values of an image): gradient of each image's logit, itself differentiable, in at least float32."""
    if logits.numel() != images.shape[0]:
        raise ValueError(
            f"there must be one logit for each of {name}, got {tuple(logits.shape)} for {images.shape[0]} images"
        )
    if not (images.requires_grad and logits.requires_grad):
        raise ValueError(f"logits must be computed from {name} after {name}.requires_grad_(), with gradients enabled")
    (gradients,) = torch.autograd.grad(logits.sum(), images, create_graph=True, allow_unused=True)
    if gradients is None:
        raise ValueError(f"logits do not depend on {name}: pass the very tensor that the discriminator was given")
    return _widen(gradients).flatten(1)


def _widen(values: Tensor) -> Tensor:
    """At least float32: squares of half-precision gradients overflow, or vanish in a sum."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_images(name: str, images: Tensor) -> None:
    if images.dim() < 2 or images.shape[0] == 0 or not images.is_floating_point():
        raise ValueError(
            f"{name} must be a floating point batch (N, ...) of at least one image,"
            f" got {images.dtype} {tuple(images.shape)}"
        )


def _check_weight(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")
