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

# Inputs of bottlenecks, whose 3×3 convolution has a quarter of the channels.
BOTTLENECKS = (MapShape(8, 256, 56), MapShape(8, 512, 28), MapShape(32, 256, 16))

LOGITS = (64, 128, 1024, 115200)


class LayerShape(NamedTuple):
    """A convolution on a channels-last input of ``batch × in_channels × size × size``."""

    kind: str  # of CONVOLUTIONS
    batch: int
    in_channels: int
    out_channels: int
    size: int

    @property
    def out_size(self) -> int:
        """Side of the output."""
        return int(self.size * CONVOLUTIONS[self.kind].scale)

    def __str__(self) -> str:
        return f"{self.kind} {self.batch}x{self.in_channels}x{self.size}x{self.size} → {self.out_channels}"


class Convolution(NamedTuple):
    """What there is to know of a kind of convolution before its shapes are known."""

    kernel_size: int
    scale: float  # of the map's side
    taps: int  # multiplications for an output value and input channel, at least


# The last two as four phases, each on the small map: a 2×2 convolution without the zeros, or with the sums of weights
# that meet the same pixel.
CONVOLUTIONS = {
    "1x1": Convolution(1, 1, 1),
    "3x3": Convolution(3, 1, 9),
    "4x4/2": Convolution(4, 0.5, 16),
    "transposed 4x4/2": Convolution(4, 2, 4),
    "upsampled 3x3": Convolution(3, 2, 4),
}

# On a GPU. What is cut short by the time has seen narrow and wide, large and small, every kind.
GPU_LAYERS = (
    LayerShape("3x3", 512, 64, 64, 32),
    LayerShape("3x3", 128, 128, 128, 16),
    LayerShape("4x4/2", 128, 64, 128, 64),
    LayerShape("transposed 4x4/2", 128, 128, 64, 16),
    LayerShape("3x3", 256, 32, 32, 64),
    LayerShape("1x1", 256, 64, 128, 32),
    LayerShape("upsampled 3x3", 128, 128, 64, 16),
    LayerShape("3x3", 128, 256, 256, 16),
    LayerShape("3x3", 67, 48, 48, 37),
    LayerShape("3x3", 128, 64, 64, 16),
    LayerShape("3x3", 128, 512, 512, 8),
    LayerShape("3x3", 64, 32, 32, 128),
    LayerShape("4x4/2", 512, 128, 256, 16),
    LayerShape("transposed 4x4/2", 256, 64, 32, 32),
    LayerShape("3x3", 512, 128, 128, 8),
    LayerShape("3x3", 100, 100, 100, 29),
    LayerShape("1x1", 128, 256, 64, 16),
    LayerShape("upsampled 3x3", 64, 64, 32, 64),
    LayerShape("3x3", 256, 128, 128, 32),
    LayerShape("3x3", 256, 512, 512, 4),
    LayerShape("transposed 4x4/2", 128, 512, 256, 4),
    LayerShape("4x4/2", 128, 32, 64, 128),
    LayerShape("3x3", 128, 64, 64, 64),
    LayerShape("3x3", 256, 256, 256, 8),
)

# Inputs of chains of 3×3 convolutions as wide as the input, on a GPU.
GPU_CHAINS = (
    MapShape(256, 64, 32),
    MapShape(128, 128, 16),
    MapShape(128, 32, 64),
    MapShape(512, 64, 16),
    MapShape(128, 256, 8),
    MapShape(93, 48, 37),
)

# Maps of 256 MiB and more.
GPU_ACTIVATIONS = {
    "bfloat16": (MapShape(512, 64, 64), MapShape(512, 256, 32), MapShape(331, 100, 65), MapShape(512, 512, 23)),
    "float32": (MapShape(256, 64, 64),),
}
