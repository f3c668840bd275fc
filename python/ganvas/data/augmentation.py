"""Augmentation of a whole batch on its device, from random numbers that are passed in.

Random crops of the padded image, mirroring, and cutout (T. DeVries, G. Taylor, "Improved Regularization of
Convolutional Neural Networks with Cutout", 2017, arXiv:1708.04552), vectorised over the batch and free of host
synchronisation.

Images are worked on in channels_last memory order, in which each row of a crop is one run of neighbouring values: whole
images and whole rows are selected, which a CPU copies. Indexing pixel by pixel takes ten times as long.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PADDINGS = ("zero", "reflect")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to each training image, chosen anew in each epoch.

    flip: mirror left and right with probability 1/2. Not for digits and letters.
    shift: move by up to this many pixels in each direction.
    padding: what moves in at the border: ``zero`` (black) or ``reflect``.
    cutout: side in pixels of a square at a random place that is made black; 0 for none. It may reach over the border.
    Raises ValueError for negative pixels or an unknown padding.
    """

    flip: bool = False
    shift: int = 0
    padding: str = "zero"
    cutout: int = 0

    num_random = 5
    """Random numbers per image: mirroring, shift down, shift right, and the cutout's row and column."""

    def __post_init__(self) -> None:
        if self.shift < 0 or self.cutout < 0:
            raise ValueError(f"shift and cutout must not be negative; got shift={self.shift}, cutout={self.cutout}")
        if self.padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}; got {self.padding!r}")

    def __call__(self, images: Tensor, random: Tensor) -> Tensor:
        """Augment (N, C, H, W) images, uint8 or float in [-1, 1], by uniform numbers in [0, 1).

        random: (N, 5) float32 on the device of the images. The same numbers give the same result on every device.
        The result is channels_last where anything was done.
        Raises ValueError if ``shift`` does not leave a pixel of the image.
        """
        self.check_size(min(images.shape[2:]))
        if self.flip:
            images = mirror(images, random[:, 0] < 0.5)
        if self.shift:
            images = shift_images(images, self.shift, whole(random[:, 1:3], 2 * self.shift + 1), self.padding)
        if self.cutout:
            images = cut_out(images, self.cutout, random[:, 3:5])
        return images

    def check_size(self, size: int) -> None:
        """Raise ValueError if images of this side are too small for ``shift``."""
        if self.shift >= size:
            raise ValueError(f"shift must be less than the image size of {size} pixels; got {self.shift}")


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror left and right the images (N, C, H, W) that are ``chosen``, (N,) bool."""
    pixels = images.permute(0, 2, 3, 1).contiguous()
    both = torch.cat([pixels, pixels.flip(2)])
    picks = torch.arange(len(images), device=images.device) + len(images) * chosen
    return both.index_select(0, picks).permute(0, 3, 1, 2)


def shift_images(images: Tensor, shift: int, corners: Tensor, padding: str) -> Tensor:
    """Cut from each image, padded by ``shift`` pixels on all sides, the window at its corner.

    images: (N, C, H, W); corners: (N, 2) int64 rows and columns in [0, 2*shift]; (shift, shift) changes nothing.
    """
    pixels = images.permute(0, 2, 3, 1)
    count, height, width, channels = pixels.shape
    if padding == "zero":
        padded = F.pad(pixels, (0, 0, shift, shift, shift, shift), value=black(images)).contiguous()
    else:  # torch's reflection padding has no uint8 kernel
        rows, columns = (reflected(length, shift, images.device) for length in (height, width))
        padded = pixels.index_select(1, rows).index_select(2, columns).contiguous()
    # Every run of a row's length in the padded batch, by where it begins: overlapping views of the same memory.
    run = width * channels
    runs = padded.view(-1).as_strided((max(padded.numel() - run + 1, 0), run), (1, 1))
    image_numbers, row_numbers = (torch.arange(length, device=images.device) for length in (count, height))
    rows = (image_numbers * (height + 2 * shift) + corners[:, 0])[:, None] + row_numbers
    starts = (rows * (width + 2 * shift) + corners[:, 1, None]) * channels
    return runs.index_select(0, starts.view(-1)).view(count, height, width, channels).permute(0, 3, 1, 2)


def cut_out(images: Tensor, side: int, centres: Tensor) -> Tensor:
    """Blacken a square of ``side`` pixels around a centre per image; centres: (N, 2) in [0, 1), rows and columns."""
    inside = []
    for axis, length in enumerate(images.shape[2:]):
        first = whole(centres[:, axis], length) - side // 2
        pixels = torch.arange(length, device=images.device)
        inside.append((pixels >= first[:, None]) & (pixels < first[:, None] + side))
    rows, columns = inside
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], black(images))


def whole(uniform: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) to int64 in [0, count): the clamp catches a product that float32 rounds up to count."""
    return (uniform * count).long().clamp_(max=count - 1)


def black(images: Tensor) -> float:
    """The value of a black pixel: 0 for uint8, -1 for images in [-1, 1]."""
    return -1.0 if images.is_floating_point() else 0


def reflected(length: int, shift: int, device: torch.device) -> Tensor:
    """Row (or column) numbers of an axis padded by reflection: 2 1 | 0 1 2 3 | 2 1 for length 4 and shift 2."""
    positions = torch.arange(-shift, length + shift, device=device).abs()
    return (length - 1) - ((length - 1) - positions).abs()
