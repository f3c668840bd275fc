"""The public operations on a GPU: what tests/ops asks of them beyond accuracy, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ganvas.ops import batch_norm_leaky_relu, conv_bn_leaky_relu, discriminator_loss, explain, generator_loss
from ganvas.ops.backends import triton

pytestmark = pytest.mark.gpu
DEVICE, KERNELS = "cuda", "cuda"
OTHER_DEVICE = "cpu"
ORDERS = ["conv_bn_act", "conv_act_bn"]


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch):
    reason = triton.can_run("conv_bn_leaky_relu", torch.empty(1, device=DEVICE))
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.delenv("GANVAS_BACKEND", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def pixels(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def moved(running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor]:
    return running_mean.clone(), running_var.clone()


CONVOLUTIONS = {
    "3x3": ({"padding": 1}, (24, 16, 3, 3)),
    "strided": ({"stride": 2, "padding": 1}, (24, 16, 4, 4)),
    "1x1": ({}, (40, 16, 1, 1)),
    "uneven": ({"stride": (2, 1), "padding": (2, 0), "dilation": (1, 2)}, (8, 16, 5, 3)),
    "grouped": ({"padding": 1, "groups": 2}, (24, 8, 3, 3)),
}


@pytest.mark.parametrize("backend", [KERNELS, "triton", None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_layer_is_the_composition_of_its_parts(kind, order, training, backend):
    options, shape = CONVOLUTIONS[kind]
    if backend == "triton" and kind == "grouped":
        pytest.skip("Triton's convolutions take no groups")
    torch.manual_seed(0)
    leaves = [pixels(6, 16, 15, 13), normal(*shape) / 12, normal(shape[0]), normal(shape[0]), normal(shape[0])]
    running = normal(shape[0]), normal(shape[0]).abs() + 0.5
    results = []
    for asked in (backend, "reference"):
        x, weight, bias, gamma, beta = given = [leaf.clone().requires_grad_() for leaf in leaves]
        statistics = moved(*running)
        output = conv_bn_leaky_relu(
            x, weight, bias, gamma, beta, *statistics, training=training, negative_slope=0.2, order=order,
            statistics_groups=2 if training else 1, backend=asked, **options,
        )  # fmt: skip
        grads = torch.autograd.grad(output.square().mean(), given)
        results.append([output, *grads, *statistics])
    for ours, torchs in zip(*results):
        assert (ours - torchs).norm() <= 1e-3 * torchs.norm() + 1e-4  # a flip of the kink moves single values


@pytest.mark.parametrize("backend", [KERNELS, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_a_norms_gradients_of_second_order_equal_the_reference(order, training, backend):
    torch.manual_seed(0)
    leaves, running = [pixels(6, 5, 4, 3), normal(5), normal(5)], (normal(5), normal(5).abs() + 0.5)

    def curvature(asked: str | None) -> tuple[Tensor, ...]:
        given = [leaf.clone(memory_format=torch.preserve_format).requires_grad_() for leaf in leaves]
        output = batch_norm_leaky_relu(*given, *moved(*running), training=training, order=order, backend=asked)
        grads = torch.autograd.grad(output.pow(3).sum(), given, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), given)

    torch.testing.assert_close(curvature(backend), curvature("reference"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", [KERNELS, "triton", None])
def test_a_penalty_on_a_layers_gradient_equals_the_references(backend):
    """As R1 has it."""
    torch.manual_seed(0)
    images, weight = pixels(6, 16, 8, 8), normal(24, 16, 3, 3) / 12

    def penalty(asked: str | None) -> list[Tensor]:
        x, w = images.clone().requires_grad_(), weight.clone().requires_grad_()
        output = conv_bn_leaky_relu(x, w, *[None] * 5, padding=1, training=True, negative_slope=0.2, backend=asked)
        (grad,) = torch.autograd.grad(output.pow(2).sum(), x, create_graph=True)
        value = grad.square().sum((1, 2, 3)).mean()
        return [value.detach(), *torch.autograd.grad(value, (x, w))]

    for ours, torchs in zip(penalty(backend), penalty("reference")):
        assert (ours - torchs).norm() <= 1e-3 * torchs.norm() + 1e-4


@pytest.mark.parametrize("residual", [False, True])
def test_any_strides_give_the_same_numbers(residual):
    torch.manual_seed(0)
    x, weight, bias, added = pixels(4, 6, 5, 3), normal(6), normal(6), pixels(4, 6, 5, 3) if residual else None

    def step(x: Tensor, added: Tensor | None, grad: Tensor) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias, added) if leaf is not None]
        given = iter(leaves)
        output = batch_norm_leaky_relu(
            next(given), next(given), next(given), None, None, training=True, residual=next(given, None),
            backend=KERNELS,
        )  # fmt: skip
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    grad = pixels(4, 6, 5, 3)
    expected = step(x, added, grad)
    for layout in (
        lambda t: t.contiguous(),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        results = step(*(None if t is None else layout(t) for t in (x, added, grad)))
        for ours, theirs in zip(results, expected):
            torch.testing.assert_close(ours, theirs)


def test_parameters_may_be_of_another_dtype_than_the_input():
    x, weight, bias = pixels(4, 6, 5, 3, dtype=torch.bfloat16), normal(6).double(), normal(6).bfloat16()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    output = batch_norm_leaky_relu(*leaves, None, None, training=True, backend=KERNELS)
    grads = torch.autograd.grad(output.sum(), leaves)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float64, torch.bfloat16]


def test_running_statistics_that_the_kernel_cannot_reach_move_all_the_same():
    x = pixels(4, 6, 5, 3)
    mean, var = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
    of_double = mean.double(), var.double()
    for statistics in ((mean, var), of_double):
        batch_norm_leaky_relu(x, None, None, *statistics, training=True, statistics_groups=2, backend=KERNELS)
    torch.testing.assert_close(of_double, (mean.double(), var.double()), rtol=1e-5, atol=1e-6)
    assert mean._version > 0


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (0, 6)])
def test_an_empty_batch_is_what_torch_makes_of_it(shape):
    x = torch.empty(shape, device=DEVICE)
    running = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
    assert batch_norm_leaky_relu(x, None, None, *running, backend=KERNELS).shape == shape
    if len(shape) == 4:
        weight = normal(5, 6, 3, 3)
        assert conv_bn_leaky_relu(x, weight, None, None, None, normal(5), normal(5).abs()).shape == (0, 5, 2, 2)


def test_sequences_and_float64_are_torchs_and_cannot_be_asked_for():
    sequences, doubles = normal(4, 6, 5), pixels(4, 6, 5, 3).double()
    for x, reason in ((sequences, "no channels-last layout"), (doubles, "got torch.float64")):
        output = batch_norm_leaky_relu(x, None, None, None, None, training=True)
        expected = F.leaky_relu(F.batch_norm(x, None, None, training=True), 0.01)
        torch.testing.assert_close(output, expected)
        assert reason in explain("batch_norm_leaky_relu", x)[KERNELS]
        with pytest.raises(ValueError, match=f"backend='{KERNELS}' cannot run batch_norm_leaky_relu: .*{reason}"):
            batch_norm_leaky_relu(x, None, None, None, None, training=True, backend=KERNELS)


def test_what_lies_on_another_device_is_named():
    x, weight, elsewhere = pixels(2, 4, 6, 6), normal(8, 4, 3, 3), {"device": OTHER_DEVICE}
    cases = {
        "weight": lambda: conv_bn_leaky_relu(x, weight.to(OTHER_DEVICE), *[None] * 5, training=True),
        "bias": lambda: conv_bn_leaky_relu(x, weight, torch.ones(8, **elsewhere), *[None] * 4, training=True),
        "bn_weight": lambda: batch_norm_leaky_relu(x, torch.ones(4, **elsewhere), *[None] * 3, training=True),
        "running_mean": lambda: batch_norm_leaky_relu(
            x, None, None, torch.zeros(4, **elsewhere), torch.ones(4, device=DEVICE), training=True
        ),
        "residual": lambda: batch_norm_leaky_relu(x, *[None] * 4, training=True, residual=x.to(OTHER_DEVICE)),
        "fake_logits": lambda: discriminator_loss(normal(4), torch.ones(4, **elsewhere)),
    }
    for name, call in cases.items():
        with pytest.raises(ValueError, match=rf"{name} must be on .* device {DEVICE}(:0)?; got {OTHER_DEVICE}"):
            call()


def test_the_kernels_of_another_device_cannot_be_asked_for():
    with pytest.raises(ValueError, match=f"backend='{OTHER_DEVICE}' cannot run generator_loss: "):
        generator_loss(normal(4), backend=OTHER_DEVICE)


def test_function_transforms_run_as_plain_torch():
    x = pixels(4, 6, 5, 3)

    def loss(x: Tensor) -> Tensor:
        return batch_norm_leaky_relu(x, *[None] * 4, training=True).pow(2).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", [KERNELS, None])
def test_a_compiled_step_equals_the_eager_one(backend):
    torch._dynamo.reset()
    weight, bias = normal(6), normal(6)
    running = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)

    def step(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        output = batch_norm_leaky_relu(x, weight, bias, mean, var, training=True, negative_slope=0.2, backend=backend)
        return output.square().mean()

    x, results = pixels(4, 6, 5, 3), []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaves = [leaf.clone(memory_format=torch.preserve_format).requires_grad_() for leaf in (x, weight, bias)]
        statistics = moved(*running)
        loss = function(*leaves, *statistics)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves), *statistics])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_an_operation_works_in_inference_mode_and_leaves_its_input():
    x = pixels(4, 6, 5, 3)
    before = copy.deepcopy(x)
    with torch.inference_mode():
        output = batch_norm_leaky_relu(x, *[None] * 4, training=True, backend=KERNELS)
        loss = generator_loss(normal(5), backend=KERNELS)
    assert output.is_inference()
    assert loss.isfinite()
    assert torch.equal(x, before)
