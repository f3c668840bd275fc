"""Chains of which every convolution is native, in one call forward and one backward (csrc/cpu/chain.h)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas.ops.backends.arguments import address, float32, pixel_strides
from ganvas.ops.backends.cpu.arguments import DTYPES, convert, empty, empty_pixels, in_dtypes
from ganvas.ops.backends.cpu.convolution import chosen_convolution
from ganvas.ops.backends.cpu.kernels import NativeConvolution
from ganvas.ops.backends.trial import Direction
from ganvas.ops.direct import is_float32
from ganvas.ops.layers import Adds, Gradients, Layer, Tensors, by_layer, hands_on_written, residual_layer

_NORMS = {None: native.Norm.none, False: native.Norm.fixed, True: native.Norm.batch}

Kept = list[Tensor | None]
"""For backward, of each layer: the convolution's output (None: it is the chain's), what it handed on written, pooled or
to be added (None: it is the chain's output, or nothing), and which of each four was pooled, uint8 (None: nothing)."""

_PARAMETERS, _KEPT, _MOVING = len(Tensors._fields), 3, 3
_DIRECTIONS: tuple[Direction, ...] = ("backward_input", "backward_weight")
_READ = (torch.float32, torch.bfloat16, torch.int64)


class NativeChain:
    """The layers of a chain for inputs of one shape. It is good as long as its tensors are of the same layout."""

    def __init__(
        self, layers: Sequence[Layer], convolutions: Sequence[NativeConvolution], input: torch.Size, dtype: torch.dtype,
        groups: int, adds: Adds,
    ) -> None:  # fmt: skip
        self._layers, self._convolutions = layers, convolutions
        self._dtype, self._groups, self._adds = dtype, groups, adds
        self._narrow = [layer.weight.dtype is torch.bfloat16 for layer in layers]
        self._inputs = []
        for layer, convolution in zip(layers, convolutions):
            self._inputs.append(input)
            input = layer.pooled_shape(convolution.output_shape)
        self._output = input
        self._written = [
            shape if hands_on_written(layers, adds, i) else None
            for i, shape in enumerate((*self._inputs[1:], self._output))
        ]
        self._values, self._reads_all = _values_dtypes(layers)
        self._moving = [_moving_dtype(layer) for layer in layers]
        self._forward = self._chain([None] * len(layers), [None] * len(layers))
        self._backward: dict[tuple[bool, ...], native.Chain | None] = {}
        self._statistics = self._forward.statistics_floats

    def forward(
        self,
        input: Tensor,  # channels_last
        residual: Tensor | None,  # likewise
        parameters: Sequence[Tensor | None],  # of each layer Tensors
        moving: Sequence[Tensor | None],  # of each layer running mean, running variance and count of batches
        keep: bool,
    ) -> tuple[Tensor, Kept, Tensor]:
        """The chain's result; if ``keep`` what :meth:`backward` needs of the layers; and their statistics.

        Those are :func:`ganvas.ops.layers.moments_of`; in evaluation of no use to anyone.
        """
        parameters = self._readable(parameters)
        running = in_dtypes(moving, (dtype for dtype in self._moving for _ in range(_MOVING)))
        output, kept, statistics = empty_pixels(self._output, self._dtype), [], empty(self._statistics)
        if keep:
            for layer, convolution, written in zip(self._layers, self._convolutions, self._written):
                last = layer is self._layers[-1]
                kept.append(None if last and layer.is_bare else empty_pixels(convolution.output_shape, self._dtype))
                kept.append(None if last or written is None else empty_pixels(written, self._dtype))
                kept.append(empty_pixels(written, torch.uint8) if layer.max_pool and written is not None else None)
        self._forward.forward(
            input.data_ptr(), address(residual), _addresses(parameters), _addresses(running),
            [layer.momentum for layer in self._layers], _addresses(kept), statistics.data_ptr(), output.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        moves = (layer.batch_statistics for layer in self._layers for _ in range(_MOVING))
        convert(
            (copy, own) for copy, own, moved in zip(running, moving, moves)
            if moved and copy is not None and own is not None and copy is not own
        )  # fmt: skip
        return output, kept, statistics

    def backward(
        self,
        grad_output: Tensor,  # channels_last
        input: Tensor,  # likewise
        output: Tensor | None,  # likewise; None without a residual, or where its kink is none
        parameters: Sequence[Tensor | None],
        kept: Kept,
        statistics: Tensor,
        has_residual: bool,
        residual_is_input: bool,
        wants_input: bool,
        wanted: Sequence[bool],
        overwrite_kept: bool,
    ) -> Gradients | None:
        """None where a convolution of torch's is the faster one.

        Also None where tensors came back from autograd in another memory layout than they had.

        Args:
            residual_is_input: the result has one gradient for both.
            overwrite_kept: gradients may take the place of what ``kept`` holds, which then is lost.
        """
        key = (wants_input, *wanted)
        if key not in self._backward:
            self._backward[key] = self._backward_chain(wants_input, wanted)
        chain = self._backward[key]
        if chain is None or not self._lie_as_they_did(input, output, parameters, kept):
            return None
        grad_input = empty_pixels(input.shape, self._dtype) if wants_input else None
        grad_residual = written = None
        if has_residual and not residual_is_input:
            adding = residual_layer(self._adds)
            if adding == len(self._layers) - 1 and self._layers[adding].adds_last:
                grad_residual = grad_output
            else:
                grad_residual = written = empty_pixels(self._convolutions[adding].output_shape, self._dtype)
        read = self._readable(parameters)
        gradients = [
            torch.empty_like(tensor) if want and tensor is not None else None for tensor, want in zip(read, wanted)
        ]
        if overwrite_kept:
            torch.autograd.graph.increment_version([tensor for tensor in kept if tensor is not None])
        chain.backward(
            grad_output.data_ptr(), input.data_ptr(), address(output), _addresses(read), _addresses(kept),
            statistics.data_ptr(), address(grad_input), address(written), residual_is_input,
            _addresses(gradients), overwrite_kept, torch.get_num_threads(),
        )  # fmt: skip
        if not self._reads_all:
            dtypes = (torch.float32 if tensor is None else tensor.dtype for tensor in parameters)
            gradients = in_dtypes(gradients, dtypes)
        return Gradients(grad_input, grad_residual, gradients)

    @staticmethod
    def reads(moving: Iterable[Tensor | None]) -> bool:
        """Whether running statistics and counts lie where a chain takes them."""
        return all(values is None or (values.dtype in _READ and values.is_contiguous()) for values in moving)

    @property
    def goes_backward(self) -> bool:
        """Whether native kernels take all gradients, but for the chain's input."""
        return all(
            self._chosen(i, direction) is not None
            for i in range(len(self._layers))
            for direction in _DIRECTIONS[0 if i else 1 :]
        )

    @property
    def kept_count(self) -> int:
        """Of the tensors that are kept for backward, beside the statistics."""
        return _KEPT * len(self._layers)

    def _chain(
        self, backward_input: Sequence[NativeConvolution | None], backward_weight: Sequence[NativeConvolution | None]
    ) -> native.Chain:
        return native.Chain(
            [
                (
                    convolution.native, _native(into), _native(of_weight),
                    convolution.strides(layer.weight), layer.weight.numel() if narrow else 0,
                    values is torch.bfloat16, moving is torch.bfloat16, _NORMS[layer.batch_statistics], layer.eps,
                    layer.negative_slope, layer.activation_first, layer.max_pool, -1 if added is None else added,
                    layer.adds_last,
                )
                for layer, narrow, values, moving, convolution, into, of_weight, added in zip(
                    self._layers, self._narrow, self._values, self._moving, self._convolutions, backward_input,
                    backward_weight, self._adds,
                )
            ],
            self._groups,
        )  # fmt: skip

    def _backward_chain(self, wants_input: bool, wanted: Sequence[bool]) -> native.Chain | None:
        first = 0 if wants_input else next((i // _PARAMETERS for i, want in enumerate(wanted) if want), 0)
        first = min(first, residual_layer(self._adds))
        into: list[NativeConvolution | None] = []
        of_weight: list[NativeConvolution | None] = []
        for i in range(len(self._layers)):
            for kernels, direction, wants in (
                (into, "backward_input", i > first or (wants_input and i == 0)),
                (of_weight, "backward_weight", wanted[_PARAMETERS * i]),
            ):
                kernel = self._chosen(i, direction) if wants else None  # type: ignore[arg-type]
                if wants and kernel is None:
                    return None
                kernels.append(kernel)
        dense = all(_is_dense(layer.weight) for layer in self._layers)
        return self._chain(into, of_weight) if dense else None

    def _chosen(self, i: int, direction: Direction) -> NativeConvolution | None:
        layer = self._layers[i]
        return chosen_convolution(layer.geometry, layer.weight, self._inputs[i], self._dtype, direction, layer.backend)

    def _readable(self, parameters: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """As native code takes them, copies where they are of several dtypes."""
        if self._reads_all:
            return parameters
        dtypes = (
            torch.bfloat16 if narrow and i == 0 else torch.float32
            for narrow in self._narrow
            for i in range(_PARAMETERS)
        )
        copies = in_dtypes(parameters, dtypes)
        return [tensor for own in by_layer(copies) for tensor in (own.weight, *map(float32, own[1:]))]

    def _lie_as_they_did(
        self, input: Tensor, output: Tensor | None, parameters: Sequence[Tensor | None], kept: Kept
    ) -> bool:
        """Whether tensors that autograd saved are as they were: hooks may bring others in their place."""
        for pixels in (input, output, *kept):
            if pixels is not None and pixels.stride() != pixel_strides(pixels.shape):
                return False
        for own, layer in zip(by_layer(parameters), self._layers):
            if own.weight.stride() != layer.weight.stride() or own.weight.dtype is not layer.weight.dtype:
                return False
            for values in own[1:]:
                if self._reads_all and values is not None and not values.is_contiguous():
                    return False
        return True


def native_chain(
    layers: Sequence[Layer], input: torch.Size, dtype: torch.dtype, groups: int, adds: Adds | None = None
) -> NativeChain | None:
    """For inputs of this shape; None where the layers have to be run one by one.

    That is where torch's convolution is the faster one forward, statistics lie where no kernel writes, or a weight that
    is not float32 has gaps, which its copy would not have.
    """
    convolutions, shape = [], input
    for layer in layers:
        if not NativeChain.reads(layer.moving):
            return None
        if layer.weight.dtype is not torch.float32 and not _is_dense(layer.weight):
            return None
        convolution = chosen_convolution(
            layer.geometry, layer.weight, shape, dtype, layer.forward_direction, layer.backend
        )
        if convolution is None:
            return None
        convolutions.append(convolution)
        shape = layer.output_shape(shape)
    return NativeChain(layers, convolutions, input, dtype, groups, adds or (None,) * len(layers))


def _values_dtypes(layers: Sequence[Layer]) -> tuple[list[torch.dtype], bool]:
    """Of each layer the dtype of its values per channel, and whether native code reads all parameters where they are.

    That is where those are of one dtype in a layer; where they are not in some layer, all are to be float32.
    """
    found = []
    for layer in layers:
        weight, *values = layer.tensors
        given = [value for value in values if value is not None]
        if weight.dtype not in DTYPES:
            break
        if all(map(is_float32, given)):
            found.append(torch.float32)
        elif all(value.dtype is torch.bfloat16 and value.is_contiguous() for value in given):
            found.append(torch.bfloat16)
        else:
            break
    else:
        return found, True
    return [torch.float32] * len(layers), False


def _moving_dtype(layer: Layer) -> torch.dtype:
    """In which native code reads running statistics, and moves them: their own where that is bfloat16, of both."""
    mean, var, _ = layer.moving
    both = mean is not None and var is not None and mean.dtype is var.dtype is torch.bfloat16
    return torch.bfloat16 if both else torch.float32


def _is_dense(tensor: Tensor) -> bool:
    """Whether its numbers lie in one piece of memory, in any order."""
    return torch.empty_like(tensor).stride() == tensor.stride()


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _native(convolution: NativeConvolution | None) -> native.Convolution | None:
    return None if convolution is None else convolution.native
