"""What generators and discriminators have in common: labels, input checks, attributes.

Conditioning. The generator sees the label as an embedding beside the latent. The discriminator has one logit for each
class and returns that of the label (Mescheder et al. 2018; as in the projection discriminator of Miyato & Koyama 2018,
the label enters linearly in the features). So labels never pass through a BatchNorm, and a batch of real images
followed by generated ones can go through the body with two statistics groups whatever the labels are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ganvas.models import checks

LABEL_FEATURES = 50
"""Length of a generator's label embedding: about half of the usual latent, so that neither drowns the other."""


class Generator(nn.Module):
    """Latents (N, latent_size) from N(0, 1) to images (N, channels, size, size) in [-1, 1].

    Args:
        body: (N, in_features) to images, where in_features is :meth:`in_features`.
        latent_size, size, channels, num_classes: kept as attributes; ``num_classes=None`` is unconditional.

    Raises (when called):
        TypeError, ValueError: latents or labels of the wrong type, shape, dtype or range; labels missing where the
            generator is conditional, or given where it is not.
    """

    def __init__(
        self, body: nn.Module, *, latent_size: int, size: int, channels: int, num_classes: int | None = None
    ) -> None:
        super().__init__()
        self.latent_size = latent_size
        self.size = size
        self.channels = channels
        self.num_classes = num_classes
        self.label_embedding = None if num_classes is None else nn.Embedding(num_classes, LABEL_FEATURES)
        self.body = body

    @staticmethod
    def in_features(latent_size: int, num_classes: int | None) -> int:
        """Length of the vector that the body receives."""
        return latent_size + (0 if num_classes is None else LABEL_FEATURES)

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        checks.vectors("latent", latent, self.latent_size)
        checks.labels(labels, self.num_classes, latent.shape[0])
        if self.label_embedding is not None:
            latent = torch.cat([latent, self.label_embedding(labels)], dim=1)
        return self.body(latent)


class Discriminator(nn.Module):
    """Images (N, channels, size, size) in [-1, 1] to logits (N,), positive for "real".

    Args:
        body: images to logits, (N, 1) or, where ``num_classes`` is given, (N, num_classes).
        size, channels, num_classes: kept as attributes; ``num_classes=None`` is unconditional.

    Raises (when called):
        TypeError, ValueError: images or labels of the wrong type, shape, dtype or range; labels missing where the
            discriminator is conditional, or given where it is not.
    """

    def __init__(self, body: nn.Module, *, size: int, channels: int, num_classes: int | None = None) -> None:
        super().__init__()
        self.size = size
        self.channels = channels
        self.num_classes = num_classes
        self.body = body

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        checks.images(images, self.channels, self.size)
        checks.labels(labels, self.num_classes, images.shape[0])
        logits = self.body(images)
        return logits.squeeze(1) if labels is None else logits.gather(1, labels[:, None]).squeeze(1)


def check_options(channels: int, num_classes: int | None, latent_size: int) -> None:
    """Raise ValueError for an option that is out of its range."""
    checks.integer("channels", channels)
    checks.integer("latent_size", latent_size)
    if num_classes is not None:
        checks.integer("num_classes", num_classes, 2)
