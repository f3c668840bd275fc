"""Linear layers by native products against float64, beside torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operators import opcheck_without_gradients
from torch import Tensor, nn

pytest.importorskip("ganvas._native")

from ganvas import _native as native
from ganvas.nn import FusedSequential
from ganvas.ops import linear
from ganvas.ops.backends import cpu

LARGE = (256, 160, 128)  # rows, in, out: more than LEAST_MULTIPLICATIONS
assert LARGE[0] * LARGE[1] * LARGE[2] >= cpu.linear.LEAST_MULTIPLICATIONS


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the native products, in order."""
    seen: list[tuple[int, ...]] = []
    original = cpu.linear.product

    def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append((*a.shape, b.shape[1]))
        return original(a, b, bias)

    monkeypatch.setattr(cpu.linear, "product", product)
    return seen


def tensors(rows: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + in_features)
    shapes = ((rows, in_features), (out_features, in_features), (out_features,))
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (7, 5, 3), (37, 301, 53), (16, 16, 16), (250, 129, 65), (5, 2000, 300), (300, 7, 520)]
)
def test_products_are_as_accurate_as_torchs(accuracy, shape, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows, depth, columns = shape
        generator = torch.Generator().manual_seed(0)
        a, b, bias = (torch.randn(s, generator=generator) for s in ((rows, depth), (depth, columns), (columns,)))
        exact = a.double() @ b.double() + bias.double()
        for x in (a, a.t().contiguous().t(), torch.randn(rows, 2 * depth)[:, ::2].copy_(a)):
            for y in (b, b.t().contiguous().t()):
                found = cpu.linear.product(x, y, bias)
                accuracy.check("product", found, exact, a @ b + bias, exact, 2.0)
                assert torch.equal(found, cpu.linear.product(x, y, bias))
        assert torch.equal(cpu.linear.product(a, b) + 0, cpu.linear.product(a, b, torch.zeros(columns)))
    finally:
        torch.set_num_threads(before)


def test_gradients_are_as_accurate_as_torchs(accuracy, products):
    ours, torchs, exact = {}, {}, {}
    grad_output = torch.randn(LARGE[0], LARGE[2])
    for results, function, dtype in (
        (ours, linear, torch.float32),
        (torchs, F.linear, torch.float32),
        (exact, F.linear, torch.float64),
    ):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors(*LARGE)]
        output = function(*leaves)
        output.backward(grad_output.to(dtype))
        results["output"] = output.detach()
        results.update({f"gradient {i}": leaf.grad for i, leaf in enumerate(leaves)})
    for name in ours:
        accuracy.check(name, ours[name], exact[name], torchs[name], exact[name], 2.0)
    assert len(products) == 3, "one forward, two backward"


def test_only_the_gradients_that_are_asked_for_are_computed(products):
    x, weight, bias = tensors(*LARGE)
    linear(x.detach(), weight, bias).sum().backward()
    assert len(products) == 2
    assert x.grad is None
    with torch.no_grad():
        linear(x, weight, bias)
    assert len(products) == 3


def test_second_derivatives():
    x, weight, bias = tensors(*LARGE)

    def penalty(function) -> tuple[Tensor, ...]:
        (grad,) = torch.autograd.grad(function(x, weight, bias).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().mean(), (x, weight, bias))

    for ours, torchs in zip(penalty(linear), penalty(F.linear)):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-3 * float(torchs.abs().max()))


@pytest.mark.parametrize(
    "case", ["few", "bfloat16", "float64", "three dimensions", "autocast", "reference", "few, compiled"]
)
def test_torch_runs_where_no_kernel_applies(case, products, monkeypatch):
    x, weight, bias = (t.detach() for t in tensors(*LARGE))
    function = linear
    if case.startswith("few"):
        x = x[:8]
    elif case in ("bfloat16", "float64"):
        x, weight, bias = (t.to(getattr(torch, case)) for t in (x, weight, bias))
    elif case == "three dimensions":
        x = x[None]
    elif case == "reference":
        monkeypatch.setenv("GANVAS_BACKEND", "reference")
    if case == "few, compiled":
        torch._dynamo.reset()
        function = torch.compile(linear, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        expected = F.linear(x, weight, bias)
        assert torch.equal(function(x, weight, bias), expected)
    assert products == []


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_in_a_graph_it_is_an_operator_of_the_same_products(products, backend, has_bias):
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        function = torch.compile(linear, backend=backend, fullgraph=True) if compiled else linear
        x, weight, bias = tensors(*LARGE)
        output = function(x, weight, bias if has_bias else None)
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(0)))
        found.append([output.detach(), x.grad, weight.grad, *([bias.grad] if has_bias else [])])
    assert len(products) == 6
    assert products[:3] == products[3:]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("rows", [LARGE[0], 3])
def test_torch_agrees_on_what_the_operators_return(rows):
    x, weight, bias = tensors(rows, *LARGE[1:])
    torch.library.opcheck(torch.ops.ganvas.linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.ganvas.linear.default, (x, weight.detach(), None))
    for wants in ((True, True), (False, True), (True, False)):
        arguments = (torch.randn(rows, LARGE[2]), x.detach(), weight.detach(), *wants)
        opcheck_without_gradients(torch.ops.ganvas.linear_backward.default, arguments)


def test_an_exported_program_has_the_products_and_second_derivatives(products):
    x, weight, bias = (t.detach() for t in tensors(*LARGE))
    layer = FusedSequential(nn.Linear(*LARGE[1:]))
    layer.load_state_dict({"0.weight": weight, "0.bias": bias})
    program = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x), layer(x))
    assert products == [LARGE, LARGE]
    results = []
    for function in (linear, torch.ops.ganvas.linear):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf, weight, bias).square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3 * float(results[0].abs().max()))


def test_shapes_that_do_not_fit_have_torchs_message():
    x, weight, bias = tensors(*LARGE)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear(x[:, :-1], weight, bias)


def test_fused_sequential_runs_its_linear_layers_natively_unless_hooked(products):
    torch.manual_seed(0)
    model = FusedSequential(nn.Linear(160, 128), nn.BatchNorm1d(128), nn.LeakyReLU(0.2), nn.Linear(128, 256))
    plain = nn.Sequential(*model)
    x = torch.randn(256, 160)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    assert [p[1:] for p in products] == [(160, 128), (128, 256)]
    model[0].register_forward_hook(lambda *_: None)
    model(x)
    assert len(products) == 3


def test_native_product_refuses_what_it_would_misread():
    a = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="a must have a stride of 1; got 2 and 8"):
        native.matrix_product(2, 2, 2, a.data_ptr(), (2, 8), a.data_ptr(), (4, 1), 0, a.data_ptr(), 1)
    with pytest.raises(ValueError, match="sizes must be positive; got 0x2"):
        native.matrix_product(0, 2, 2, a.data_ptr(), (4, 1), a.data_ptr(), (4, 1), 0, a.data_ptr(), 1)
    with pytest.raises(ValueError, match="c must not be null"):
        native.matrix_product(2, 2, 2, a.data_ptr(), (4, 1), a.data_ptr(), (4, 1), 0, 0, 1)
