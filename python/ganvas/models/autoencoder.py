"""A convolutional autoencoder: images to a latent vector and back."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from ganvas.models import checks
from ganvas.models.blocks import conv_bn_leaky_relu
from ganvas.models.registry import register
from ganvas.nn import FusedSequential


class Autoencoder(nn.Module):
    """Images (N, channels, size, size) in [-1, 1] to latents (N, latent_size) and back to images.

    Raises (when called):
        TypeError, ValueError: images or latents of the wrong type, shape or dtype.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, size: int, channels: int, latent_size: int) -> None:
        super().__init__()
        self.size = size
        self.channels = channels
        self.latent_size = latent_size
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, images: Tensor) -> Tensor:
        checks.images(images, self.channels, self.size)
        return self.encoder(images)

    def decode(self, latent: Tensor) -> Tensor:
        checks.vectors("latent", latent, self.latent_size)
        return self.decoder(latent)

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))


@register("conv_autoencoder", kind="autoencoder")
def conv_autoencoder(size: int = 32, channels: int = 3, latent_size: int = 64, width: int = 32) -> Autoencoder:
    """Convolutional autoencoder for sizes that are multiples of 4, at least 8.

    The encoder halves the map by 4×4 convolutions of stride 2, BatchNorm and LeakyReLU, while its side is even and
    larger than 4 (28 → 14 → 7, 32 → 16 → 8 → 4), the channels doubling from ``width`` up to 8 × ``width``; a dense
    layer makes the latent. The decoder is its mirror image with transposed convolutions and a tanh at the end.
    """
    if type(size) is not int or size < 8 or size % 4:
        raise ValueError(f"size must be a multiple of 4 and at least 8 for conv_autoencoder, got {size!r}")
    checks.integer("channels", channels)
    checks.integer("latent_size", latent_size)
    checks.integer("width", width)
    widths = [channels]
    side = size
    while side > 4 and side % 2 == 0:
        widths.append(min(width * 2 ** (len(widths) - 1), 8 * width))
        side //= 2
    return Autoencoder(
        _encoder(widths, side, latent_size), _decoder(widths[::-1], side, latent_size),
        size=size, channels=channels, latent_size=latent_size,
    )  # fmt: skip


def _encoder(widths: list[int], side: int, latent_size: int) -> FusedSequential:
    layers: list[nn.Module] = []
    for in_channels, out_channels in itertools.pairwise(widths):
        layers += conv_bn_leaky_relu(in_channels, out_channels, 4, stride=2)
    layers += [nn.Flatten(), nn.Linear(widths[-1] * side * side, latent_size)]
    return FusedSequential(*layers)


def _decoder(widths: list[int], side: int, latent_size: int) -> FusedSequential:
    layers: list[nn.Module] = [
        nn.Linear(latent_size, widths[0] * side * side, bias=False),
        nn.Unflatten(1, (widths[0], side, side)),
        nn.BatchNorm2d(widths[0]),
        nn.LeakyReLU(0.1),
    ]
    for in_channels, out_channels in itertools.pairwise(widths[:-1]):
        layers += [
            nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(0.1),
        ]
    layers += [nn.ConvTranspose2d(widths[-2], widths[-1], 4, stride=2, padding=1), nn.Tanh()]
    return FusedSequential(*layers)
