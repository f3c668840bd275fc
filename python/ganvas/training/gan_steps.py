"""Parts of an adversarial step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ganvas.nn import statistics_groups, supports_statistics_groups


def discriminate_pair(
    discriminator: nn.Module, real: Tensor, fake: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """D(real), D(fake): logits (N,) each, with batch statistics of their own, in one forward where that is possible.

    Args:
        real, fake: (N, C, H, W), the same N.
        labels: (N,) of the real images, which the generated ones share; None for an unconditional discriminator.
    """
    if supports_statistics_groups(discriminator) is not None:
        return _call(discriminator, real, labels), _call(discriminator, fake, labels)
    with statistics_groups(discriminator, 2):
        logits = _call(discriminator, torch.cat([real, fake]), None if labels is None else labels.repeat(2))
    real_logits, fake_logits = logits.chunk(2)
    return real_logits, fake_logits


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the block the parameters need no gradient: it flows through the module, but none is computed for it."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def averaged_generator(generator: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of parameters and BatchNorm statistics, by torch's own means.

    The decay grows with the number n of updates as min(decay, (1 + n) / (10 + n)): otherwise the random initial weights
    would be part of the average for the first 1 / (1 − decay) steps, which is all of a short run.
    """

    def average(ours: Sequence[Tensor], theirs: Sequence[Tensor], updates: Tensor | int) -> None:
        # The model's own counter is on the CPU; ``updates`` is a copy on the device, which reading it would wait for.
        n = int(averaged.n_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(ours, theirs, updates)  # type: ignore[arg-type]

    averaged = AveragedModel(generator, multi_avg_fn=average, use_buffers=True)
    return averaged


def _call(discriminator: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
    return discriminator(images) if labels is None else discriminator(images, labels)
