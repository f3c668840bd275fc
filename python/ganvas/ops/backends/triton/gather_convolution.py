"""The kernel that computes a :class:`Gather`: an implicit matrix product between pending activations, in one pass.

A program computes a tile: some pixels of one phase and one statistics group times some channels. It reads the
pixels of a tap after the other, makes the activation (or the gradient) of what is stored as it loads it, multiplies,
and takes the sums that a norm needs of what it writes. Each tile leaves sums of its own: nothing is atomic.

The taps go round faster than the channels, so that a tile reads the same memory again soon. Of few channels, several
taps are read at once: a block of the product then runs over (tap, channel).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ganvas.ops.backends.triton.configurations import Configuration
from ganvas.ops.backends.triton.gather import Axis, Gather
from ganvas.ops.backends.triton.operands import (
    activation,
    divided,
    divider,
    is_within,
    leaky_relu,
    packed,
    position,
    raw_gradient,
    slope_kind,
    unpacked,
    vector,
)
from ganvas.ops.backends.triton.precision import uses_tf32
from ganvas.ops.backends.triton.tf32 import rounded_to_tf32
from ganvas.ops.pending import Pending, PendingGradient

MOST_PHASES = 4
"""Of an axis: how many 16-bit numbers fit into an integer, in which the kernel takes their offsets and counts."""
LARGEST_OFFSET = 2**15 - 1
LEAST_WIDE_SPAN = 2**31
"""Elements of the images of a tile from which on offsets take 64 bits, and twice the registers."""
FURTHER_THAN_ANY_OFFSET = tl.constexpr(2**17)


class Partials(NamedTuple):
    """What T tiles leave of each channel, float32."""

    counts: Tensor | None  # (G, T): pixels of a tile
    sums: Tensor  # (2, G, T, C): means and squared deviations from them; or Σg and Σg·(x − mean)


@dataclass(frozen=True)
class StatisticsOf:
    """Of what statistics are taken: the output as it is stored, or its activation."""

    activation_first: bool
    negative_slope: float


def gather_convolution(
    gather: Gather,
    input: Pending | PendingGradient,
    weight: Tensor,  # (phases, most taps, C read, C written), of the input's dtype, rounded to TF32 where that is used,
    # as in_vectors makes it
    bias: Tensor | None,  # (C written,)
    output: Tensor,  # (N, C written, H, W), channels_last: is filled
    groups: int,
    after: StatisticsOf | Pending | None,
    configuration: Configuration,
) -> Partials | None:
    """Fills ``output``, and returns what its tiles leave where ``after`` asks for that.

    Args:
        after: statistics to take of the output; or the pending activation whose gradient the output becomes.
    """
    read = input.grad if isinstance(input, PendingGradient) else input.stored
    images, in_channels, height, width = read.shape
    _, out_channels, out_height, out_width = output.shape
    pixels = [math.prod(gather.pixels(i, out_height, out_width)) for i in range(gather.phases)]  # of an image
    tiles = triton.cdiv(images // groups * max(pixels), configuration.block_m)
    spanned = configuration.block_m // min(filter(None, pixels)) + 2  # images, at most
    largest_image = max(height * width * in_channels, out_height * out_width * out_channels)
    partials = _partials(groups, tiles * gather.phases, output, after)
    programs = groups * tiles * gather.phases * triton.cdiv(out_channels, configuration.block_n)
    in_vector, out_vector = vector(read.itemsize, in_channels), vector(output.itemsize, out_channels)
    with torch.cuda.device_of(output):
        _kernel[(programs,)](
            **_read_arguments(input), **_written_arguments(after, partials),
            **_weight_arguments(weight), bias_ptr=bias, output_ptr=output,
            group_images=images // groups, height=height, width=width, in_vectors=in_channels // in_vector,
            out_height=out_height, out_width=out_width, out_vectors=out_channels // out_vector, tiles=tiles,
            **_axis_arguments("y", gather.y, out_height), **_axis_arguments("x", gather.x, out_width),
            IN_VECTOR=in_vector, OUT_VECTOR=out_vector,
            CHANNELS_OF_TAPS=in_channels if in_channels < configuration.block_k else 0, HAS_BIAS=bias is not None,
            PRECISION="tf32" if read.dtype is torch.float32 and uses_tf32() else "ieee",
            BLOCK_M=configuration.block_m, BLOCK_N=configuration.block_n, BLOCK_K=configuration.block_k,
            WIDE=spanned * largest_image >= LEAST_WIDE_SPAN, GROUP_M=configuration.group_m,
            num_warps=configuration.num_warps, num_stages=configuration.num_stages,
            maxnreg=configuration.most_registers,
        )  # fmt: skip
    return partials


def in_vectors(weight: Tensor) -> Tensor:
    """The packed ``weight``, copied where the kernel could read more neighbouring values of it at a time, or none.

    No fewer than of the input's channels, or as many as there are of the written ones.
    """
    read, written = weight.shape[2:]
    most = vector(weight.itemsize, read)
    if 1 in weight.stride()[2:] and _weight_arguments(weight)["WEIGHT_VECTOR"] >= most:
        return weight
    if vector(weight.itemsize, written) >= most:
        return weight.contiguous()
    return weight.transpose(2, 3).contiguous().transpose(2, 3)


def _partials(groups: int, tiles: int, output: Tensor, after: StatisticsOf | Pending | None) -> Partials | None:
    if after is None:
        return None
    empty = {"dtype": torch.float32, "device": output.device}
    counts = torch.empty((groups, tiles), **empty) if isinstance(after, StatisticsOf) else None  # type: ignore[call-overload]
    return Partials(counts, torch.empty((2, groups, tiles, output.shape[1]), **empty))  # type: ignore[call-overload]


def _read_arguments(input: Pending | PendingGradient) -> dict[str, Any]:
    per_channel: tuple[Tensor | None, ...]
    if isinstance(input, PendingGradient):
        kind, pixels, of_gradient, per_channel = "gradient", input.grad, input.stored, input[2:5]
    else:
        kind, pixels, of_gradient = "activation", input.stored, None
        per_channel = (input.scale, None, input.shift)
        if input.scale is None:
            kind = "stored"
    uses_slope = kind == "activation" or (kind == "gradient" and input.activation_first)
    return {
        "input_ptr": pixels, "of_gradient_ptr": of_gradient, "scale_ptr": per_channel[0],
        "of_gradient_scale_ptr": per_channel[1], "shift_ptr": per_channel[2], "slope": float(input.negative_slope),
        "INPUT": kind, "KIND": slope_kind(input.negative_slope) if uses_slope else "identity",
        "ACTIVATION_FIRST": input.activation_first and kind != "stored",
    }  # fmt: skip


def _written_arguments(after: StatisticsOf | Pending | None, partials: Partials | None) -> dict[str, Any]:
    arguments: dict[str, Any] = dict.fromkeys(
        ("pending_ptr", "pending_scale_ptr", "pending_shift_ptr", "mean_ptr", "counts_ptr", "sums_ptr")
    )
    kind, activation_first, slope = "pixels", False, 1.0
    if after is not None:
        assert partials is not None
        activation_first, slope = after.activation_first, after.negative_slope
        arguments |= {"counts_ptr": partials.counts, "sums_ptr": partials.sums}
        kind = "statistics"
    if isinstance(after, Pending):
        arguments |= {
            "pending_ptr": after.stored, "pending_scale_ptr": after.scale, "pending_shift_ptr": after.shift,
            "mean_ptr": after.mean,
        }  # fmt: skip
        kind = "gradient"
    return arguments | {
        "after_slope": float(slope), "OUTPUT": kind, "AFTER_ACTIVATION_FIRST": activation_first,
        "AFTER_KIND": slope_kind(slope) if activation_first else "identity",
    }  # fmt: skip


def _weight_arguments(weight: Tensor) -> dict[str, Any]:
    phase, tap, read, written = (stride if size > 1 else 0 for size, stride in zip(weight.shape, weight.stride()))
    read_contiguous = weight.stride(3) != 1 or (written == 0 and weight.stride(2) == 1)
    strides = (phase, tap, written if read_contiguous else read)
    step = vector(weight.itemsize, *strides)
    names = ("phase_vectors", "tap_vectors", "row_vectors")
    return {"weight_ptr": weight, "READ_CONTIGUOUS": read_contiguous, "WEIGHT_VECTOR": step} | {
        name: stride // step for name, stride in zip(names, strides)
    }


def _axis_arguments(name: str, axis: Axis, out_side: int) -> dict[str, int]:
    """Of ``out_side`` pixels each phase has one of two numbers: they are rounded up, or down."""
    return {
        f"in_stride_{name}": axis.in_stride, f"out_stride_{name}": axis.out_stride, f"step_{name}": axis.step,
        f"offsets_{name}": packed(axis.offsets), f"tap_counts_{name}": packed(axis.counts),
        f"upper_divider_{name}": divider(-(-out_side // axis.out_stride)),
        f"lower_divider_{name}": divider(out_side // axis.out_stride),
    }  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "group_images", "height", "width", "in_vectors", "out_height", "out_width", "out_vectors", "tiles",
        "in_stride_y", "in_stride_x", "out_stride_y", "out_stride_x", "step_y", "step_x", "offsets_y", "offsets_x",
        "tap_counts_y", "tap_counts_x", "upper_divider_y", "upper_divider_x", "lower_divider_y", "lower_divider_x",
        "phase_vectors", "tap_vectors", "row_vectors",
    ]
)  # fmt: skip
def _kernel(
    input_ptr,  # (N, H, W, C)
    of_gradient_ptr,  # likewise, where the input is a pending gradient
    scale_ptr,  # (G, C): of the pending activation, or alpha of the pending gradient
    of_gradient_scale_ptr,  # (G, C): beta
    shift_ptr,  # (G, C), or delta
    slope,
    weight_ptr,  # (phases, most taps, C, K)
    bias_ptr,  # (K,)
    output_ptr,  # (N, P, Q, K)
    pending_ptr,  # (N, P, Q, K): of which the output is the gradient
    pending_scale_ptr,  # (G, K)
    pending_shift_ptr,  # (G, K)
    mean_ptr,  # (G, K)
    after_slope,
    counts_ptr,  # (G, T)
    sums_ptr,  # (2, G, T, K)
    group_images,  # N / G
    height,  # H
    width,  # W
    in_vectors,  # C / IN_VECTOR
    out_height,  # P
    out_width,  # Q
    out_vectors,  # K / OUT_VECTOR
    tiles,  # of a phase and a group: T / phases
    in_stride_y,
    in_stride_x,
    out_stride_y,
    out_stride_x,
    step_y,
    step_x,
    offsets_y: tl.int64,
    offsets_x: tl.int64,
    tap_counts_y: tl.int64,
    tap_counts_x: tl.int64,
    upper_divider_y: tl.int64,
    upper_divider_x: tl.int64,
    lower_divider_y: tl.int64,
    lower_divider_x: tl.int64,
    phase_vectors,  # from one phase of the weight to the next, in units of WEIGHT_VECTOR
    tap_vectors,  # from one tap to the next
    row_vectors,  # from one channel to the next, written or, if READ_CONTIGUOUS is not set, read
    INPUT: tl.constexpr,  # "stored", "activation" or "gradient"
    KIND: tl.constexpr,  # of the LeakyReLU
    ACTIVATION_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OUTPUT: tl.constexpr,  # "pixels", "statistics" or "gradient"
    AFTER_KIND: tl.constexpr,
    AFTER_ACTIVATION_FIRST: tl.constexpr,
    IN_VECTOR: tl.constexpr,  # values of the input that are read at a time
    OUT_VECTOR: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr,
    READ_CONTIGUOUS: tl.constexpr,  # the weight's channels read are neighbours, otherwise those written
    CHANNELS_OF_TAPS: tl.constexpr,  # C where a block has several taps, else 0
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # channels written
    BLOCK_K: tl.constexpr,  # channels read, or (tap, channel)
    WIDE: tl.constexpr,  # the images of a tile span 2^31 elements or more
    GROUP_M: tl.constexpr,  # tiles of pixels whose programs follow each other, for all channels written
):
    in_channels = in_vectors * IN_VECTOR
    out_channels = out_vectors * OUT_VECTOR

    # Which tile: phases go round fastest, since they read the same pixels.
    phases = out_stride_y * out_stride_x
    columns = tl.cdiv(out_channels, BLOCK_N)
    rows = tl.num_programs(0) // columns
    first_row = tl.program_id(0) // (GROUP_M * columns) * GROUP_M
    group_rows = min(rows - first_row, GROUP_M)
    in_group = tl.program_id(0) % (GROUP_M * columns)
    row = first_row + in_group % group_rows
    column = in_group // group_rows
    group = row // (tiles * phases)
    tile = row % (tiles * phases) // phases
    phase_y = row % phases // out_stride_x
    phase_x = row % phases % out_stride_x

    # Its pixels (n, y, x) of the phase, n from the first of its images on, and where their first taps are.
    phase_height = (out_height - phase_y + out_stride_y - 1) // out_stride_y
    phase_width = (out_width - phase_x + out_stride_x - 1) // out_stride_x
    pixels = group_images * phase_height * phase_width
    divider_y = tl.where(phase_height == tl.cdiv(out_height, out_stride_y), upper_divider_y, lower_divider_y)
    divider_x = tl.where(phase_width == tl.cdiv(out_width, out_stride_x), upper_divider_x, lower_divider_x)
    first_pixel = tile * BLOCK_M
    is_pixel = tl.arange(0, BLOCK_M) < pixels - first_pixel
    m = first_pixel + tl.minimum(tl.arange(0, BLOCK_M), max(pixels - first_pixel - 1, 0))
    n, y, x = position(m, phase_height, phase_width, divider_y, divider_x)
    first_image = divided(divided(first_pixel, divider_x), divider_y)
    n -= first_image
    if WIDE:
        n = n.to(tl.int64)
    images_before = (group * group_images + first_image).to(tl.int64)
    input_ptr += images_before * height * width * in_channels
    if INPUT == "gradient":
        of_gradient_ptr += images_before * height * width * in_channels
    first_y = y * in_stride_y + unpacked(offsets_y, phase_y)
    first_x = x * in_stride_x + unpacked(offsets_x, phase_x)
    first = ((n * height + first_y) * width + first_x) * in_channels
    first_y = tl.where(is_pixel, first_y, -FURTHER_THAN_ANY_OFFSET)
    taps_y = unpacked(tap_counts_y, phase_y)
    taps_x = unpacked(tap_counts_x, phase_x)

    first_channel = column * BLOCK_N
    k = tl.arange(0, BLOCK_N)
    is_weight = k < out_channels - first_channel
    weights = weight_ptr + row % phases * (phase_vectors * WEIGHT_VECTOR)
    if READ_CONTIGUOUS:
        weights += first_channel * (row_vectors * WEIGHT_VECTOR) + k[None, :] * (row_vectors * WEIGHT_VECTOR)
    else:
        weights += first_channel + k[None, :]
    per_channel = group * in_channels

    if CHANNELS_OF_TAPS:
        steps = tl.cdiv(taps_y * taps_x * CHANNELS_OF_TAPS, BLOCK_K)
    else:
        steps = taps_y * taps_x * tl.cdiv(in_channels, BLOCK_K)
    tap_y = 0
    tap_x = 0
    channel = 0
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        if CHANNELS_OF_TAPS:
            tap_and_channel = step * BLOCK_K + tl.arange(0, BLOCK_K)
            tap = tap_and_channel // CHANNELS_OF_TAPS
            c = tap_and_channel % CHANNELS_OF_TAPS
            t = tap // max(taps_x, 1)
            u = tap % max(taps_x, 1)
            is_read = t < taps_y
            at_y = first_y[:, None] + (t * step_y)[None, :]
            at_x = first_x[:, None] + (u * step_x)[None, :]
            is_inside = is_within(at_y, height) & is_within(at_x, width)
        else:
            tap = tap_y * taps_x + tap_x
            c = channel + tl.arange(0, BLOCK_K)
            t = tap_y
            u = tap_x
            is_read = c < in_channels
            at_y = first_y + t * step_y
            at_x = first_x + u * step_x
            is_inside = (is_within(at_y, height) & is_within(at_x, width))[:, None]
            tap_x += 1
            next_row = tap_x == taps_x
            tap_y += next_row.to(tl.int32)
            tap_x = tl.where(next_row, 0, tap_x)
            next_channels = tap_y == taps_y
            tap_y = tl.where(next_channels, 0, tap_y)
            channel += tl.where(next_channels, BLOCK_K, 0)
        offsets = first[:, None] + ((t * step_y * width + u * step_x) * in_channels + c)[None, :]
        weight_offsets = tap * (tap_vectors * WEIGHT_VECTOR)
        if READ_CONTIGUOUS:
            weight_offsets += c
        else:
            weight_offsets += c * (row_vectors * WEIGHT_VECTOR)
        a = tl.load(input_ptr + offsets, is_inside & is_read[None, :], 0.0)
        b = tl.load(weights + weight_offsets[:, None], is_read[:, None] & is_weight[None, :], 0.0)
        if INPUT != "stored":
            scale = tl.load(scale_ptr + per_channel + c, is_read, 0.0)[None, :]
            shift = tl.load(shift_ptr + per_channel + c, is_read, 0.0)[None, :]
            if INPUT == "activation":
                value = activation(a.to(tl.float32), scale, shift, slope, KIND, ACTIVATION_FIRST)
            else:
                stored = tl.load(of_gradient_ptr + offsets, is_inside & is_read[None, :], 0.0).to(tl.float32)
                stored_scale = tl.load(of_gradient_scale_ptr + per_channel + c, is_read, 0.0)[None, :]
                value = raw_gradient(
                    a.to(tl.float32), stored, scale, stored_scale, shift, slope, KIND, ACTIVATION_FIRST
                )
            a = tl.where(is_inside, value, 0.0).to(a.dtype)  # the padding is one of the activation
        if PRECISION == "tf32":
            a = rounded_to_tf32(a)
        total = tl.dot(a, b, total, input_precision=PRECISION)

    # Where it goes. What tells where to read is of pixels that exist, so that none of this has to be known before:
    # it would be kept in registers while the products are computed.
    m = first_pixel + tl.arange(0, BLOCK_M)
    is_pixel = m < pixels
    n, y, x = position(m, phase_height, phase_width, divider_y, divider_x)
    n -= first_image
    if WIDE:
        n = n.to(tl.int64)
    k = first_channel + tl.arange(0, BLOCK_N)
    is_written = k < out_channels
    if HAS_BIAS:
        total += tl.load(bias_ptr + k, is_written, 0.0).to(tl.float32)[None, :]
    output_ptr += images_before * out_height * out_width * out_channels
    line = n * out_height + y * out_stride_y + phase_y
    positions = ((line * out_width + x * out_stride_x + phase_x) * out_channels)[:, None] + k[None, :]
    is_output = is_pixel[:, None] & is_written[None, :]
    if OUTPUT == "gradient":
        of_group = group * out_channels + k
        mean = tl.load(mean_ptr + of_group, is_written, 0.0)[None, :]
        pending_ptr += images_before * out_height * out_width * out_channels
        values = tl.load(pending_ptr + positions, is_output, 0.0).to(tl.float32)
        if AFTER_ACTIVATION_FIRST:
            values = leaky_relu(values, after_slope, AFTER_KIND)
        else:
            pending_scale = tl.load(pending_scale_ptr + of_group, is_written, 0.0)[None, :]
            pending_shift = tl.load(pending_shift_ptr + of_group, is_written, 0.0)[None, :]
            total = tl.where(pending_scale * values + pending_shift > 0.0, total, total * after_slope)
        first_sum = tl.sum(tl.where(is_output, total, 0.0), 0)
        second_sum = tl.sum(tl.where(is_output, total * (values - mean), 0.0), 0)
    result = total.to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + positions, result, is_output)
    if OUTPUT == "statistics":
        values = result.to(tl.float32)
        if AFTER_ACTIVATION_FIRST:
            values = leaky_relu(values, after_slope, AFTER_KIND)
        count = tl.maximum(tl.minimum(pixels - first_pixel, BLOCK_M), 0).to(tl.float32)
        first_sum = tl.sum(tl.where(is_output, values, 0.0), 0) / tl.maximum(count, 1.0)
        deviations = values - first_sum[None, :]
        second_sum = tl.sum(tl.where(is_output, deviations * deviations, 0.0), 0)
        if column == 0:
            tl.store(counts_ptr + row, count)
    if OUTPUT != "pixels":
        at_sums = row.to(tl.int64) * out_channels + k
        tl.store(sums_ptr + at_sums, first_sum, is_written)
        tl.store(sums_ptr + rows.to(tl.int64) * out_channels + at_sums, second_sum, is_written)
