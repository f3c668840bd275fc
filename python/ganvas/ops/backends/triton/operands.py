"""What a kernel makes of the values it loads, and the numbers by which it finds them."""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl

_MOST_BYTES = 16  # that a thread reads or writes at a time


def slope_kind(negative_slope: float) -> str:
    """Which LeakyReLU a kernel is compiled for: the fewer operations, the less there is known of the slope."""
    kinds = {0.0: "relu", 1.0: "identity"}
    return kinds.get(negative_slope, "leaky" if 0.0 < negative_slope < 1.0 else "any")


def vector(itemsize: int, *strides: int) -> int:
    """How many neighbouring values a kernel can read at a time where all rows begin at multiples of ``strides``.

    A power of two, of up to 16 bytes. Kernels take numbers of such vectors and multiply them by it, from which the
    compiler knows what divides an offset.
    """
    return gcd(_MOST_BYTES // itemsize, *strides)


def divider(divisor: int) -> int:
    """What :func:`divided` takes for a divisor below 2^31; 0 counts as 1.

    With 2^s >= d > 2^(s-1), i // d = (⌊i * m / 2^32⌋ + i) >> s for m = ⌊2^32 * (2^s - d) / d⌋ + 1 (Granlund and
    Montgomery 1994, figure 4.1): m in the lower 32 bits, s in the upper ones.
    """
    divisor = max(divisor, 1)
    shift = (divisor - 1).bit_length()
    return shift << 32 | ((((1 << shift) - divisor) << 32) // divisor + 1)


def packed(values: tuple[int, ...]) -> int:
    """Up to four numbers of 16 bits in one of 64, which :func:`unpacked` takes apart."""
    bits = sum((value & 0xFFFF) << 16 * i for i, value in enumerate(values))
    return bits - (bits >> 63 << 64)


@triton.jit
def divided(value, divider):
    """value // divisor of 0 <= value < 2^31, without dividing."""
    value = value.to(tl.uint32)
    divider = divider.to(tl.int64)
    magic = (divider & 0xFFFFFFFF).to(tl.uint32)
    return ((tl.umulhi(value, magic) + value) >> (divider >> 32).to(tl.uint32)).to(tl.int32)


@triton.jit
def position(pixel, rows, columns, rows_divider, columns_divider):
    """(n, y, x) of pixels of images of ``rows`` times ``columns``; dividers are those of the same."""
    line = divided(pixel, columns_divider)
    n = divided(line, rows_divider)
    return n, line - n * rows, pixel - line * columns


@triton.jit
def is_within(value, end):
    """0 <= value < end, as one comparison."""
    return value.to(tl.uint32) < end.to(tl.uint32)


@triton.jit
def unpacked(packed, i):
    return (packed.to(tl.int64) >> (16 * i) << 48 >> 48).to(tl.int32)


@triton.jit
def leaky_relu(x, negative_slope, SLOPE: tl.constexpr):
    if SLOPE == "identity":
        return x
    elif SLOPE == "relu":  # of -inf 0 too
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif SLOPE == "leaky":
        return tl.maximum(x, negative_slope * x, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.where(x > 0.0, x, negative_slope * x)


@triton.jit
def activation(x, scale, shift, negative_slope, SLOPE: tl.constexpr, ACTIVATION_FIRST: tl.constexpr):
    """The activation that is pending in x, float32."""
    if ACTIVATION_FIRST:
        return scale * leaky_relu(x, negative_slope, SLOPE) + shift
    else:
        return leaky_relu(scale * x + shift, negative_slope, SLOPE)


@triton.jit
def raw_gradient(grad, x, alpha, beta, delta, negative_slope, SLOPE: tl.constexpr, ACTIVATION_FIRST: tl.constexpr):
    """dL/dx of a pending gradient, float32."""
    if ACTIVATION_FIRST:
        raw = alpha * grad + (beta * leaky_relu(x, negative_slope, SLOPE) + delta)
        return tl.where(x > 0.0, raw, negative_slope * raw)
    else:
        return alpha * grad + (beta * x + delta)
