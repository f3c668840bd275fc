"""The kernel that computes a :class:`Gather`: an implicit matrix product between pending activations, in one pass.

A program computes a tile: some pixels of one phase and one statistics group times some channels. It reads the
pixels of a tap after the other, makes the activation (or the gradient) of what is stored as it loads it, multiplies,
and takes the sums that a norm needs of what it writes. Each tile leaves sums of its own: nothing is atomic.

The taps go round faster than the channels, so that a tile reads the same memory again soon. Of few channels, several
taps are read at once: a block of the product then runs over (tap, channel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ganvas.ops.backends.triton.configurations import Configuration
from ganvas.ops.backends.triton.gather import Axis, Gather
from ganvas.ops.backends.triton.operands import activation, leaky_relu, packed, raw_gradient, slope_kind, unpacked
from ganvas.ops.backends.triton.precision import uses_tf32
from ganvas.ops.backends.triton.tf32 import rounded_to_tf32
from ganvas.ops.pending import Pending, PendingGradient

MOST_PHASES = 4
"""Of an axis: how many 16-bit numbers fit into an integer, in which the kernel takes their offsets and counts."""
LARGEST_OFFSET = 2**15 - 1


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
    weight: Tensor,  # (phases, most taps, C read, C written), of the input's dtype, rounded to TF32 where that is used
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
    most_pixels = (
        images
        // groups
        * max(
            rows * columns for rows, columns in (gather.pixels(i, out_height, out_width) for i in range(gather.phases))
        )
    )
    tiles = triton.cdiv(most_pixels, configuration.block_m)
    partials = _partials(groups, tiles * gather.phases, output, after)
    programs = groups * tiles * gather.phases * triton.cdiv(out_channels, configuration.block_n)
    with torch.cuda.device_of(output):
        _kernel[(programs,)](
            **_read_arguments(input), **_written_arguments(after, partials),
            weight_ptr=weight, bias_ptr=bias, output_ptr=output,
            group_images=images // groups, height=height, width=width, in_channels=in_channels,
            out_height=out_height, out_width=out_width, out_channels=out_channels, tiles=tiles,
            **_axis_arguments("y", gather.y), **_axis_arguments("x", gather.x),
            phase_stride=weight.stride(0), tap_stride=weight.stride(1), read_stride=weight.stride(2),
            written_stride=weight.stride(3),
            CHANNELS_OF_TAPS=in_channels if in_channels < configuration.block_k else 0, HAS_BIAS=bias is not None,
            PRECISION="tf32" if read.dtype is torch.float32 and uses_tf32() else "ieee",
            BLOCK_M=configuration.block_m, BLOCK_N=configuration.block_n, BLOCK_K=configuration.block_k,
            GROUP_M=configuration.group_m, num_warps=configuration.num_warps, num_stages=configuration.num_stages,
        )  # fmt: skip
    return partials


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


def _axis_arguments(name: str, axis: Axis) -> dict[str, int]:
    return {
        f"in_stride_{name}": axis.in_stride, f"out_stride_{name}": axis.out_stride, f"step_{name}": axis.step,
        f"offsets_{name}": packed(axis.offsets), f"tap_counts_{name}": packed(axis.counts),
    }  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "group_images", "height", "width", "out_height", "out_width", "tiles", "in_stride_y", "in_stride_x",
        "out_stride_y", "out_stride_x", "step_y", "step_x", "offsets_y", "offsets_x", "tap_counts_y", "tap_counts_x",
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
    in_channels,  # C
    out_height,  # P
    out_width,  # Q
    out_channels,  # K
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
    phase_stride,
    tap_stride,
    read_stride,
    written_stride,
    INPUT: tl.constexpr,  # "stored", "activation" or "gradient"
    KIND: tl.constexpr,  # of the LeakyReLU
    ACTIVATION_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OUTPUT: tl.constexpr,  # "pixels", "statistics" or "gradient"
    AFTER_KIND: tl.constexpr,
    AFTER_ACTIVATION_FIRST: tl.constexpr,
    CHANNELS_OF_TAPS: tl.constexpr,  # C where a block has several taps, else 0
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # channels written
    BLOCK_K: tl.constexpr,  # channels read, or (tap, channel)
    GROUP_M: tl.constexpr,  # tiles of pixels whose programs follow each other, for all channels written
):
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

    # Its pixels (n, y, x) of the phase, and where their first taps are.
    phase_height = (out_height - phase_y + out_stride_y - 1) // out_stride_y
    phase_width = (out_width - phase_x + out_stride_x - 1) // out_stride_x
    pixels = group_images * phase_height * phase_width
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_pixel = m < pixels
    line = m // max(phase_width, 1)
    x = m - line * phase_width
    n = line // max(phase_height, 1)
    y = line - n * phase_height
    n += group * group_images
    first_y = y * in_stride_y + unpacked(offsets_y, phase_y)
    first_x = x * in_stride_x + unpacked(offsets_x, phase_x)
    first = ((n.to(tl.int64) * height + first_y) * width + first_x) * in_channels
    taps_y = unpacked(tap_counts_y, phase_y)
    taps_x = unpacked(tap_counts_x, phase_x)

    k = column * BLOCK_N + tl.arange(0, BLOCK_N)
    is_written = k < out_channels
    weights = weight_ptr + row % phases * phase_stride + k[None, :] * written_stride
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
            t = tap // taps_x
            u = tap % taps_x
            is_read = t < taps_y
            at_y = first_y[:, None] + (t * step_y)[None, :]
            at_x = first_x[:, None] + (u * step_x)[None, :]
            is_inside = is_pixel[:, None] & (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
        else:
            tap = tap_y * taps_x + tap_x
            c = channel + tl.arange(0, BLOCK_K)
            t = tap_y
            u = tap_x
            is_read = c < in_channels
            at_y = first_y + t * step_y
            at_x = first_x + u * step_x
            is_inside = (is_pixel & (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width))[:, None]
            tap_x += 1
            next_row = tap_x == taps_x
            tap_y += next_row.to(tl.int32)
            tap_x = tl.where(next_row, 0, tap_x)
            next_channels = tap_y == taps_y
            tap_y = tl.where(next_channels, 0, tap_y)
            channel += tl.where(next_channels, BLOCK_K, 0)
        is_inside = is_inside & is_read[None, :]
        offsets = first[:, None] + ((t * step_y * width + u * step_x) * in_channels + c)[None, :]
        a = tl.load(input_ptr + offsets, is_inside, 0.0)
        b = tl.load(
            weights + (tap * tap_stride + c * read_stride)[:, None], is_read[:, None] & is_written[None, :], 0.0
        )
        if INPUT != "stored":
            scale = tl.load(scale_ptr + per_channel + c, is_read, 0.0)[None, :]
            shift = tl.load(shift_ptr + per_channel + c, is_read, 0.0)[None, :]
            if INPUT == "activation":
                value = activation(a.to(tl.float32), scale, shift, slope, KIND, ACTIVATION_FIRST)
            else:
                stored = tl.load(of_gradient_ptr + offsets, is_inside, 0.0).to(tl.float32)
                stored_scale = tl.load(of_gradient_scale_ptr + per_channel + c, is_read, 0.0)[None, :]
                value = raw_gradient(
                    a.to(tl.float32), stored, scale, stored_scale, shift, slope, KIND, ACTIVATION_FIRST
                )
            a = tl.where(is_inside, value, 0.0).to(a.dtype)  # the padding is one of the activation
        if PRECISION == "tf32":
            a = rounded_to_tf32(a)
        total = tl.dot(a, b, total, input_precision=PRECISION)

    if HAS_BIAS:
        total += tl.load(bias_ptr + k, is_written, 0.0).to(tl.float32)[None, :]
    line = n.to(tl.int64) * out_height + y * out_stride_y + phase_y
    positions = ((line * out_width + x * out_stride_x + phase_x) * out_channels)[:, None] + k[None, :]
    is_output = is_pixel[:, None] & is_written[None, :]
    if OUTPUT == "gradient":
        of_group = group * out_channels + k
        mean = tl.load(mean_ptr + of_group, is_written, 0.0)[None, :]
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
        count = tl.maximum(tl.minimum(pixels - tile * BLOCK_M, BLOCK_M), 0).to(tl.float32)
        first_sum = tl.sum(tl.where(is_output, values, 0.0), 0) / tl.maximum(count, 1.0)
        deviations = values - first_sum[None, :]
        second_sum = tl.sum(tl.where(is_output, deviations * deviations, 0.0), 0)
        if column == 0:
            tl.store(counts_ptr + row, count)
    if OUTPUT != "pixels":
        at_sums = row.to(tl.int64) * out_channels + k
        tl.store(sums_ptr + at_sums, first_sum, is_written)
        tl.store(sums_ptr + rows.to(tl.int64) * out_channels + at_sums, second_sum, is_written)
