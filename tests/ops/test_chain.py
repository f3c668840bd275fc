"""Chains of convolution, BatchNorm and LeakyReLU against the same layers one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("ganvas._native")

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


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: more would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layer(
    in_channels: int, out_channels: int, convolution: str = "3x3", norm: bool | None = True, *,
    activation_first: bool = False, bias: bool = False, affine: bool = True, slope: float = 0.2, max_pool: bool = False,
    dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None,
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
    """By cutting the chain short, so in its own arithmetic."""
    record = Recorded()

    def before(i: int, **changes) -> Tensor:
        own = with_grad([*layers[:i], replace(layers[i], **changes)])
        return conv_bn_leaky_relu_chain(input, own, groups, residual if i == len(layers) - 1 else None)

    with torch.no_grad():
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
        return values + error * values.square().mean().sqrt() * Rounded.noise(values.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if not ctx.error:
            return grad, None
        shift = grad.abs().mean((0, 2, 3), keepdim=True) * torch.finfo(torch.float32).eps
        size = ctx.error * grad.square().mean().sqrt()
        return grad + size * Rounded.noise(grad.shape) + shift * Rounded.noise(shift.shape), None

    @staticmethod
    def noise(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


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
    output.backward(torch.randn(output.shape, generator=generator).to(layers[0].weight.dtype).to(output.dtype))
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
    if dtype is torch.bfloat16:
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


@settings(SETTINGS, max_examples=25)
@given(chains())
def test_random_chains_are_as_accurate_as_torch(accuracy, chain):
    compare_with_torch(accuracy, chain)


@pytest.mark.slow
@settings(SETTINGS, max_examples=200)
@given(chains())
def test_many_random_chains_are_as_accurate_as_torch(accuracy, chain):
    compare_with_torch(accuracy, chain)


def three_layers(**options) -> list[Layer]:
    """Torch's convolution between two native ones, in both orders."""
    torch.manual_seed(0)
    return [
        layer(16, 24, bias=True, **options),
        layer(24, 16, "5x5", activation_first=True, **options),
        layer(16, 20, norm=None, bias=True, **options),
    ]


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape or (4, 16, 7, 9), generator=generator).to(dtype)


def test_the_output_is_channels_last_and_nobody_elses_memory():
    x, layers = image(), three_layers()
    output = conv_bn_leaky_relu_chain(x, layers)
    assert output.is_contiguous(memory_format=torch.channels_last)
    before = output.clone()
    conv_bn_leaky_relu_chain(image() + 1, layers)
    assert torch.equal(output, before)


def test_the_result_does_not_depend_on_whether_gradients_are_wanted():
    x, layers = image(), three_layers()
    expected = conv_bn_leaky_relu_chain(x, with_grad(layers))
    assert expected.requires_grad
    with torch.no_grad():
        inside = conv_bn_leaky_relu_chain(x, with_grad(layers))
    with torch.inference_mode():
        inference = conv_bn_leaky_relu_chain(x, with_grad(layers))
    for output in (inside, inference, conv_bn_leaky_relu_chain(x, layers)):
        assert not output.requires_grad
        assert torch.equal(output, expected)


def test_statistics_made_in_inference_mode_can_be_moved():
    with torch.inference_mode():
        layers = three_layers()
        before = layers[0].running_mean.clone()
        conv_bn_leaky_relu_chain(image(), layers)
        assert not torch.equal(layers[0].running_mean, before)


PLACES = ["input", *(f"{name} {i}" for i in range(3) for name in ("weight", "bias", "bn_weight", "bn_bias"))]


@pytest.mark.parametrize(
    "wanted",
    [*({place} for place in PLACES if place not in ("bias 1", "bn_weight 2", "bn_bias 2")), {"weight 0", "bn_bias 1"}],
    ids=" and ".join,
)
def test_frozen_tensors_get_no_gradient_and_the_others_the_same(wanted):
    x, layers = image(), three_layers()
    everywhere = everything(conv_bn_leaky_relu_chain, x, layers)
    x, layers = x.clone().requires_grad_("input" in wanted), with_grad(layers)
    leaves = {"input": x}
    for i, one in enumerate(layers):
        for name in ("weight", "bias", "bn_weight", "bn_bias"):
            if (tensor := getattr(one, name)) is not None:
                leaves[f"{name} {i}"] = tensor.requires_grad_(f"{name} {i}" in wanted)
    output = conv_bn_leaky_relu_chain(x, layers)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    for place, leaf in leaves.items():
        if place in wanted:
            assert torch.equal(leaf.grad, everywhere[f"grad of {place}"]), place
        else:
            assert leaf.grad is None, place


def test_a_second_backward_is_torchs_own_error_and_retain_graph_allows_it():
    layers = with_grad(three_layers())
    output = conv_bn_leaky_relu_chain(image(), layers).sum()
    output.backward(retain_graph=True)
    first = layers[0].weight.grad.clone()
    output.backward()
    assert torch.equal(layers[0].weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.backward()


@pytest.mark.parametrize("place", ["input", "weight 0", "weight 1", "weight 2", "bn_weight 0"])
def test_a_change_between_forward_and_backward_is_torchs_own_error(place):
    x, layers = image(), with_grad(three_layers())
    name, *i = place.split()
    tensor = getattr(layers[int(i[0])], name) if i else x
    output = conv_bn_leaky_relu_chain(x, layers)
    with torch.no_grad():
        tensor.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_running_statistics_moved_between_forward_and_backward_are_torchs_own_error_where_they_were_used():
    fixed = with_grad([layer(16, 16, norm=False)])
    output = conv_bn_leaky_relu_chain(image(), fixed)
    conv_bn_leaky_relu_chain(image(), [replace(fixed[0], batch_statistics=True)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_changing_the_running_statistics_is_visible_to_autograd():
    (one,) = [layer(16, 16)]
    before = one.running_mean._version, one.running_var._version
    conv_bn_leaky_relu_chain(image(), [one])
    assert one.running_mean._version > before[0]
    assert one.running_var._version > before[1]


@pytest.mark.parametrize("kind", ["double", "every second value"])
def test_running_statistics_that_no_kernel_reaches_move_all_the_same(kind):
    ours, theirs = layer(16, 24), layer(16, 24)
    mean, var = torch.zeros(48, dtype=torch.float64 if kind == "double" else None), torch.ones(48)
    if kind == "double":
        theirs, ours = replace(ours, running_mean=mean[:24].float(), running_var=var[:24].clone()), replace(
            ours, running_mean=mean[:24], running_var=var[:24].double()
        )  # fmt: skip
    else:
        theirs, ours = replace(ours, running_mean=mean[::2].clone(), running_var=var[::2].clone()), replace(
            ours, running_mean=mean[::2], running_var=var[::2]
        )  # fmt: skip
    conv_bn_leaky_relu_chain(image(), [ours], 2)
    plain(image(), [theirs], 2)
    torch.testing.assert_close(ours.running_mean.float(), theirs.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_var.float(), theirs.running_var, rtol=1e-4, atol=1e-5)


def _second_order(
    function: Callable[..., Tensor], x: Tensor, layers: Sequence[Layer], groups: int = 1, skip: bool = False
) -> list[Tensor]:
    """Gradients of a gradient penalty; with ``skip`` the input is added to what becomes of it."""
    x, layers = x.clone().requires_grad_(), with_grad(layers)
    body = x * 1.0
    output = function(body, layers, groups, body if skip else None)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    leaves = [x, *(t for one in layers for t in (one.weight, one.bias, one.bn_weight, one.bn_bias) if t is not None)]
    found = torch.autograd.grad(gradient.square().sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("norm", [True, False])
def test_gradients_of_second_order_equal_plain_torchs(norm, groups):
    torch.manual_seed(0)
    layers = [
        layer(16, 16, norm=norm, max_pool=True),
        layer(16, 20, "upsampled", norm, activation_first=True),
        layer(20, 8, "stride 2", None, bias=True),
    ]
    x = image(4, 16, 8, 8)
    ours, theirs = (_second_order(function, x, layers, groups) for function in (conv_bn_leaky_relu_chain, plain))
    for got, expected in zip(ours, theirs):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_gradients_of_second_order_of_a_residual_block_equal_plain_torchs(slope):
    torch.manual_seed(0)
    layers = [layer(16, 24), layer(24, 16, slope=slope)]
    ours, theirs = (_second_order(function, image(), layers, 1, True) for function in (conv_bn_leaky_relu_chain, plain))
    for got, expected in zip(ours, theirs):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def test_a_residual_alone_may_want_a_gradient():
    layers, residual = three_layers()[:1], image(4, 24, 7, 9).requires_grad_()
    output = conv_bn_leaky_relu_chain(image(), layers, 1, residual)
    output.sum().backward()
    assert torch.equal(residual.grad, torch.where(output > 0, 1.0, 0.2))


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_tensor_in_two_places_gets_the_sum_of_both_gradients(create_graph):
    torch.manual_seed(0)
    first = layer(16, 16, bias=True)
    results = []
    for function in (conv_bn_leaky_relu_chain, plain):
        (one,) = with_grad([first])
        output = function(image(), [one, replace(one, negative_slope=0.5)]).square().sum()
        results.append(torch.autograd.grad(output, [one.weight, one.bn_weight, one.bn_bias], create_graph=create_graph))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_a_weight_that_is_made_of_the_input_gets_its_gradient_once():
    results = []
    for function in (conv_bn_leaky_relu_chain, plain):
        x = image(2, 16, 6, 6).requires_grad_()
        one = replace(layer(16, 16, norm=None), weight=torch.ones(16, 16, 3, 3) * x.mean())
        results.append(torch.autograd.grad(function(x, [one]).square().sum(), x, create_graph=True)[0])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


LAYOUTS = {
    "contiguous": image(4, 16, 7, 9),
    "channels_last": image(4, 16, 7, 9).contiguous(memory_format=torch.channels_last),
    "every second image": image(8, 16, 7, 9)[::2],
    "channels sliced": image(4, 24, 7, 9).contiguous(memory_format=torch.channels_last)[:, 3:19],
    "pixels sliced": image(4, 16, 12, 13).contiguous(memory_format=torch.channels_last)[:, :, 2:9, 1:10],
    "transposed": image(4, 16, 9, 7).transpose(2, 3),
    "offset": image(4 * 16 * 63 + 1)[1:].view(4, 16, 7, 9),
    "expanded images": image(1, 16, 7, 9).expand(4, 16, 7, 9),
    "expanded pixels": image(4, 16, 1, 1).expand(4, 16, 7, 9),
    "one image": image(1, 16, 7, 9).contiguous(memory_format=torch.channels_last),
    "one pixel": image(5, 16, 1, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_same_bits(layout):
    x, layers = LAYOUTS[layout], three_layers()
    assert can_chain(x, layers)
    expected = everything(conv_bn_leaky_relu_chain, x.clone(memory_format=torch.contiguous_format), layers)
    leaf, own = x.detach().requires_grad_(), with_grad(layers)
    output = conv_bn_leaky_relu_chain(leaf, own)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(output, [leaf, own[0].weight], grad)
    assert torch.equal(output, expected["output"])
    assert torch.equal(grads[0], expected["grad of input"])
    assert torch.equal(grads[1], expected["grad of weight 0"])


def test_a_gradient_of_any_strides():
    layers = with_grad(three_layers())
    output = conv_bn_leaky_relu_chain(image(), layers)
    scalar = torch.tensor(0.5)
    grads = [
        torch.autograd.grad(output, layers[0].weight, g, retain_graph=True)[0]
        for g in (scalar.expand(output.shape), torch.full(output.shape, 0.5), torch.full_like(output, 0.5))
    ]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[1], grads[2])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weights_keep_their_layout_in_their_gradients(memory_format):
    layers = with_grad(three_layers())
    layers[0] = replace(layers[0], weight=layers[0].weight.detach().contiguous(memory_format=memory_format))
    layers[0].weight.requires_grad_()
    conv_bn_leaky_relu_chain(image(), layers).sum().backward()
    assert layers[0].weight.grad.stride() == layers[0].weight.stride()


def test_what_autograd_keeps_may_come_back_in_another_layout():
    """As from a hook that writes saved tensors to a file or to another device."""
    layers = with_grad([layer(16, 16, max_pool=True), layer(16, 16)])
    expected = everything(conv_bn_leaky_relu_chain, image(), layers)

    def unpack(kept: tuple[Tensor, int]) -> Tensor:
        return kept[0].clone(memory_format=torch.contiguous_format)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor, 0), unpack):
        got = everything(conv_bn_leaky_relu_chain, image(), layers)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_torchs_default_device_and_dtype_do_not_matter():
    x, layers = image(), [*three_layers(), layer(20, 16, "4x4 stride 2", max_pool=True), layer(16, 16, norm=False)]
    layers += [layer(16, 16, "upsampled", None)]
    expected = everything(conv_bn_leaky_relu_chain, x, layers)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            leaf, own = x.clone().requires_grad_(), with_grad(layers)
            output = conv_bn_leaky_relu_chain(leaf, own)
            output.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(output, expected["output"])
    assert leaf.grad.isfinite().all()


def test_several_gradients_at_once_equal_one_at_a_time():
    """As a Jacobian is computed: under vmap a tensor has no memory of its own."""
    layers = with_grad(three_layers())
    output = conv_bn_leaky_relu_chain(image(), layers)
    grads = torch.randn(3, *output.shape)

    def vjp(grad: Tensor) -> Tensor:
        return torch.autograd.grad(output, layers[0].weight, grad, retain_graph=True)[0]

    for got, expected in zip(torch.vmap(vjp)(grads), map(vjp, grads)):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_what_is_not_finite_in_torch_is_not_finite(bad):
    layers = [layer(16, 16, norm=None), layer(16, 16), layer(16, 16)]
    x = image(4, 16, 12, 12)
    x[1, 2, 3, 4] = float(bad)
    ours = everything(conv_bn_leaky_relu_chain, x, layers, 2)
    theirs = everything(plain, x, layers, 2)
    for name, expected in theirs.items():
        assert not ours[name].isfinite()[~expected.isfinite()].any(), name
    assert ours["output"][2:].isfinite().all(), "the other statistics group"


def test_autocast_computes_in_bfloat16_with_gradients_of_the_leaves_dtype():
    x, layers = image(), three_layers()
    with torch.autocast("cpu", torch.bfloat16):
        assert can_chain(x, layers)
        assert can_chain(x.bfloat16(), layers), "what follows another layer under autocast"
        ours = everything(conv_bn_leaky_relu_chain, x, layers)
    assert ours["output"].dtype is torch.bfloat16
    assert all(tensor.dtype is torch.float32 for name, tensor in ours.items() if name != "output")
    narrow = [
        replace(one, weight=one.weight.bfloat16(), bias=None if one.bias is None else one.bias.bfloat16())
        for one in layers
    ]
    torchs, exact = everything(plain, x.bfloat16(), narrow), everything(plain, x, layers)
    for name, tensor in ours.items():
        allowed = 2 * (torchs[name] - exact[name]).norm() + 1e-4
        assert (tensor - exact[name]).norm() <= allowed, name


def _refused() -> dict[str, tuple]:
    x, one = image(), layer(16, 16, bias=True)

    def changed(**changes) -> list[Layer]:
        return [layer(16, 16), replace(one, **changes)]

    class Subclass(Tensor):
        pass

    return {
        "float64": (x.double(), with_grad([one], torch.float64), 1),
        "half": (x.half(), with_grad([one], torch.float16), 1),
        "weights of another dtype": (x, changed(weight=one.weight.bfloat16()), 1),
        "no image": (x[:0], [one], 1),
        "no batch dimension": (x[0], [one], 1),
        "groups that do not divide the batch": (x, [one], 3),
        "other channels": (x[:, :8], [one], 1),
        "other channels later on": (x, [one, layer(8, 16)], 1),
        "a kernel larger than the padded map": (x[:, :, :2, :2], [layer(16, 16, "3x3 unpadded")], 1),
        "pooling of one pixel": (x[:, :, :1, :1], [layer(16, 16, max_pool=True)], 1),
        "one value per channel": (x[:1, :, :1, :1], [one], 1),
        "one value per channel and group": (x[:2, :, :1, :1], [one], 2),
        "few channels": (x[:, :8], [layer(8, 8)], 1),
        "a bias of another size": (x, changed(bias=torch.zeros(15)), 1),
        "a norm of another size": (x, changed(bn_weight=torch.ones(17)), 1),
        "a norm's bias of another size": (x, changed(bn_bias=torch.ones(1)), 1),
        "statistics of another size": (x, changed(running_mean=torch.ones(15)), 1),
        "variances of another size": (x, changed(running_var=torch.ones(8)), 1),
        "parameters without memory": (x, changed(bn_weight=torch.ones(16, device="meta")), 1),
        "statistics without memory": (x, changed(running_mean=torch.ones(16, device="meta")), 1),
        "a residual of another size": (x, [one], 1, x[:1]),
        "a residual of another dtype": (x, [one], 1, x.bfloat16()),
        "a residual before a kink whose side the output does not tell": (x, changed(negative_slope=-0.5), 1, x),
        "a subclass of Tensor": (x.as_subclass(Subclass), [one], 1),
        "a weight that is a subclass of Tensor": (x, changed(weight=one.weight.as_subclass(Subclass)), 1),
    }


@pytest.mark.parametrize("name", _refused())
def test_what_does_not_fit_is_left_to_torch(name):
    assert not can_chain(*_refused()[name])


def test_a_forced_reference_backend_runs_no_chain(monkeypatch):
    assert can_chain(image(), three_layers())
    monkeypatch.setenv("GANVAS_BACKEND", "reference")
    assert not can_chain(image(), three_layers())
