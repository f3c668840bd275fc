"""Parts of an adversarial step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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


class AveragedGenerator(nn.Module):
    """Exponential moving average of a generator's parameters and BatchNorm statistics.

    The decay grows with the number n of updates as min(decay, (1 + n) / (10 + n)): otherwise the random initial weights
    would be part of the average for the first 1 / (1 − decay) steps, which is all of a short run. The first update
    (n = 0) copies.

    The number is counted on the generator's device, where the decay is worked out from it: nothing is read back, and
    a CUDA graph that holds an update holds every later one.

    Args:
        generator: copied, with its device and memory format.
        decay: in [0, 1).
    """

    n_averaged: Tensor

    def __init__(self, generator: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(generator)
        self._decay = decay
        device = next(generator.parameters()).device
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def update_parameters(self, generator: nn.Module) -> None:
        """Move the average towards ``generator``, the network it was made of."""
        n = self.n_averaged.double()
        decay = ((1 + n) / (10 + n)).clamp_(max=self._decay).mul_(n > 0)
        weight, decay = (1 - decay).float(), decay.float()
        for mean, value in zip(_tensors(self.module), _tensors(generator)):
            if mean.is_floating_point():
                mean.lerp_(value, weight.to(mean.dtype))
            else:
                mean.copy_(mean * decay + value * weight)
        self.n_averaged.add_(1)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _call(discriminator: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
    return discriminator(images) if labels is None else discriminator(images, labels)
