"""How the kernel of a gather cuts its product into tiles: what is taken unmeasured, and what is worth measuring."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from ganvas.ops.backends.triton.operands import vector

ENOUGH_PROGRAMS = 264
"""Two for each multiprocessor of an H100: with fewer, part of the GPU waits."""
ALL_REGISTERS = 255
"""That a thread can have."""
_LEAST_BYTES = 8  # at a time, below which addresses take more registers than what is there


@dataclass(frozen=True)
class Configuration:
    """A program computes block_m pixels of block_n channels, block_k of the sum at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    most_registers: int | None = None
    """Of a thread. None: the compiler decides, which for more blocks at a time saves a few, and spills them."""
    group_m: int = 8
    """Tiles of pixels whose programs follow each other, for all the channels written."""


# From large tiles to small ones: block_m, block_n, block_k, num_warps, num_stages, most_registers; wide where there are
# more than 64 channels to write, of 16 bits unless the name says otherwise. With one stage pixels are read through the
# L1 cache, which holds what a tile reads again of a few channels; with more they are read ahead, past it.
_Sizes = tuple[tuple[int, ...], ...]
_WIDE: _Sizes = (
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 4),
    (64, 128, 64, 8, 3),
    (128, 64, 64, 8, 3),
    (128, 64, 32, 4, 4, ALL_REGISTERS),
    (64, 64, 64, 4, 3, ALL_REGISTERS),
    (64, 32, 64, 4, 4, ALL_REGISTERS),
)
_NARROW: _Sizes = (
    (128, 64, 64, 8, 3),
    (128, 64, 32, 4, 4, ALL_REGISTERS),
    (128, 64, 64, 8, 1),
    (256, 64, 32, 8, 3, ALL_REGISTERS),
    (64, 64, 64, 4, 3, ALL_REGISTERS),
    (64, 64, 32, 4, 3),
    (64, 32, 64, 4, 4, ALL_REGISTERS),
)
_TF32_WIDE: _Sizes = (
    (128, 64, 32, 8, 3),
    (64, 128, 32, 8, 3, ALL_REGISTERS),
    (64, 64, 32, 4, 3, ALL_REGISTERS),
    (64, 32, 32, 4, 4, ALL_REGISTERS),
)
_TF32_NARROW: _Sizes = (
    (128, 64, 32, 8, 3),
    (128, 64, 32, 8, 1),
    (64, 64, 32, 4, 3, ALL_REGISTERS),
    (64, 32, 32, 4, 4, ALL_REGISTERS),
)
_SCATTERED: _Sizes = (  # channels that are read or written one or two at a time, each by an address of its own
    (64, 64, 32, 8, 1),
    (64, 32, 32, 8, 1),
    (32, 32, 32, 4, 1),
)
_IEEE: _Sizes = ((64, 64, 16, 8, 2), (64, 32, 16, 4, 2, ALL_REGISTERS), (32, 32, 16, 4, 2, ALL_REGISTERS))
_SCATTERED_IEEE: _Sizes = ((64, 32, 16, 8, 2, ALL_REGISTERS), (32, 32, 16, 4, 2, ALL_REGISTERS))


def configurations(
    most_taps: int, in_channels: int, out_channels: int, pixels: int, dtype: torch.dtype, tf32: bool
) -> list[Configuration]:
    """At most eight that are worth measuring, the first of them the one that is taken without that.

    It has the largest tile of which there are :data:`ENOUGH_PROGRAMS`, else the smallest.

    Args:
        most_taps: of a phase.
        in_channels: that the gather reads.
        out_channels: that it writes.
        pixels: that it writes, of all images and phases.
        dtype: of both.
        tf32: float32 values may be multiplied in TF32.
    """
    scattered = (
        min(_bytes(in_channels, dtype), 16 if out_channels <= 16 else _bytes(out_channels, dtype)) < _LEAST_BYTES
    )
    if dtype is torch.float32 and not tf32:
        table = _SCATTERED_IEEE if scattered else _IEEE
    elif scattered:
        table = _SCATTERED
    elif dtype is torch.float32:
        table = _TF32_WIDE if out_channels > 64 else _TF32_NARROW
    else:
        table = _WIDE if out_channels > 64 else _NARROW
    fitted = (_fitted(Configuration(*sizes), most_taps, in_channels, out_channels) for sizes in table)
    if _bytes(in_channels, dtype) == _LEAST_BYTES:
        fitted = (replace(c, most_registers=ALL_REGISTERS) for c in fitted if not _is_largest(c))
    found = list(dict.fromkeys(fitted))
    programs = [triton.cdiv(pixels, c.block_m) * triton.cdiv(out_channels, c.block_n) for c in found]
    first = next((i for i, count in enumerate(programs) if count >= ENOUGH_PROGRAMS), len(found) - 1)
    return [found[first], *found[:first], *found[first + 1 :]]


def _is_largest(configuration: Configuration) -> bool:
    """It leaves no room for the addresses of twice as many vectors."""
    return configuration.block_m * configuration.block_n == 128 * 128


def _bytes(channels: int, dtype: torch.dtype) -> int:
    """That can be read or written at a time."""
    return vector(dtype.itemsize, channels) * dtype.itemsize


def _fitted(configuration: Configuration, most_taps: int, in_channels: int, out_channels: int) -> Configuration:
    """No larger than the product, no smaller than tl.dot takes."""
    block_n = max(min(configuration.block_n, triton.next_power_of_2(out_channels)), 16)
    block_k = max(min(configuration.block_k, triton.next_power_of_2(most_taps * in_channels)), 16)
    return replace(configuration, block_n=block_n, block_k=block_k)
