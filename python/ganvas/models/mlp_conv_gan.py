"""A GAN for 28×28 images whose generator is a tower of dense layers followed by two upsamplings."""

from __future__ import annotations

import itertools

from torch import nn

from ganvas.models.adversarial import Discriminator, Generator, check_options
from ganvas.models.registry import register
from ganvas.nn import FusedSequential

SIZE = 28
_SLOPE = 0.2
# Keras' momentum of 0.8 is the share of the old statistics, torch's of 0.2 that of the new.
_MOMENTUM = 0.2


@register("mlp_conv_gan", kind="gan")
def mlp_conv_gan(
    size: int = SIZE, channels: int = 1, num_classes: int | None = None, latent_size: int = 100
) -> tuple[Generator, Discriminator]:
    """GAN of dense and convolutional layers for size 28 only, conditional on labels or not.

    Generator: dense 256, 512, 1024 and 7·7·256, each followed by LeakyReLU 0.2 and then BatchNorm; twice a nearest 2×
    upsampling with a 3×3 convolution of 128 channels, BatchNorm and LeakyReLU; a 3×3 convolution and tanh.
    Discriminator: four 3×3 convolutions of 128 channels, the first of stride 2, each followed by LeakyReLU 0.2 and then
    BatchNorm; dense 512 and 256 with LeakyReLU; dense 1 (or one logit for each class).
    """
    if type(size) is not int or size != SIZE:
        raise ValueError(f"size must be {SIZE} for mlp_conv_gan, got {size!r}")
    check_options(channels, num_classes, latent_size)
    in_features = Generator.in_features(latent_size, num_classes)
    generator = Generator(
        _generator_body(in_features, channels),
        latent_size=latent_size, size=size, channels=channels, num_classes=num_classes,
    )  # fmt: skip
    discriminator = Discriminator(
        _discriminator_body(channels, 1 if num_classes is None else num_classes),
        size=size, channels=channels, num_classes=num_classes,
    )  # fmt: skip
    return generator, discriminator


def _generator_body(in_features: int, channels: int) -> FusedSequential:
    layers: list[nn.Module] = []
    widths = (in_features, 256, 512, 1024, 7 * 7 * 256)
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(_SLOPE), nn.BatchNorm1d(outputs, momentum=_MOMENTUM)]
    layers.append(nn.Unflatten(1, (256, 7, 7)))
    for in_channels in (256, 128):
        layers += [
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(in_channels, 128, 3, padding=1),
            nn.BatchNorm2d(128, momentum=_MOMENTUM),
            nn.LeakyReLU(_SLOPE),
        ]
    layers += [nn.Conv2d(128, channels, 3, padding=1), nn.Tanh()]
    return FusedSequential(*layers)


def _discriminator_body(channels: int, num_logits: int) -> FusedSequential:
    layers: list[nn.Module] = []
    for in_channels, stride in ((channels, 2), (128, 1), (128, 1), (128, 1)):
        layers += [
            nn.Conv2d(in_channels, 128, 3, stride=stride, padding=1),
            nn.LeakyReLU(_SLOPE),
            nn.BatchNorm2d(128, momentum=_MOMENTUM),
        ]
    layers += [
        nn.Flatten(),
        nn.Linear(128 * 14 * 14, 512),
        nn.LeakyReLU(_SLOPE),
        nn.Linear(512, 256),
        nn.LeakyReLU(_SLOPE),
        nn.Linear(256, num_logits),
    ]
    return FusedSequential(*layers)
