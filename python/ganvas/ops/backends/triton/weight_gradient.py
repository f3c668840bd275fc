"""The gradient of a convolution's weight, from pending activations and pending gradients, as one Triton kernel.

With the gather of the forward pass (:mod:`.gather`), of each phase:

    packed[tap, ci, co] = Σ over pixels  a[the pixel that the tap reads, ci] * d[pixel, co]

Pending operands a and d are never stored: they are computed as what they are made of is loaded. The pixels are cut
into parts, each of one statistics group, that leave float32 sums of their own; those are added in one order, without
atomics.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ganvas.ops.backends.triton.configurations import ALL_REGISTERS
from ganvas.ops.backends.triton.gather import Axis, Gather, forward_gather, unpack_weight_gradient
from ganvas.ops.backends.triton.operands import (
    activation,
    divided,
    divider,
    packed,
    position,
    raw_gradient,
    slope_kind,
    unpacked,
    vector,
)
from ganvas.ops.backends.triton.precision import uses_tf32
from ganvas.ops.backends.triton.tf32 import rounded_to_tf32
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending, PendingGradient

MOST_PARTIAL_BYTES = 64 * 2**20
"""Of the parts' sums, unless one sum for each statistics group takes more."""

LEAST_STEPS = 8
"""Of block_pixels in a part, so that what it writes does not outweigh what it reads."""
LEAST_WIDE_SPAN = 2**31
"""Elements that a part may span from which on its offsets take 64 bits."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_PIXELS = 2**30  # of a part, and of one phase of an image: together they are counted in 31 bits
_MOST_PHASES = 4  # of an axis


@dataclass(frozen=True)
class Configuration:
    """How the product is cut: a program sums block_taps*block_in rows by block_out columns, block_pixels at a time."""

    block_taps: int
    block_in: int
    block_out: int
    block_pixels: int
    num_warps: int
    num_stages: int
    programs: int
    """That each multiprocessor is meant to run at a time, from which follows the number of parts."""
    most_registers: int | None = None
    """Of a thread. None: the compiler decides, which for more programs at a time saves a few, and spills them."""


_Tiles = tuple[tuple[int, int, int, int, int, int], ...]  # rows, columns, pixels, num_warps, num_stages, programs
_LARGE_TILES: _Tiles = (
    (128, 128, 32, 8, 3, 1),
    (128, 128, 32, 8, 4, 1),
    (128, 64, 32, 4, 3, 2),
    (64, 128, 32, 4, 3, 2),
    (64, 64, 64, 4, 3, 2),
)
_SMALL_TILES: _Tiles = (
    (64, 64, 32, 4, 3, 3),
    (64, 64, 64, 4, 3, 2),
    (128, 64, 32, 4, 3, 2),
    (128, 64, 32, 8, 2, 2),
    (64, 32, 64, 4, 3, 3),
    (64, 128, 32, 4, 3, 2),
)
_IEEE_TILES: _Tiles = (  # of exact float32, whose operands lie in registers
    (64, 64, 32, 8, 3, 2),
    (64, 32, 32, 4, 3, 3),
)


def configurations(
    geometry: Geometry,
    weight: torch.Size,
    input: torch.Size,
    dtype: torch.dtype,
    direction: str = "backward_weight",
) -> list[Configuration]:
    """At most six that are worth measuring for these shapes, the first of them the one that is taken without that.

    A program's tile is 128×128 where the weight has at least 512 rows (taps times input channels) and 128 columns,
    64×64 or near it elsewhere and where float32 is multiplied exactly, and never much more than the weight. Where the
    input has few channels its rows are of several taps: what is read and computed of the output's gradient then serves
    them all. Tiles of float32, which take twice the memory, are half as deep in pixels.
    """
    if direction != "backward_weight":
        raise ValueError(f"direction must be 'backward_weight'; got {direction!r}")
    gather = forward_gather(geometry, (weight[2], weight[3]))
    in_channels, out_channels = input[1], weight[1] if geometry.transposed else weight[0]
    if dtype is torch.float32 and not uses_tf32():
        tiles = _IEEE_TILES
    elif gather.most_taps * in_channels >= 512 and out_channels >= 128:
        tiles = _LARGE_TILES
    else:
        tiles = _SMALL_TILES
    return list(dict.fromkeys(_fitted(gather, in_channels, out_channels, dtype, *tile) for tile in tiles))


def _fitted(
    gather: Gather, in_channels: int, out_channels: int, dtype: torch.dtype,
    rows: int, columns: int, pixels: int, num_warps: int, num_stages: int, programs: int,
) -> Configuration:  # fmt: skip
    """No larger than the weight, and no smaller than what tl.dot takes."""
    block_in = min(triton.next_power_of_2(in_channels), rows)
    block_taps = min(triton.next_power_of_2(gather.most_taps), rows // block_in)
    block_in = max(block_in, 16 // block_taps)
    block_out = max(min(triton.next_power_of_2(out_channels), columns), 16)
    if dtype is torch.float32:
        pixels //= 2
    at_a_time = vector(dtype.itemsize, in_channels, out_channels) * dtype.itemsize
    if at_a_time < 8:  # the addresses of more columns do not fit into the registers
        block_out = min(block_out, 64)
    most_registers = None if at_a_time == 16 and num_warps > 4 and programs > 1 else ALL_REGISTERS
    return Configuration(block_taps, block_in, block_out, pixels, num_warps, num_stages, programs, most_registers)


def backward_weight(
    geometry: Geometry,
    grad_output: Tensor | PendingGradient,
    weight: Tensor,
    input: Pending,
    *,
    configuration: Configuration | None = None,
) -> Tensor:
    """The gradient of ``weight``: of its shape and memory layout, float32.

    Products are of the input's dtype, to which activation and gradient are rounded as torch would store them, and are
    added in float32; those of float32 are exact unless :func:`.precision.uses_tf32`. Same arguments and device: same
    bits. Besides the result up to :data:`MOST_PARTIAL_BYTES` are allocated.

    Args:
        geometry: of the convolution, without groups.
        grad_output: (N, Cout, H', W'), of the input's dtype, channels_last; as it is, or pending.
        weight: (Cout, Cin, kH, kW), or (Cin, Cout, kH, kW) where the convolution is transposed. It is not read.
        input: (N, Cin, H, W) float32, bfloat16 or float16, channels_last; as it is, or pending.
        configuration: None: the first of :func:`configurations`.

    Raises:
        TypeError: a dtype is none of these, or not the input's.
        ValueError: the convolution has groups or a stride of more than 4 that it spreads; shapes or memory layouts are
            not these; statistics groups differ, or do not divide the batch; an image has more than 2^30 pixels.
    """
    pending = grad_output if isinstance(grad_output, PendingGradient) else None
    grad = grad_output.grad if isinstance(grad_output, PendingGradient) else grad_output
    gather = forward_gather(geometry, (weight.shape[2], weight.shape[3]))
    _check(geometry, gather, grad, pending, weight, input)
    if configuration is None:
        configuration = configurations(geometry, weight.shape, input.stored.shape, grad.dtype)[0]
    sums = _partial_sums(gather, grad, pending, input, configuration)
    return unpack_weight_gradient(sums[0] if len(sums) == 1 else sums.sum(0), gather, geometry.transposed, weight)


def _partial_sums(
    gather: Gather, grad: Tensor, pending: PendingGradient | None, input: Pending, configuration: Configuration
) -> Tensor:
    """(parts, phases, most_taps, Cin, Cout) float32; what no phase has is undefined."""
    stored, groups = input.stored, _groups(input, pending)
    (batch, in_channels, height, width), (_, out_channels, out_height, out_width) = stored.shape, grad.shape
    rows, columns = gather.pixels(0, out_height, out_width)  # the most of any phase
    images = batch // groups
    cut = _cut(configuration, gather, groups, images * rows * columns, in_channels, out_channels, stored.device)
    sums = torch.empty(
        (groups * cut.parts, gather.phases, gather.most_taps, in_channels, out_channels),
        dtype=torch.float32, device=stored.device,
    )  # fmt: skip
    largest_image = max(height * width * in_channels, out_height * out_width * out_channels)
    spanned = (cut.part // max(rows * columns, 1) + 2) * largest_image  # at most, by a part
    grad_slope = pending.negative_slope if pending and pending.activation_first else 1.0
    in_vector, out_vector = (vector(stored.itemsize, channels) for channels in (in_channels, out_channels))
    with torch.cuda.device_of(stored):
        _kernel[(cut.tiles * groups * cut.parts, gather.phases)](
            stored, input.scale, input.shift, grad, *(pending[1:5] if pending else (None,) * 4), sums,
            in_channels // in_vector, out_channels // out_vector, images, height, width, out_height, out_width,
            cut.tiles, cut.part, cut.parts, gather.most_taps,
            *_axis_arguments(gather.y, out_height), *_axis_arguments(gather.x, out_width),
            float(input.negative_slope), float(grad_slope),
            IN_VECTOR=in_vector, OUT_VECTOR=out_vector, PENDING=input.scale is not None,
            ACTIVATION_FIRST=input.scale is not None and input.activation_first,
            SLOPE="identity" if input.scale is None else slope_kind(input.negative_slope),
            PENDING_GRAD=pending is not None,
            GRAD_ACTIVATION_FIRST=pending is not None and pending.activation_first, GRAD_SLOPE=slope_kind(grad_slope),
            BLOCK_TAPS=configuration.block_taps, BLOCK_IN=configuration.block_in, BLOCK_OUT=configuration.block_out,
            BLOCK_PIXELS=configuration.block_pixels,
            PRECISION="tf32" if stored.dtype is torch.float32 and uses_tf32() else "ieee",
            WIDE=max(spanned, images * rows * columns + cut.part) >= LEAST_WIDE_SPAN,
            num_warps=configuration.num_warps, num_stages=configuration.num_stages,
            maxnreg=configuration.most_registers,
        )  # fmt: skip
    return sums


class _Cut(NamedTuple):
    tiles: int  # of the weight of one phase
    parts: int  # of the pixels of one phase and statistics group
    part: int  # pixels of each, but the last


def _cut(
    configuration: Configuration,
    gather: Gather,
    groups: int,
    pixels: int,
    in_channels: int,
    out_channels: int,
    device: torch.device,
) -> _Cut:
    """Enough parts to fill the multiprocessors, within the bounds on what they write."""
    tiles = (
        triton.cdiv(gather.most_taps, configuration.block_taps)
        * triton.cdiv(in_channels, configuration.block_in)
        * triton.cdiv(out_channels, configuration.block_out)
    )
    bytes_of_sum = 4 * gather.phases * gather.most_taps * in_channels * out_channels
    most = min(
        triton.cdiv(pixels, LEAST_STEPS * configuration.block_pixels),
        MOST_PARTIAL_BYTES // (groups * bytes_of_sum),
    )
    at_a_time = configuration.programs * _multiprocessors(device)
    parts = max(_parts(tiles * gather.phases * groups, at_a_time, max(most, 1)), triton.cdiv(pixels, _MOST_PIXELS))
    part = triton.cdiv(triton.cdiv(pixels, parts), configuration.block_pixels) * configuration.block_pixels
    return _Cut(tiles, max(triton.cdiv(pixels, part), 1) if part else 1, part)


@lru_cache(maxsize=4096)
def _parts(tiles: int, at_a_time: int, most: int) -> int:
    """The fewest whose programs, in up to four rounds, keep nine multiprocessors of ten busy to the end, or nearly."""

    def busy(parts: int) -> float:
        return parts * tiles / (triton.cdiv(parts * tiles, at_a_time) * at_a_time)

    worth_it = range(1, min(most, 4 * at_a_time // tiles + 1) + 1)
    return next((parts for parts in worth_it if busy(parts) >= 0.9), max(worth_it, key=busy))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _axis_arguments(axis: Axis, out_side: int) -> tuple[int, ...]:
    """Of ``out_side`` pixels each phase has one of two numbers: they are rounded up, or down."""
    return (
        axis.in_stride, axis.out_stride, axis.step, packed(axis.offsets), packed(axis.counts),
        divider(-(-out_side // axis.out_stride)), divider(out_side // axis.out_stride),
    )  # fmt: skip


def _groups(input: Pending, pending: PendingGradient | None) -> int:
    if input.scale is not None:
        return input.scale.shape[0]
    return 1 if pending is None else pending.alpha.shape[0]


def _check(
    geometry: Geometry, gather: Gather, grad: Tensor, pending: PendingGradient | None, weight: Tensor, input: Pending
) -> None:
    stored, groups = input.stored, _groups(input, pending)
    if geometry.groups != 1:
        raise ValueError(f"geometry must have groups=1; got {geometry.groups}")
    if max(gather.y.out_stride, gather.x.out_stride) > _MOST_PHASES:
        raise ValueError(f"geometry.stride must be at most {_MOST_PHASES} in a transposed convolution; got {geometry}")
    if stored.dtype not in _DTYPES:
        raise TypeError(f"input must be float32, bfloat16 or float16; got {stored.dtype}")
    if stored.dim() != 4 or stored.shape[1] != geometry.in_channels(weight.shape):
        raise ValueError(f"input must be (N, Cin, H, W) as weight {tuple(weight.shape)} has it; got {stored.shape}")
    output_shape = geometry.output_shape(stored.shape, weight.shape)
    tensors = [("input", stored, stored.shape), ("grad_output", grad, output_shape)]
    if pending is not None:
        tensors.append(("grad_output.stored", pending.stored, output_shape))
        if pending.alpha.shape[0] != groups:
            raise ValueError(f"grad_output must have the input's {groups} groups; got {pending.alpha.shape[0]}")
    for name, tensor, shape in tensors:
        if tensor.dtype != stored.dtype:
            raise TypeError(f"{name} must be of the input's dtype {stored.dtype}; got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(tensor.shape)}")
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"{name} must be channels_last; got strides {tensor.stride()}")
    if stored.shape[0] % groups:
        raise ValueError(f"statistics groups must divide the batch of {stored.shape[0]}; got {groups}")
    if output_shape[2:].numel() > _MOST_PIXELS:
        raise ValueError(f"grad_output must have at most {_MOST_PIXELS} pixels in an image; got {tuple(output_shape)}")


@triton.jit
def _row(values, THREE_DIMENSIONS: tl.constexpr):
    if THREE_DIMENSIONS:
        return values[None, None, :]
    else:
        return values[None, :]


# Integers that differ from layer to layer do not compile anew.
@triton.jit(
    do_not_specialize=[
        "in_vectors", "out_vectors", "images", "height", "width", "out_height", "out_width", "tiles", "part", "parts",
        "most_taps",
        "in_stride_y", "out_stride_y", "step_y", "offsets_y", "counts_y", "upper_rows_divider", "lower_rows_divider",
        "in_stride_x", "out_stride_x", "step_x", "offsets_x", "counts_x", "upper_columns_divider",
        "lower_columns_divider",
    ]
)  # fmt: skip
def _kernel(
    input_ptr,  # (N, H, W, C)
    scale_ptr,  # (G, C)
    shift_ptr,  # (G, C)
    grad_ptr,  # (N, P, Q, K)
    grad_stored_ptr,  # (N, P, Q, K)
    alpha_ptr,  # (G, K)
    beta_ptr,  # (G, K)
    delta_ptr,  # (G, K)
    sums_ptr,  # (G * parts, phases, most_taps, C, K)
    in_vectors,  # C / IN_VECTOR
    out_vectors,  # K / OUT_VECTOR
    images,  # N / G
    height,  # H
    width,  # W
    out_height,  # P
    out_width,  # Q
    tiles,  # of the weight of a phase
    part,  # pixels
    parts,  # of a phase and a group
    most_taps,
    in_stride_y,
    out_stride_y,
    step_y,
    offsets_y: tl.int64,
    counts_y: tl.int64,
    upper_rows_divider: tl.int64,
    lower_rows_divider: tl.int64,
    in_stride_x,
    out_stride_x,
    step_x,
    offsets_x: tl.int64,
    counts_x: tl.int64,
    upper_columns_divider: tl.int64,
    lower_columns_divider: tl.int64,
    negative_slope,
    grad_negative_slope,
    IN_VECTOR: tl.constexpr,  # values of the input that are read at a time
    OUT_VECTOR: tl.constexpr,
    PENDING: tl.constexpr,
    ACTIVATION_FIRST: tl.constexpr,
    SLOPE: tl.constexpr,
    PENDING_GRAD: tl.constexpr,
    GRAD_ACTIVATION_FIRST: tl.constexpr,
    GRAD_SLOPE: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # a part spans 2^31 elements or more
):
    in_channels = in_vectors * IN_VECTOR
    out_channels = out_vectors * OUT_VECTOR

    # Which part of the weight. Programs that follow each other read the same pixels.
    tile = tl.program_id(0) % tiles
    part_of_all = tl.program_id(0) // tiles
    out_blocks = tl.cdiv(out_channels, BLOCK_OUT)
    in_blocks = tl.cdiv(in_channels, BLOCK_IN)
    first_in = tile // out_blocks % in_blocks * BLOCK_IN
    out_channel = tile % out_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_channel = first_in + tl.arange(0, BLOCK_IN)
    first_tap = tile // (out_blocks * in_blocks) * BLOCK_TAPS
    is_out = out_channel < out_channels
    is_in = in_channel < in_channels

    # Where its taps read.
    phase_y = tl.program_id(1) // out_stride_x
    phase_x = tl.program_id(1) % out_stride_x
    taps_x = unpacked(counts_x, phase_x)
    taps = unpacked(counts_y, phase_y) * taps_x
    tap = first_tap + tl.arange(0, BLOCK_TAPS)
    is_tap = tap < taps
    tap_y = unpacked(offsets_y, phase_y) + step_y * (tap // max(taps_x, 1))
    tap_x = unpacked(offsets_x, phase_x) + step_x * (tap % max(taps_x, 1))

    # Which pixels: count of them, from pixel begin of image first.
    rows = (out_height - phase_y + out_stride_y - 1) // out_stride_y
    columns = (out_width - phase_x + out_stride_x - 1) // out_stride_x
    rows_divider = tl.where(rows == tl.cdiv(out_height, out_stride_y), upper_rows_divider, lower_rows_divider)
    columns_divider = tl.where(
        columns == tl.cdiv(out_width, out_stride_x), upper_columns_divider, lower_columns_divider
    )
    group = part_of_all // parts
    if WIDE:
        begin = (part_of_all % parts).to(tl.int64) * part
        first = begin // max(rows.to(tl.int64) * columns, 1)
    else:
        begin = part_of_all % parts * part
        first = divided(divided(begin, columns_divider), rows_divider)
    pixels = rows.to(tl.int64) * columns * images
    count = tl.maximum(tl.minimum(pixels - begin, part), 0).to(tl.int32)
    count = tl.where(first_tap < taps, count, 0)
    begin = (begin - first * rows * columns).to(tl.int32)
    image = group.to(tl.int64) * images + first
    input_ptr += image * height * width * in_channels
    grad_ptr += image * out_height * out_width * out_channels
    if PENDING:
        scale = tl.load(scale_ptr + group * in_channels + in_channel, is_in, 0.0)
        shift = tl.load(shift_ptr + group * in_channels + in_channel, is_in, 0.0)
        scale = _row(scale, BLOCK_TAPS > 1)
        shift = _row(shift, BLOCK_TAPS > 1)
    if PENDING_GRAD:
        grad_stored_ptr += image * out_height * out_width * out_channels
        alpha = tl.load(alpha_ptr + group * out_channels + out_channel, is_out, 0.0)[None, :]
        beta = tl.load(beta_ptr + group * out_channels + out_channel, is_out, 0.0)[None, :]
        delta = tl.load(delta_ptr + group * out_channels + out_channel, is_out, 0.0)[None, :]

    total = tl.zeros((BLOCK_TAPS * BLOCK_IN, BLOCK_OUT), tl.float32)
    for step in range(0, count, BLOCK_PIXELS):
        pixel = step + tl.arange(0, BLOCK_PIXELS)
        is_pixel = (pixel < count)[:, None]
        pixel += begin
        n, y, x = position(pixel, rows, columns, rows_divider, columns_divider)
        if WIDE:
            n = n.to(tl.int64)

        # (pixels, taps, channels), or without the taps where they are 1.
        at_y = (y * in_stride_y)[:, None] + tap_y[None, :]
        at_x = (x * in_stride_x)[:, None] + tap_x[None, :]
        is_inside = is_pixel & is_tap[None, :] & (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
        offsets = ((n[:, None] * height + at_y) * width + at_x) * in_channels
        if BLOCK_TAPS > 1:
            offsets = offsets[:, :, None]
            is_inside = is_inside[:, :, None]
        is_read = is_inside & _row(is_in, BLOCK_TAPS > 1)
        a = tl.load(input_ptr + (offsets + _row(in_channel, BLOCK_TAPS > 1)), is_read, 0.0)
        if PENDING:
            value = activation(a.to(tl.float32), scale, shift, negative_slope, SLOPE, ACTIVATION_FIRST)
            a = tl.where(is_inside, value, 0.0)  # the padding is one of the activation

        at_y = y * out_stride_y + phase_y
        at_x = x * out_stride_x + phase_x
        offsets = (((n * out_height + at_y) * out_width + at_x) * out_channels)[:, None] + out_channel[None, :]
        is_output = is_pixel & is_out[None, :]
        d = tl.load(grad_ptr + offsets, is_output, 0.0)
        if PENDING_GRAD:
            stored = tl.load(grad_stored_ptr + offsets, is_output, 0.0).to(tl.float32)
            value = raw_gradient(
                d.to(tl.float32), stored, alpha, beta, delta, grad_negative_slope, GRAD_SLOPE, GRAD_ACTIVATION_FIRST
            )
            d = tl.where(is_pixel, value, 0.0).to(d.dtype)

        if BLOCK_TAPS > 1:
            a = tl.reshape(a, (BLOCK_PIXELS, BLOCK_TAPS * BLOCK_IN))
            if a.dtype == d.dtype:  # A reshape right before the product fails to compile for sm_100.
                a = tl.where(is_pixel, a, 0.0)
        a = a.to(d.dtype)
        if PRECISION == "tf32":
            a = rounded_to_tf32(a)
            d = rounded_to_tf32(d)
        total = tl.dot(tl.trans(a), d, total, input_precision=PRECISION)

    row = tl.arange(0, BLOCK_TAPS * BLOCK_IN)
    tap = first_tap + row // BLOCK_IN
    in_channel = first_in + row % BLOCK_IN
    sum = part_of_all.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    sums_ptr += sum * most_taps * in_channels * out_channels
    offsets = (tap * in_channels + in_channel)[:, None] * out_channels + out_channel[None, :]
    tl.store(sums_ptr + offsets, total, ((tap < taps) & (in_channel < in_channels))[:, None] & is_out[None, :])
