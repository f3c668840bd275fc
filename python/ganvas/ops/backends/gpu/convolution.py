"""Convolutions on a GPU: Triton's where they are the faster way, torch's (cuDNN's) elsewhere.

Each direction of each shape is measured once: every configuration of the Triton kernel that is worth it, against
torch's convolution with the CUDA kernels that then surround it. What gives a wrong result never runs. See
:mod:`ganvas.ops.tuning` for where the choices are kept. ``GANVAS_AUTOTUNE=0`` measures nothing: the Triton kernels run
up to 128 channels on both sides, where memory and launches dominate, in the configuration that their heuristic names;
so they do where the capture of a CUDA graph meets a shape first. ``GANVAS_BACKEND=cuda`` and ``triton`` leave no
choice.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ganvas.ops import tuning
from ganvas.ops.backends import triton
from ganvas.ops.backends.cuda.pending import finish_statistics
from ganvas.ops.backends.gpu.measure import device_name, fastest
from ganvas.ops.backends.trial import Direction, Way, trial
from ganvas.ops.backends.triton.precision import uses_tf32
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending

MOST_CHANNELS_UNMEASURED = 128
_MOST_BYTES = 256 * 2**20  # of the larger of input and output, that are measured where the shape has more


@dataclass(frozen=True)
class TritonConvolution:
    """A convolution between pending activations, in one configuration of its kernel."""

    geometry: Geometry
    configuration: Any = None
    """None: what the kernel's heuristic names."""

    def forward(self, input: Pending, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The raw output (N, Cout, H', W')."""
        return _convolution().forward(self.geometry, input, weight, bias, configuration=self.configuration)

    def forward_with_statistics(
        self,
        input: Pending,
        weight: Tensor,
        bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        negative_slope: float,
        activation_first: bool,
        groups: int,
    ) -> Pending:
        """The output with a norm and an activation pending; statistics taken on the way."""
        output, counts, means, deviations = _convolution().forward_with_statistics(
            self.geometry, input, weight, bias, activation_first, negative_slope, groups,
            configuration=self.configuration,
        )  # fmt: skip
        return finish_statistics(
            output, counts, means, deviations, bn_weight, bn_bias, running_mean, running_var, momentum, eps,
            negative_slope, activation_first,
        )  # fmt: skip

    def backward_input(self, grad_output: Tensor, weight: Tensor, input: Pending) -> tuple[Tensor, Tensor]:
        """g = dL/d(scale*x + shift) of the pending input, and Σg and Σg·(x − mean), (2, G, Cin)."""
        return _convolution().backward_input(
            self.geometry, grad_output, weight, input, configuration=self.configuration
        )

    def backward_weight(self, grad_output: Tensor, weight: Tensor, input: Pending) -> Tensor:
        """Like ``weight``, float32."""
        return _weight_gradient().backward_weight(
            self.geometry, grad_output, weight, input, configuration=self.configuration
        )


def native_convolution(
    geometry: Geometry, weight: Tensor, input_shape: torch.Size, dtype: torch.dtype
) -> TritonConvolution | None:
    """The kernels of this convolution, or None where there are none."""
    if not triton.is_installed() or _convolution().takes(geometry, weight, input_shape, dtype) is not None:
        return None
    return TritonConvolution(geometry)


def chosen_convolution(
    geometry: Geometry,
    weight: Tensor,
    input_shape: torch.Size,
    dtype: torch.dtype,
    direction: Direction,
    backend: str | None = None,
) -> TritonConvolution | None:
    """The kernels of this convolution where they are the faster way here, None where torch's convolution is.

    Args:
        dtype: of the input; the weight's may be another one under autocast.
        backend: ``triton`` or ``cuda``, as GANVAS_BACKEND.
    """
    forced, reduced = backend or os.environ.get("GANVAS_BACKEND"), dtype is torch.float32 and uses_tf32()
    key = (geometry, weight.shape, input_shape, dtype, weight.device, reduced, forced, direction)
    try:
        return tuning.decisions[key]
    except KeyError:
        pass
    native = None if forced == "cuda" else native_convolution(geometry, weight, input_shape, dtype)
    if native is None or forced == "triton":
        return tuning.decided(key, native)
    if not tuning.applies(0):
        return tuning.decided(key, native if _memory_bound(geometry, weight) else None)
    if torch.cuda.is_current_stream_capturing():  # nothing can be measured, and the next call may not be captured
        return native if _memory_bound(geometry, weight) else None
    try:
        return tuning.decided(key, _measured(geometry, weight, input_shape, dtype, direction, reduced))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return tuning.decided(key, None)


def _measured(
    geometry: Geometry, weight: Tensor, input_shape: torch.Size, dtype: torch.dtype, direction: Direction, reduced: bool
) -> TritonConvolution | None:
    shape, device = _representative(geometry, weight.shape, input_shape, dtype), weight.device
    out_channels = geometry.output_shape(shape, weight.shape)[1]
    name = "tf32" if reduced else str(dtype).removeprefix("torch.")
    case = tuning.Case(
        direction, _name(geometry, weight.shape), name, device_name(device.index), 0, shape[0], shape[1], out_channels,
        *shape[2:],
    )  # fmt: skip
    kernel = _weight_gradient() if direction == "backward_weight" else _convolution()
    arguments = (geometry, weight.shape, shape, dtype, direction)
    configurations = {str(c): c for c in kernel.configurations(*arguments)}

    def measure() -> tuning.Entry:
        of_shape = trial(import_module("ganvas.ops.backends.gpu"), *arguments[:4], device, direction)
        natives: dict[str, Way] = {
            name: of_shape.native(TritonConvolution(geometry, c)) for name, c in configurations.items()
        }
        return fastest(case, natives, of_shape.torchs(), device)

    entry = tuning.remembered(case, measure)
    if not entry.native or entry.configuration not in configurations:
        return None
    return TritonConvolution(geometry, configurations[entry.configuration])


def _representative(geometry: Geometry, weight: torch.Size, input: torch.Size, dtype: torch.dtype) -> torch.Size:
    """The batch that is measured: the next lower power of two, within a bound on memory."""
    image = torch.Size((1, *input[1:]))
    values = max(image.numel(), geometry.output_shape(image, weight).numel())
    most = max(1, min(input[0], _MOST_BYTES // (values * dtype.itemsize)))
    return torch.Size((tuning.power_of_two(most), *input[1:]))


def _name(geometry: Geometry, weight: torch.Size) -> str:
    """What is computed, as ``ganvas info --tuning`` shows it."""
    kind = "upsample2_conv" if geometry.upsampled else "conv_transpose" if geometry.transposed else "conv"
    options = {
        "stride": (geometry.stride, (1, 1)),
        "padding": (geometry.padding, (0, 0)),
        "dilation": (geometry.dilation, (1, 1)),
        "output_padding": (geometry.output_padding, (0, 0)),
    }
    words = [f"{kind}{weight[2]}x{weight[3]}"]
    for name, ((height, width), default) in options.items():
        if (height, width) != default:
            words.append(f"{name}{height}" if height == width else f"{name}{height}x{width}")
    return "_".join(words)


def _memory_bound(geometry: Geometry, weight: Tensor) -> bool:
    return max(weight.shape[:2]) <= MOST_CHANNELS_UNMEASURED


# Not before a tensor on a GPU asks for them: importing Triton takes longer than everything else here.
def _convolution() -> Any:
    return import_module("ganvas.ops.backends.triton.convolution")


def _weight_gradient() -> Any:
    return import_module("ganvas.ops.backends.triton.weight_gradient")
