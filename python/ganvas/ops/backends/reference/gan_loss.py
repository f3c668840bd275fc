"""Adversarial losses on logits, in plain torch. r = D(real), f = D(fake), σ the sigmoid, softplus(x) = log(1 + eˣ).

==============  =========================================  ====================  ==============================
kind            discriminator                              generator             source
==============  =========================================  ====================  ==============================
bce             BCE(σ(r), 1 − smoothing) + BCE(σ(f), 0)    BCE(σ(f), 1)          Goodfellow 2014; Salimans 2016
non_saturating  mean softplus(−r) + mean softplus(f)       mean softplus(−f)     Goodfellow 2014, section 3
lsgan           ½ mean (r − 1 + smoothing)² + ½ mean f²    ½ mean (f − 1)²       Mao 2017, equation 9
hinge           mean max(0, 1 − r) + mean max(0, 1 + f)    −mean f               Lim & Ye 2017
wgan            mean f − mean r                            −mean f               Arjovsky 2017
relativistic    mean softplus(f − r), pair by pair         mean softplus(r − f)  Jolicoeur-Martineau 2018
==============  =========================================  ====================  ==============================

With labels 1 and 0 and no smoothing ``bce`` and ``non_saturating`` are the same function: −log σ(x) = softplus(−x).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _bce_discriminator(real: Tensor, fake: Tensor, smoothing: float) -> Tensor:
    # BCE(σ(r), t) = softplus(−r) + (1 − t)·r: stable for any logit, where log(σ(r)) is not.
    return (F.softplus(-real) + smoothing * real).mean() + F.softplus(fake).mean()


def _non_saturating_discriminator(real: Tensor, fake: Tensor, smoothing: float) -> Tensor:
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def _lsgan_discriminator(real: Tensor, fake: Tensor, smoothing: float) -> Tensor:
    return 0.5 * (real - (1.0 - smoothing)).square().mean() + 0.5 * fake.square().mean()


def _hinge_discriminator(real: Tensor, fake: Tensor, smoothing: float) -> Tensor:
    return F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()


def _wgan_discriminator(real: Tensor, fake: Tensor, smoothing: float) -> Tensor:
    return fake.mean() - real.mean()


def _relativistic_discriminator(real: Tensor, fake: Tensor, smoothing: float) -> Tensor:
    return F.softplus(fake - real).mean()


_DISCRIMINATOR: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "bce": _bce_discriminator,
    "non_saturating": _non_saturating_discriminator,
    "lsgan": _lsgan_discriminator,
    "hinge": _hinge_discriminator,
    "wgan": _wgan_discriminator,
    "relativistic": _relativistic_discriminator,
}

_GENERATOR: dict[str, Callable[[Tensor], Tensor]] = {
    "bce": lambda fake: F.softplus(-fake).mean(),
    "non_saturating": lambda fake: F.softplus(-fake).mean(),
    "lsgan": lambda fake: 0.5 * (fake - 1.0).square().mean(),
    "hinge": lambda fake: -fake.mean(),
    "wgan": lambda fake: -fake.mean(),
}


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str, label_smoothing: float = 0.0) -> Tensor:
    """Specification of :func:`ganvas.ops.discriminator_loss`: a scalar of the logits' dtype."""
    return _DISCRIMINATOR[kind](real_logits, fake_logits, label_smoothing)


def generator_loss(fake_logits: Tensor, real_logits: Tensor | None, kind: str) -> Tensor:
    """Specification of :func:`ganvas.ops.generator_loss`: a scalar of the logits' dtype."""
    if kind == "relativistic":
        assert real_logits is not None
        return F.softplus(real_logits - fake_logits).mean()
    return _GENERATOR[kind](fake_logits)


def discriminator_metrics(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(4,) float32: mean real logit, mean fake logit, share of real logits > 0, share of fake logits < 0."""
    real, fake = real_logits.detach().float(), fake_logits.detach().float()
    return torch.stack([real.mean(), fake.mean(), (real > 0).float().mean(), (fake < 0).float().mean()])
