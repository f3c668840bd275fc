"""The native convolutions, whichever family computes them, and where they are taken: see :mod:`ganvas.ops.tuning`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from ganvas._native import ConvolutionKind
from ganvas.ops import tuning
from ganvas.ops.backends.cpu import direct, stride2, winograd
from ganvas.ops.backends.cpu.kernels import LEAST_CHANNELS, NativeConvolution, multiplies_tiles
from ganvas.ops.backends.cpu.precision import multiplied_as, rounds_float32
from ganvas.ops.backends.trial import Direction, trial
from ganvas.ops.convolution import Geometry

_Make = Callable[[torch.Size, torch.Size, torch.dtype], NativeConvolution]
"""For a weight and an input of these shapes."""

_STRIDE_2 = Geometry(stride=(2, 2), padding=(1, 1))

_LEAST_MULTIPLICATIONS = 2**18  # below, nothing is measured
_MOST_MULTIPLICATIONS = 2**28  # a thread, that are measured where the shape has more
_ENOUGH_PIXELS = 1024  # to outweigh the transform of the weight as a whole batch does
_MOST_BYTES = 24 * 2**20  # of the larger of input and output, in float32
_LARGEST_SIDE = 64
# Where direct products may be faster than Winograd's: up to so many channels on a side, and up to so many pixels, of
# which the products cost no more than to transform the weight does.
_MOST_CHANNELS_DIRECT = 32
_MOST_PIXELS_DIRECT = 512


def native_convolution(geometry: Geometry, weight: Tensor, input_shape: torch.Size, dtype: torch.dtype) -> _Make | None:
    """What makes the kernels of this convolution where nothing is measured, or None where there are none.

    Args:
        dtype: plays no part.
    """
    makes = _makes(geometry, weight, input_shape)
    return next(iter(makes.values()), None) if _is_wide(weight.shape) else None


def _is_wide(weight: torch.Size) -> bool:
    """Whether products alone outweigh what is done beside: of fewer channels only measuring can tell."""
    return min(weight[:2]) >= LEAST_CHANNELS


def _makes(geometry: Geometry, weight: Tensor, input_shape: torch.Size) -> dict[str, _Make]:
    """The families that do this convolution, by name; the likeliest first."""
    makes: dict[str, _Make] = {}
    if winograd.takes(geometry, weight, input_shape):
        makes["winograd"] = partial(winograd.convolution, geometry)
    kind = _stride2_kind(geometry, weight, input_shape)
    if kind is not None and stride2.takes(kind, weight, input_shape):
        makes["winograd"] = partial(stride2.convolution, kind)
    if direct.takes(geometry, weight, input_shape):
        makes["direct"] = partial(direct.convolution, geometry)
    return makes


def _may_be_fastest(family: str, geometry: Geometry, weight: torch.Size, input: torch.Size) -> bool:
    """Among several."""
    few_channels = min(weight[:2]) <= _MOST_CHANNELS_DIRECT
    return family != "direct" or few_channels or _pixels(geometry, weight, input) <= _MOST_PIXELS_DIRECT


def chosen_convolution(
    geometry: Geometry,
    weight: Tensor,
    input_shape: torch.Size,
    dtype: torch.dtype,
    direction: Direction,
    backend: str | None = None,
) -> NativeConvolution | None:
    """The kernels of this convolution where they are the faster way here, None where torch's convolution is.

    Args:
        dtype: of the input; the weight's may be another one under autocast.
        backend: plays no part: ``cpu`` is faster or not as well.
    """
    rounds = dtype is torch.float32 and rounds_float32()  # a choice of its own, and another kernel
    key = (geometry, weight.shape, input_shape, dtype, torch.get_num_threads(), direction, rounds)
    try:
        return tuning.decisions[key]
    except KeyError:
        makes = _makes(geometry, weight, input_shape)
        if makes and multiplies_tiles(dtype):  # whichever it is; the last takes the weight as it is
            makes = {"tiles": list(makes.values())[-1]}
        family = _fastest(makes, *key[:-1]) if makes else None
        return tuning.decided(key, None if family is None else makes[family](*key[1:4]))


def _fastest(
    makes: Mapping[str, _Make], geometry: Geometry, weight: torch.Size, input: torch.Size, dtype: torch.dtype,
    threads: int, direction: Direction,
) -> str | None:  # fmt: skip
    """The family to be taken; None for torch."""
    if not tuning.applies(threads):
        return next(iter(makes)) if _is_wide(weight) else None
    if _multiplications(geometry, weight, input) < _LEAST_MULTIPLICATIONS:
        family = list(makes)[-1]
        return family if family != "winograd" and _is_wide(weight) else None
    shape = _representative(geometry, weight, input, threads)
    batch, channels, height, width = shape
    case = tuning.Case(
        direction, geometry.named(weight), multiplied_as(dtype), "cpu", threads, batch, channels,
        geometry.output_shape(shape, weight)[1], height, width,
    )  # fmt: skip

    def candidates() -> tuple[dict[str, Callable[[], object]], Callable[[], object]]:
        kernels = import_module("ganvas.ops.backends.cpu")
        of_shape = trial(kernels, geometry, weight, shape, dtype, torch.device("cpu"), direction)
        ways: dict[str, Callable[[], object]] = {
            family: of_shape.native(make(weight, shape, dtype))
            for family, make in makes.items()
            if len(makes) == 1 or _may_be_fastest(family, geometry, weight, shape)
        }
        return ways, of_shape.torchs()

    entry = tuning.measured(case, candidates)
    return entry.configuration if entry.native else None


def _representative(geometry: Geometry, weight: torch.Size, input: torch.Size, threads: int) -> torch.Size:
    """The shape that is measured for ``input``, as :mod:`ganvas.ops.tuning` explains."""
    batch, channels, *sides = input
    height, width = (side if side <= _LARGEST_SIDE else _LARGEST_SIDE + side % 4 for side in sides)
    batch = batch * sides[0] * sides[1] // (height * width)
    image = torch.Size((1, channels, height, width))
    values = max(image.numel(), geometry.output_shape(image, weight).numel())
    work = _multiplications(geometry, weight, image)
    enough = max(threads * _MOST_MULTIPLICATIONS // work, _ENOUGH_PIXELS * weight.numel() // work)
    most = min(batch, enough, _MOST_BYTES // (4 * values))
    return torch.Size((tuning.power_of_two(most), *image[1:]))


def _multiplications(geometry: Geometry, weight: torch.Size, input: torch.Size) -> int:
    """Of the convolution as it is defined, forward."""
    return _pixels(geometry, weight, input) * weight.numel()


def _pixels(geometry: Geometry, weight: torch.Size, input: torch.Size) -> int:
    """Of the map each of whose pixels takes every number of the weight once."""
    batch, _, height, width = input if geometry.transposed else geometry.output_shape(input, weight)
    return batch * height * width


def _stride2_kind(geometry: Geometry, weight: Tensor, input_shape: torch.Size) -> ConvolutionKind | None:
    kernel = tuple(weight.shape[2:])
    if geometry == _STRIDE_2 and kernel == (4, 4):
        return ConvolutionKind.conv4x4
    if geometry == _STRIDE_2 and kernel == (3, 3):
        return stride2.conv3x3(input_shape)
    if geometry == _STRIDE_2._replace(transposed=True) and kernel == (4, 4):
        return ConvolutionKind.conv_transpose4x4
    if geometry == Geometry(padding=(1, 1), upsampled=True) and kernel == (3, 3):
        return ConvolutionKind.upsample2_conv3x3
    return None
