"""Convolutions on a GPU: Triton's where they are the faster way, torch's (cuDNN's) elsewhere.

Each direction of each shape is measured once: every configuration of the Triton kernel that is worth it, against
torch's convolution with the CUDA kernels that then surround it. What gives a wrong result never runs. See
:mod:`ganvas.ops.tuning` for where the choices are kept. ``GANVAS_AUTOTUNE=0`` measures nothing: the Triton kernels run
up to 128 channels on both sides, where memory and launches dominate, in the configuration that their heuristic names;
so they do where the capture of a CUDA graph meets a shape first. ``GANVAS_BACKEND=cuda`` and ``triton`` leave no
choice.

A kernel of several taps makes the activation of a pixel anew for each of them. Writing the activation once, for the
kernel to read, costs a pass over memory and saves that: some of the configurations are measured that way as well.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from ganvas.ops import tuning
from ganvas.ops.backends import triton
from ganvas.ops.backends.cuda.pending import activate, finish_statistics
from ganvas.ops.backends.gpu.measure import decided, device_name, fastest
from ganvas.ops.backends.trial import Direction, Way, trial
from ganvas.ops.backends.triton.precision import uses_tf32
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending, PendingGradient

MOST_CHANNELS_UNMEASURED = 128
MOST_ACTIVATED = 4
"""Configurations of a direction, from the first on, that are measured on the written activation too."""

_MOST_BYTES = 256 * 2**20  # of the larger of input and output, that are measured where the shape has more


@dataclass(frozen=True)
class TritonConvolution:
    """A convolution between pending activations, in one configuration of its kernel."""

    geometry: Geometry
    configuration: Any = None
    """None: what the kernel's heuristic names."""
    activates: bool = False
    """The input's activation is written first, for as long as forward or ``backward_weight`` take."""
    writes_activations: ClassVar = False
    """Whether the output's activation can be written instead of the raw output."""

    def __str__(self) -> str:
        """How a choice is remembered."""
        return f"on the written activation, {self.configuration}" if self.activates else str(self.configuration)

    def forward(self, input: Pending, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The raw output (N, Cout, H', W')."""
        return _convolution().forward(self.geometry, self._read(input), weight, bias, configuration=self.configuration)

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
            self.geometry, self._read(input), weight, bias, activation_first, negative_slope, groups,
            configuration=self.configuration,
        )  # fmt: skip
        return finish_statistics(
            output, counts, means, deviations, bn_weight, bn_bias, running_mean, running_var, momentum, eps,
            negative_slope, activation_first,
        )  # fmt: skip

    def backward_input(
        self, grad_output: Tensor | PendingGradient, weight: Tensor, input: Pending
    ) -> tuple[Tensor, Tensor]:
        """g = dL/d(scale*x + shift) of the pending input, and Σg and Σg·(x − mean), (2, G, Cin)."""
        return _convolution().backward_input(
            self.geometry, grad_output, weight, input, configuration=self.configuration
        )

    def backward_weight(self, grad_output: Tensor | PendingGradient, weight: Tensor, input: Pending) -> Tensor:
        """Like ``weight``, float32."""
        return _weight_gradient().backward_weight(
            self.geometry, grad_output, weight, self._read(input), configuration=self.configuration
        )

    def _read(self, input: Pending) -> Pending:
        """What the kernel reads of ``input``."""
        return Pending(activate(input)) if self.activates else input


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
    forced = backend or os.environ.get("GANVAS_BACKEND")
    key = (geometry, weight.shape, input_shape, dtype, weight.device, multiplied_as(dtype), forced, direction)
    try:
        return tuning.decisions[key]
    except KeyError:
        pass
    native = None if forced == "cuda" else native_convolution(geometry, weight, input_shape, dtype)
    if native is None or forced == "triton":
        return tuning.decided(key, native)
    unmeasured = native if max(weight.shape[:2]) <= MOST_CHANNELS_UNMEASURED else None
    return decided(key, lambda: _measured(geometry, weight, input_shape, dtype, direction), unmeasured, None)


def _measured(
    geometry: Geometry, weight: Tensor, input_shape: torch.Size, dtype: torch.dtype, direction: Direction
) -> TritonConvolution | None:
    case, device = case_of(geometry, weight, input_shape, dtype, direction), weight.device
    arguments = (geometry, weight.shape, shape_of(case), dtype)
    natives = {str(one): one for one in _candidates(*arguments, direction)}

    def measure() -> tuning.Entry:
        of_shape = trial(import_module("ganvas.ops.backends.gpu"), *arguments, device, direction)
        ways: dict[str, Way] = {name: of_shape.native(one) for name, one in natives.items()}
        return fastest(case, ways, of_shape.torchs(), device)

    entry = tuning.remembered(case, measure)
    return natives.get(entry.configuration) if entry.native else None


def _candidates(
    geometry: Geometry, weight: torch.Size, input: torch.Size, dtype: torch.dtype, direction: Direction
) -> list[TritonConvolution]:
    kernel = _weight_gradient() if direction == "backward_weight" else _convolution()
    found = kernel.configurations(geometry, weight, input, dtype, direction)
    activates = direction != "backward_input" and weight[2:].numel() > 1
    return [
        *(TritonConvolution(geometry, one) for one in found),
        *(TritonConvolution(geometry, one, True) for one in found[: MOST_ACTIVATED * activates]),
    ]


def case_of(
    geometry: Geometry, weight: Tensor, input_shape: torch.Size, dtype: torch.dtype, direction: str
) -> tuning.Case:
    """What a choice for this convolution on ``weight``'s device holds for, by the shape that is measured."""
    shape = _representative(geometry, weight.shape, input_shape, dtype)
    return tuning.Case(
        direction, geometry.named(weight.shape), multiplied_as(dtype), device_name(weight.device.index), 0, shape[0],
        shape[1], geometry.output_shape(shape, weight.shape)[1], *shape[2:],
    )  # fmt: skip


def shape_of(case: tuning.Case) -> torch.Size:
    """Of the input that is measured."""
    return torch.Size((case.batch, case.in_channels, case.height, case.width))


def multiplied_as(dtype: torch.dtype) -> str:
    """``tf32`` where values of ``dtype`` are rounded to that, else the dtype's name."""
    return "tf32" if dtype is torch.float32 and uses_tf32() else str(dtype).removeprefix("torch.")


def _representative(geometry: Geometry, weight: torch.Size, input: torch.Size, dtype: torch.dtype) -> torch.Size:
    """The batch that is measured: the next lower power of two, within a bound on memory."""
    image = torch.Size((1, *input[1:]))
    values = max(image.numel(), geometry.output_shape(image, weight).numel())
    most = max(1, min(input[0], _MOST_BYTES // (values * dtype.itemsize)))
    return torch.Size((tuning.power_of_two(most), *input[1:]))


# Not before a tensor on a GPU asks for them: importing Triton takes longer than everything else here.
def _convolution() -> Any:
    return import_module("ganvas.ops.backends.triton.convolution")


def _weight_gradient() -> Any:
    return import_module("ganvas.ops.backends.triton.weight_gradient")
