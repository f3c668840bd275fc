"""The shapes every suite runs, as data. Batch, channels, height (= width): what classifiers and GANs are made of.

Some are meant to be awkward: channels that fill no vector register, odd maps, one pixel, a handful of rows.
"""

from __future__ import annotations

from typing import NamedTuple


class MapShape(NamedTuple):
    """A channels-last activation of ``batch × channels × size × size``."""

    batch: int
    channels: int
    size: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}x{self.size}x{self.size}"


ACTIVATIONS = (
    MapShape(128, 32, 32),
    MapShape(128, 64, 32),
    MapShape(64, 64, 64),
    MapShape(128, 128, 16),
    MapShape(128, 128, 14),
    MapShape(256, 128, 28),
    MapShape(128, 256, 8),
    MapShape(128, 512, 4),
    MapShape(64, 16, 32),
    MapShape(37, 48, 17),
    MapShape(16, 3, 33),
    MapShape(8, 256, 8),
    MapShape(4, 32, 8),
    MapShape(128, 512, 1),
)

# Inputs of chains of 3×3 convolutions as wide as the input.
CHAINS = (
    MapShape(128, 32, 32),
    MapShape(64, 64, 32),
    MapShape(16, 64, 64),
    MapShape(64, 128, 16),
    MapShape(32, 128, 28),
    MapShape(64, 256, 8),
    MapShape(128, 256, 16),
    MapShape(64, 96, 14),
    MapShape(37, 48, 17),
    MapShape(16, 100, 30),
    MapShape(16, 32, 8),
)

# Inputs of nearest-2× upsampling and a 3×3 convolution.
UPSAMPLED = (MapShape(64, 128, 16), MapShape(128, 128, 7), MapShape(128, 128, 14), MapShape(32, 64, 32))

LOGITS = (64, 128, 1024, 115200)
