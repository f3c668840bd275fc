"""Chains to test, and the same layers one after the other in plain torch, the choices that are not linear kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from torch import Tensor

from ganvas.ops.chain import Layer, can_chain, conv_bn_leaky_relu_chain
from ganvas.ops.convolution import Geometry, convolve

# Of the convolutions' rounding errors, in float32 roundings of the result: see test_winograd.py.
GROWTH = 5.02

# name: (kernel size, geometry). The first is what native kernels take; a chain holds one of them at least.
CONVOLUTIONS = {
    "3x3": (3, Geometry(padding=(1, 1))),
    "3x3 unpadded": (3, Geometry()),
    "stride 2": (3, Geometry(stride=(2, 2), padding=(1, 1))),
    "5x5": (5, Geometry(padding=(2, 2))),
    "1x1": (1, Geometry()),
    "grouped": (3, Geometry(padding=(1, 1), groups=8)),
    "dilated": (3, Geometry(padding=(2, 2), dilation=(2, 2))),
    "uneven padding": (3, Geometry(padding=(1, 0))),
    "4x4 stride 2": (4, Geometry(stride=(2, 2), padding=(1, 1))),
    "4x4 stride 2 transposed": (4, Geometry(stride=(2, 2), padding=(1, 1), transposed=True)),
    "upsampled": (3, Geometry(padding=(1, 1), upsampled=True)),
    "transposed with output padding": (
        3,
        Geometry(stride=(2, 2), padding=(1, 1), transposed=True, output_padding=(1, 1)),
    ),
}
NORMS = (None, True, False)  # no norm, batch statistics, fixed statistics


def layer(
    in_channels: int, out_channels: int, convolution: str = "3x3", norm: bool | None = True, *,
    activation_first: bool = False, bias: bool = False, affine: bool = True, slope: float = 0.2, max_pool: bool = False,
    adds_last: bool = False, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None,
) -> Layer:  # fmt: skip
    """A layer with random parameters and statistics."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size, geometry = CONVOLUTIONS[convolution]
    first, second = (in_channels, out_channels) if geometry.transposed else (out_channels, in_channels)
    fan_in = in_channels * size * size // geometry.groups
    values = Layer(
        geometry,
        (normal(first, second // geometry.groups, size, size) / fan_in**0.5).to(dtype),
        normal(out_channels).to(dtype) if bias else None,
        negative_slope=slope,
        activation_first=activation_first and norm is not None,
        max_pool=max_pool,
        adds_last=adds_last,
    )
    if norm is None:
        return values
    return replace(
        values,
        batch_statistics=norm,
        bn_weight=normal(out_channels) if affine else None,
        bn_bias=normal(out_channels) if affine else None,
        running_mean=normal(out_channels),
        running_var=normal(out_channels).exp(),
        momentum=0.3,
    )


def with_grad(layers: Sequence[Layer], dtype: torch.dtype | None = None) -> list[Layer]:
    """Copies whose tensors are leaves of their own."""

    def own(tensor: Tensor | None, grad: bool) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_(grad)

    return [
        replace(
            one,
            **{name: own(getattr(one, name), True) for name in ("weight", "bias", "bn_weight", "bn_bias")},
            **{name: own(getattr(one, name), False) for name in ("running_mean", "running_var")},
        )
        for one in layers
    ]


class Choices:
    """What is not linear in a layer, numbered: sides of the kink and winners of the pooling, as the values have it."""

    def kink(self, i: int, values: Tensor, slope: float) -> Tensor:
        return F.leaky_relu(values, slope)

    def max_pool(self, i: int, values: Tensor) -> Tensor:
        return F.max_pool2d(values, 2)


class Recorded(Choices):
    """... and kept."""

    def __init__(self) -> None:
        self.sides: dict[int, Tensor] = {}
        self.winners: dict[int, Tensor] = {}

    def kink(self, i: int, values: Tensor, slope: float) -> Tensor:
        self.sides[i] = values > 0
        return super().kink(i, values, slope)

    def max_pool(self, i: int, values: Tensor) -> Tensor:
        pooled, self.winners[i] = F.max_pool2d(values, 2, return_indices=True)
        return pooled


class Repeated(Choices):
    """... or those that others recorded."""

    def __init__(self, record: Recorded) -> None:
        self.record = record

    def kink(self, i: int, values: Tensor, slope: float) -> Tensor:
        return torch.where(self.record.sides[i], values, slope * values)

    def max_pool(self, i: int, values: Tensor) -> Tensor:
        winners = self.record.winners[i]
        return values.flatten(2).gather(2, winners.flatten(2)).view(winners.shape)


def layer_by_layer(
    input: Tensor, layers: Sequence[Layer], groups: int, residual: Tensor | None, choices: Choices,
    rounded: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Plain torch. ``rounded`` gets the convolutions' weights and what they make."""
    for i, one in enumerate(layers):
        input = rounded(convolve(input, rounded(one.weight), one.bias, one.geometry))
        if one.activation_first:
            input = choices.kink(i, input, one.negative_slope)
        if one.batch_statistics is not None:
            parts = input.chunk(groups) if one.batch_statistics else [input]
            statistics, affine = (one.running_mean, one.running_var), (one.bn_weight, one.bn_bias)
            options = (one.batch_statistics, one.momentum, one.eps)
            input = torch.cat([F.batch_norm(part, *statistics, *affine, *options) for part in parts])
        if residual is not None and i == len(layers) - 1:
            input = input + residual
        if not one.activation_first:
            input = choices.kink(i, input, one.negative_slope)
        if one.max_pool:
            input = choices.max_pool(i, input)
    return input


def plain(
    input: Tensor, layers: Sequence[Layer], groups: int = 1, residual: Tensor | None = None,
    choices: Choices | None = None,
) -> Tensor:  # fmt: skip
    return layer_by_layer(input, layers, groups, residual, choices or Choices(), lambda x: x)


def choices_of_plain(input: Tensor, layers: Sequence[Layer], groups: int, residual: Tensor | None) -> Recorded:
    record = Recorded()
    with torch.no_grad():
        plain(input, with_grad(layers), groups, residual, record)
    return record


def choices_of_chain(input: Tensor, layers: Sequence[Layer], groups: int, residual: Tensor | None) -> Recorded:
    """By cutting the chain short, so in its own arithmetic: that of a pass which backward follows."""
    record = Recorded()

    def before(i: int, **changes) -> Tensor:
        own = with_grad([*layers[:i], replace(layers[i], **changes)])
        return conv_bn_leaky_relu_chain(input, own, groups, residual if i == len(layers) - 1 else None).detach()

    for i, one in enumerate(layers):
        straight = {"negative_slope": 1.0, "activation_first": False, "max_pool": False}
        if one.activation_first:
            straight |= {"batch_statistics": None, "bn_weight": None, "bn_bias": None}
        record.sides[i] = before(i, **straight) > 0
        if one.max_pool:
            record.max_pool(i, before(i, max_pool=False))
    return record


class Rounded(torch.autograd.Function):
    """Random errors of a given size, relative to the root mean square, in the values and in their gradient.

    A gradient is shifted besides, each channel by a rounding of its mean size: that is how exactly a sum over pixels is
    taken, and a norm's backward pass subtracts such a sum from every pixel.
    """

    @staticmethod
    def forward(ctx, values: Tensor, error: float) -> Tensor:  # type: ignore[override]
        ctx.error = error
        return values + error * values.square().mean().sqrt() * Rounded.noise(values)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if not ctx.error:
            return grad, None
        shift = grad.abs().mean((0, 2, 3), keepdim=True) * torch.finfo(torch.float32).eps
        size = ctx.error * grad.square().mean().sqrt()
        return grad + size * Rounded.noise(grad) + shift * Rounded.noise(shift), None

    @staticmethod
    def noise(like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        return noise.to(like.device)


def everything(
    function: Callable[..., Tensor], input: Tensor, layers: Sequence[Layer], groups: int = 1,
    residual: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Output, all gradients and the running statistics after one step."""
    input, layers = input.detach().clone(memory_format=torch.preserve_format).requires_grad_(), with_grad(layers)
    if residual is not None:
        residual = residual.detach().clone().requires_grad_()
    output = function(input, layers, groups, residual)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator).to(layers[0].weight.dtype).to(output)
    output.backward(grad)
    results = {"output": output.detach(), "grad of input": input.grad}
    if residual is not None:
        results["grad of residual"] = residual.grad
    for i, one in enumerate(layers):
        for name in ("weight", "bias", "bn_weight", "bn_bias"):
            if getattr(one, name) is not None:
                results[f"grad of {name} {i}"] = getattr(one, name).grad
        if one.batch_statistics:
            results |= {f"running_mean {i}": one.running_mean, f"running_var {i}": one.running_var}
    return results


@dataclass(frozen=True)
class Chain:
    input: Tensor
    layers: tuple[Layer, ...]
    groups: int = 1
    residual: Tensor | None = None

    def __repr__(self) -> str:
        """What makes a failing case, without its numbers."""
        layers = (
            f"{tuple(one.weight.shape)} {one.geometry} bias={one.bias is not None} norm={one.batch_statistics} "
            f"affine={one.bn_weight is not None} activation_first={one.activation_first} slope={one.negative_slope} "
            f"max_pool={one.max_pool}"
            for one in self.layers
        )
        kind = f"{self.input.dtype} groups={self.groups} residual={self.residual is not None}"
        return "\n".join((f"Chain {tuple(self.input.shape)} {kind}", *layers))


def compare_with_torch(accuracy, chain: Chain) -> None:
    """Each against float64 with its own choices; the floor is what rounding all weights and raw outputs does."""
    input, *arguments = chain.input, chain.layers, chain.groups, chain.residual
    assert can_chain(input, *arguments)
    dtype = input.dtype

    def exact(record: Recorded, error: float) -> dict[str, Tensor]:
        def function(*arguments) -> Tensor:
            output = layer_by_layer(*arguments, Repeated(record), lambda v: Rounded.apply(v, error))
            return Rounded.apply(output, error / GROWTH)  # no convolution comes after

        residual = None if chain.residual is None else chain.residual.double()
        return everything(function, input.double(), with_grad(chain.layers, torch.float64), chain.groups, residual)

    ours = everything(conv_bn_leaky_relu_chain, input, *arguments)
    torchs = everything(plain, input, *arguments)
    chosen, torchs_chosen = choices_of_chain(input, *arguments), choices_of_plain(input, *arguments)
    ours_exact, torchs_exact = exact(chosen, 0.0), exact(torchs_chosen, 0.0)
    rounding = GROWTH * torch.finfo(torch.float32).eps
    if dtype is not torch.float32:
        rounding += torch.finfo(dtype).eps / 2
    rounded = exact(chosen, rounding)
    for name, result in ours.items():
        factor = 3.0 if name.startswith("grad") else 2.0
        # Twice: two draws of the same random errors differ by as much where they are summed up to a few numbers.
        floor = 2 * (rounded[name] - ours_exact[name]).abs() / torch.finfo(result.dtype).eps + ours_exact[name].abs()
        assert result.dtype is torchs[name].dtype, name
        accuracy.check(name, result, ours_exact[name], torchs[name], torchs_exact[name], factor, floor)


@st.composite
def chains(draw) -> Chain:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, groups = draw(st.sampled_from([torch.float32, torch.bfloat16])), draw(st.sampled_from([1, 1, 2]))
    count = draw(st.integers(1, 3))
    native = draw(st.integers(0, count - 1))
    first = channels = draw(st.sampled_from([16, 24]) if native == 0 else st.sampled_from([8, 16]))
    layers = []
    for i in range(count):
        out = draw(st.sampled_from([16, 24])) if i >= native - 1 else draw(st.sampled_from([8, 16, 24]))
        kind = "3x3" if i == native else draw(st.sampled_from(list(CONVOLUTIONS)))
        layers.append(
            layer(
                channels, out, kind, draw(st.sampled_from(NORMS)), activation_first=draw(st.booleans()),
                bias=draw(st.booleans()), affine=draw(st.booleans()), slope=draw(st.sampled_from([0.0, 0.2, 1.0])),
                # bfloat16 makes ties, and rounded activations other winners than activations that were never written
                max_pool=dtype is torch.float32 and draw(st.booleans()),
                dtype=dtype, generator=generator,
            )
        )  # fmt: skip
        channels = out
    height, width = draw(st.integers(7, 14)), draw(st.integers(7, 14))
    input = torch.randn(2 * groups, first, height, width, generator=generator).to(dtype)
    if draw(st.booleans()):
        input = input.contiguous(memory_format=torch.channels_last)
    shape = input.shape
    for one in layers:
        before = shape
        shape = one.output_shape(shape)
        # A kernel that does not fit is another test's. Two values make x̂ = ±1, and its gradient rounding noise.
        assume(min(shape[2:]) >= 2)
    residual = None
    if draw(st.booleans()):
        layers[-1] = replace(layers[-1], activation_first=False, max_pool=False)
        shape = layers[-1].geometry.output_shape(before, layers[-1].weight.shape)
        if layers[-1].batch_statistics is not None:
            residual = torch.randn(shape, generator=generator).to(dtype)
    return Chain(input, tuple(layers), groups, residual)


SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
