"""Deep convolutional GAN (Radford, Metz & Chintala 2016) for square images of 16, 32, 64 or 128 pixels."""

from __future__ import annotations

import itertools

from torch import nn

from ganvas.models import checks
from ganvas.models.adversarial import Discriminator, Generator, check_options
from ganvas.models.registry import register
from ganvas.nn import FusedSequential

SIZES = (16, 32, 64, 128)
_SEED_SIZE = 4
"""Side of the generator's first and of the discriminator's last map."""


@register("dcgan", kind="gan")
def dcgan(
    size: int = 64, channels: int = 3, num_classes: int | None = None, latent_size: int = 100, width: int = 64
) -> tuple[Generator, Discriminator]:
    """Deep convolutional GAN for sizes 16, 32, 64, 128, conditional on labels or not.

    Every 4×4 convolution of stride 2 halves (discriminator) or doubles (generator) the map and doubles or halves the
    channels, between maps of side 4 with ``width * size / 8`` channels and of side ``size / 2`` with ``width``.
    BatchNorm everywhere but in the generator's last and the discriminator's first and last layer; ReLU in the
    generator, LeakyReLU 0.2 in the discriminator. Weights N(0, 0.02), BatchNorm weights N(1, 0.02).
    """
    if type(size) is not int or size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(map(str, SIZES))} for dcgan, got {size!r}")
    check_options(channels, num_classes, latent_size)
    checks.integer("width", width)
    widths = [width * size // (2 * side) for side in _sides(size)]
    in_features = Generator.in_features(latent_size, num_classes)
    generator = Generator(
        _generator_body(in_features, widths, channels),
        latent_size=latent_size, size=size, channels=channels, num_classes=num_classes,
    )  # fmt: skip
    discriminator = Discriminator(
        _discriminator_body(channels, widths[::-1], 1 if num_classes is None else num_classes),
        size=size, channels=channels, num_classes=num_classes,
    )  # fmt: skip
    _initialise(generator.body)
    _initialise(discriminator.body)
    return generator, discriminator


def _sides(size: int) -> list[int]:
    """Sides of the maps between the latent and the image: 4, 8, ..., size / 2."""
    sides = [_SEED_SIZE]
    while 2 * sides[-1] < size:
        sides.append(2 * sides[-1])
    return sides


def _generator_body(in_features: int, widths: list[int], channels: int) -> FusedSequential:
    layers: list[nn.Module] = [
        nn.Unflatten(1, (in_features, 1, 1)),
        nn.ConvTranspose2d(in_features, widths[0], _SEED_SIZE, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
    ]
    for in_channels, out_channels in itertools.pairwise(widths):
        layers += [
            nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        ]
    layers += [nn.ConvTranspose2d(widths[-1], channels, 4, stride=2, padding=1), nn.Tanh()]
    return FusedSequential(*layers)


def _discriminator_body(channels: int, widths: list[int], num_logits: int) -> FusedSequential:
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for in_channels, out_channels in itertools.pairwise(widths):
        layers += [
            nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(0.2),
        ]
    layers += [nn.Conv2d(widths[-1], num_logits, _SEED_SIZE), nn.Flatten()]
    return FusedSequential(*layers)


def _initialise(body: nn.Module) -> None:
    """N(0, 0.02) for convolutions, N(1, 0.02) for BatchNorm weights, 0 for biases (Radford et al., section 4)."""
    for name, parameter in body.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            # Convolution weights have four dimensions, BatchNorm weights one.
            nn.init.normal_(parameter, 0.0 if parameter.dim() == 4 else 1.0, 0.02)
