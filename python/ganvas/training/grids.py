"""Image grids as PNG files a person can look at."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ganvas.data import to_uint8
from ganvas.training import durable

_GAP = 1
_SMALLEST_TILE = 48
"""Pixels: smaller images are enlarged, by whole factors and unsmoothed, so that what is shown is what was made."""


def make_grid(images: Tensor, columns: int) -> Tensor:
    """(N, C, H, W) in [-1, 1] to one (C, height, width) uint8 picture, row by row, with mid-grey gaps between tiles.

    Raises:
        ValueError: no images, another rank, or ``columns`` below 1.
    """
    if images.dim() != 4 or images.shape[0] == 0:
        raise ValueError(f"images must be (N, C, H, W) with N > 0, got {tuple(images.shape)}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    count, channels, height, width = images.shape
    scale = max(1, math.ceil(_SMALLEST_TILE / max(height, width)))
    tiles = to_uint8(images.detach().cpu()).repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    height, width = height * scale + _GAP, width * scale + _GAP
    rows = math.ceil(count / columns)
    grid = torch.full((channels, rows * height + _GAP, columns * width + _GAP), 128, dtype=torch.uint8)
    for index, tile in enumerate(tiles):
        top, left = _GAP + index // columns * height, _GAP + index % columns * width
        grid[:, top : top + height - _GAP, left : left + width - _GAP] = tile
    return grid


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write :func:`make_grid` as a PNG, in one step."""
    grid = make_grid(images, columns)
    # Pillow wants (H, W) for grey and (H, W, 3) for RGB.
    pixels = grid[0] if grid.shape[0] == 1 else grid.permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, "PNG", optimize=True)
    durable.replace_file(path, buffer.getvalue())


def grid_labels(num_classes: int | None, samples: int) -> tuple[Tensor | None, int]:
    """Labels of a sample grid, and its number of columns.

    With classes: one a column (evenly chosen ones if there are more than fit in 16 columns), whole rows only. Without:
    no labels, and a grid about as wide as high.
    """
    if num_classes is None:
        return None, max(1, round(math.sqrt(samples)))
    columns = min(num_classes, 16)
    rows = max(1, samples // columns)
    classes = torch.linspace(0, num_classes - 1, columns).round().long()
    return classes.repeat(rows), columns
