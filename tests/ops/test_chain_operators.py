"""The chain as an operator: what torch asks of one, and that graphs which hold it compute what eager mode does."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from operators import opcheck_without_gradients
from torch import Tensor

pytest.importorskip("ganvas._native")

from ganvas.ops.backends.cpu.chain import NativeChain
from ganvas.ops.chain import Layer, can_chain, conv_bn_leaky_relu_chain
from ganvas.ops.convolution import Geometry
from ganvas.ops.layers import decode, encode

OPS = torch.ops.ganvas


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (4, 16, 8, 10)).to(dtype)


def layer(in_channels: int, out_channels: int, norm: bool | None = True, size: int = 3, **options) -> Layer:
    statistics = {} if norm is None else {
        "bn_weight": torch.rand(out_channels), "bn_bias": torch.randn(out_channels),
        "running_mean": torch.randn(out_channels), "running_var": torch.rand(out_channels), "momentum": 0.3,
    }  # fmt: skip
    options = {"geometry": Geometry(padding=(size // 2, size // 2)), "negative_slope": 0.2, **statistics, **options}
    geometry, groups = options["geometry"], options["geometry"].groups
    shape = (out_channels, in_channels // groups) if not geometry.transposed else (in_channels, out_channels)
    return Layer(weight=torch.randn(*shape, size, size) / 10, batch_statistics=norm, **options)


def mixed() -> list[Layer]:
    """Every kind of norm, both orders, pooling inside and at the end, torch's convolution among native ones."""
    return [
        layer(16, 24, max_pool=True),
        layer(24, 16, size=1, activation_first=True, bias=torch.randn(16)),
        layer(16, 16, None, 4, geometry=Geometry((2, 2), (1, 1), transposed=True)),
        layer(16, 20, False, geometry=Geometry(padding=(1, 1), upsampled=True), max_pool=True, bn_bias=None),
    ]


def chain_of(kind: str) -> tuple[Tensor, list[Layer], int, Tensor | None]:
    if kind == "mixed":
        return image(), mixed(), 1, None
    if kind == "statistics groups":
        return image(), mixed()[:2], 2, None
    if kind == "residual":
        return image(), [layer(16, 24), layer(24, 16)], 1, image()
    if kind == "residual without a kink":
        return image(), [layer(16, 16, negative_slope=1.0)], 2, image()
    if kind == "a convolution alone at the end":
        return image(), [layer(16, 24), layer(24, 3, None, negative_slope=1.0, bias=torch.randn(3))], 1, None
    layers = [replace(one, weight=one.weight.bfloat16()) for one in (layer(16, 24), layer(24, 16, None))]
    return image(dtype=torch.bfloat16).to(memory_format=torch.channels_last), layers, 1, None


KINDS = [
    "mixed", "statistics groups", "residual", "residual without a kink", "a convolution alone at the end", "bfloat16",
]  # fmt: skip


def with_grad(layers: Sequence[Layer]) -> list[Layer]:
    """Copies whose tensors are leaves of their own."""
    names = ("weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var")
    return [
        replace(
            one,
            **{
                name: value.clone().requires_grad_(not name.startswith("running"))
                for name in names
                if (value := getattr(one, name)) is not None
            },
        )
        for one in layers
    ]


def values_of(one: Layer) -> dict[str, Any]:
    return {field.name: getattr(one, field.name) for field in fields(one)}


def step(function, kind: str) -> dict[str, Tensor]:
    """Output, all gradients and the running statistics."""
    torch.manual_seed(0)
    input, layers, groups, residual = chain_of(kind)
    input, layers = input.requires_grad_(), with_grad(layers)
    residual = None if residual is None else residual.requires_grad_()
    output = function(input, layers, groups, residual)
    output.backward(torch.randn(output.shape).to(output.dtype))
    results = {"output": output.detach(), "input": input.grad}
    if residual is not None:
        results["residual"] = residual.grad
    for i, one in enumerate(layers):
        for name, tensor in values_of(one).items():
            if isinstance(tensor, Tensor):
                results[f"{name} {i}"] = tensor if tensor.grad is None else tensor.grad
    return results


def forward_arguments(kind: str, keep: bool = True) -> tuple:
    input, layers, groups, residual = chain_of(kind)
    return input, residual, *encode(with_grad(layers)), groups, keep


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_of_the_forward_operator_and_its_autograd(kind):
    input, *others = forward_arguments(kind)
    torch.library.opcheck(OPS.conv_bn_leaky_relu_chain.default, (input.requires_grad_(), *others))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_of_the_backward_operator(kind):
    with torch.no_grad():
        arguments = forward_arguments(kind)
        input, residual, parameters, _, integers, reals, *_ = arguments
        output, moments, stored = OPS.conv_bn_leaky_relu_chain(*arguments)
    result = None if residual is None or reals[-1] == 1.0 else output
    wanted = [i != 1 for i in range(len(parameters))]
    for wants_input in (True, False):
        backward = (
            torch.randn_like(output), input, result, [p.detach() for p in parameters], moments, stored, integers, reals,
            residual is not None, wants_input, wanted,
        )  # fmt: skip
        opcheck_without_gradients(OPS.conv_bn_leaky_relu_chain_backward.default, backward)


@pytest.mark.parametrize("kind", KINDS)
def test_encoded_layers_decode_to_the_same(kind):
    layers = chain_of(kind)[1]
    for one, again in zip(layers, decode(*encode(layers)), strict=True):
        moving = {"momentum": 0.0, "running_mean": None, "running_var": None} if one.batch_statistics else {}
        expected = replace(one, **{"momentum": 0.0, **moving})
        assert values_of(again) == values_of(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_equals_the_eager_one_in_one_graph(kind):
    def function(input, layers, groups, residual):
        assert can_chain(input, layers, groups, residual)
        return conv_bn_leaky_relu_chain(input * 1, layers, groups, residual)

    torch._dynamo.reset()
    expected = step(function, kind)
    results = step(torch.compile(function, backend="aot_eager", fullgraph=True), kind)
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.startswith("running"):  # moved by torch, not by the kernel
            torch.testing.assert_close(results[name], tensor, msg=name)
        else:
            assert torch.equal(results[name], tensor), name


def test_second_derivatives_of_the_operator_equal_those_of_the_eager_chain():
    input, layers, groups, residual = chain_of("residual")

    def through_operator(input, layers, groups, residual):
        return OPS.conv_bn_leaky_relu_chain(input, residual, *encode(layers), groups, True)[0]

    results = []
    for function in (conv_bn_leaky_relu_chain, through_operator):
        leaf, own = input.clone().requires_grad_(), with_grad(layers)
        (gradient,) = torch.autograd.grad(function(leaf, own, groups, residual).sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        results.append([leaf.grad, *(one.weight.grad for one in own)])
    torch.testing.assert_close(*results)


def test_what_was_kept_for_nobody_can_still_be_differentiated():
    input, layers, groups, _ = chain_of("mixed")
    results = []
    for keep in (True, False):
        own = with_grad(layers)
        output, _, stored = OPS.conv_bn_leaky_relu_chain(input, None, *encode(own), groups, keep)
        assert bool(stored) is keep
        output.square().mean().backward()
        results.append([one.weight.grad for one in own])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_a_step_under_autocast_compiles():
    def function(input, layers, groups, residual):
        with torch.autocast("cpu", torch.bfloat16):
            assert can_chain(input, layers, groups, residual)
            return conv_bn_leaky_relu_chain(input, layers, groups, residual)

    torch._dynamo.reset()
    expected = step(function, "statistics groups")
    results = step(torch.compile(function, backend="aot_eager", fullgraph=True), "statistics groups")
    assert results["output"].dtype is torch.bfloat16
    for name, tensor in expected.items():
        assert results[name].dtype is tensor.dtype, name
        torch.testing.assert_close(results[name], tensor, msg=name)


def test_native_layers_are_one_call_forward_and_one_backward(monkeypatch):
    calls = []
    for name in ("forward", "backward"):
        original = getattr(NativeChain, name)
        monkeypatch.setattr(
            NativeChain, name, lambda *args, name=name, call=original, **kw: (calls.append(name), call(*args, **kw))[1]
        )
    input, layers, groups, residual = chain_of("residual")
    own = with_grad(layers)
    OPS.conv_bn_leaky_relu_chain(input, residual, *encode(own), groups, True)[0].sum().backward()
    assert calls == ["forward", "backward"]


def test_what_is_remembered_of_a_chain_holds_none_of_its_tensors():
    input, layers, groups, _ = chain_of("statistics groups")
    weight = weakref.ref(layers[0].weight)
    OPS.conv_bn_leaky_relu_chain(input, None, *encode(layers), groups, False)
    del layers
    gc.collect()
    assert weight() is None
