"""The fused BatchNorm + residual + LeakyReLU against its float64 formula, beside torch's own kernels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ganvas.ops import batch_norm_leaky_relu
from ganvas.ops.backends import reference


def channels_last(*shape: int) -> Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def formula(x, weight, bias, residual, mask, *, eps, negative_slope, groups, mean=None, var=None):
    """In float64 and with the kink decided by ``mask``: one sign flip near zero moves gradients in any library."""

    def normalise(group):
        axes, shape = [0, *range(2, group.dim())], [1, -1] + [1] * (group.dim() - 2)
        m = group.mean(axes, keepdim=True) if mean is None else mean.view(shape)
        v = group.var(axes, keepdim=True, unbiased=False) if var is None else var.view(shape)
        return (group - m) / (v + eps).sqrt() * weight.view(shape) + bias.view(shape)

    sums = torch.cat([normalise(part) for part in x.chunk(groups)]) + residual
    return torch.where(mask, sums, negative_slope * sums)


def forward_and_gradients(function, inputs, grad_output):
    inputs = [value.detach().clone(memory_format=torch.preserve_format).requires_grad_() for value in inputs]
    output = function(*inputs)
    output.backward(grad_output.to(output.dtype))
    return [output.detach(), *(value.grad for value in inputs)]


def compare_with_torch(accuracy, x, *, training=True, groups=1, negative_slope=0.2, eps=1e-5):
    channels = x.shape[1]
    inputs = (x, torch.randn(channels), torch.randn(channels), torch.randn(x.shape).to(x.dtype))
    running = (torch.randn(channels), torch.rand(channels) + 0.5)
    grad_output = torch.randn(x.shape)
    options = {
        "training": training, "momentum": 0.3, "eps": eps, "negative_slope": negative_slope, "order": "conv_bn_act",
        "statistics_groups": groups,
    }  # fmt: skip
    results, exact, runnings = {}, {}, {}
    for name, function in (("ours", batch_norm_leaky_relu), ("torch", reference.batch_norm_leaky_relu)):
        runnings[name] = copy.deepcopy(running)
        backend = {"backend": "cpu"} if name == "ours" else {}
        results[name] = forward_and_gradients(
            lambda x, weight, bias, residual, f=function, n=name, b=backend: f(
                x, weight, bias, *runnings[n], residual=residual, **options, **b
            ),
            inputs,
            grad_output,
        )
        statistics = {} if training else {"mean": running[0].double(), "var": running[1].double()}
        exact[name] = forward_and_gradients(
            lambda *args, mask=results[name][0] > 0, s=statistics: formula(
                *args, mask, eps=eps, negative_slope=negative_slope, groups=groups if training else 1, **s
            ),
            [value.double() for value in inputs],
            grad_output.to(x.dtype).double(),
        )
    # How large the terms are of which the results are sums that may cancel.
    axes = [0, *range(2, x.dim())]
    var = x.double().var(axes, unbiased=False) if training else running[1].double()
    mean = x.double().mean(axes) if training else running[0].double()
    shape = [1, -1] + [1] * (x.dim() - 2)
    normalised = ((x.double() - mean.view(shape)) / (var + eps).sqrt().view(shape)).abs()
    grad = grad_output.double().abs()
    weight, bias, residual = (value.double().abs() for value in inputs[1:])
    terms = {
        "output": weight.view(shape) * normalised + bias.view(shape) + residual,
        "grad_input": (weight / (var + eps).sqrt()).view(shape) * (grad + normalised),
        "grad_weight": (grad * normalised).sum(axes),
        "grad_bias": grad.sum(axes),
    }
    for i, name in enumerate(("output", "grad_input", "grad_weight", "grad_bias", "grad_residual")):
        factor = 2.0 if name == "output" else 3.0
        ours, theirs = results["ours"][i], results["torch"][i]
        accuracy.check(name, ours, exact["ours"][i], theirs, exact["torch"][i], factor, terms.get(name))
    exact_running = [value.double() for value in running]
    reference.batch_norm_leaky_relu(x.double(), None, None, *exact_running, **options)
    accuracy.check_running(running, runnings["ours"], runnings["torch"], exact_running, groups)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 5),
    channels=st.sampled_from([1, 2, 3, 7, 16, 33, 64, 65, 130]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    groups=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    negative_slope=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    training=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_shapes_are_as_accurate_as_torch(
    accuracy, batch, channels, height, width, groups, dtype, negative_slope, training, seed
):
    torch.manual_seed(seed)
    # Two values per channel make x̂ = ±1 whatever x is, and its gradient pure cancellation in any library.
    if batch * height * width < 4:
        height += 3
    x = channels_last(batch * groups, channels, height, width).to(dtype)
    compare_with_torch(accuracy, x, training=training, groups=groups, negative_slope=negative_slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 48, 33, 31), (128, 100), (16, 1024, 2, 2), (33, 3, 64, 64)])
def test_larger_shapes_on_several_threads_are_as_accurate_as_torch(accuracy, shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape) if len(shape) == 2 else channels_last(*shape)
    compare_with_torch(accuracy, x.to(dtype))


def test_results_larger_than_the_cache_are_streamed_without_a_hole(accuracy):
    torch.manual_seed(0)
    compare_with_torch(accuracy, channels_last(19, 67, 97, 67))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("negative_slope", [0.2, 1.0])
@pytest.mark.parametrize("make", [torch.randn, channels_last])
def test_gradients_of_second_order_equal_the_reference(training, negative_slope, make):
    torch.manual_seed(0)
    values = [make(4, 6, 3, 3), torch.randn(6), torch.randn(6), make(4, 6, 3, 3)]
    running = (torch.randn(6), torch.rand(6) + 0.5)
    penalties = []
    for backend in ("cpu", "reference"):
        x, weight, bias, residual = inputs = [value.clone().requires_grad_() for value in values]
        out = batch_norm_leaky_relu(
            x, weight, bias, *(r.clone() for r in running), training=training, negative_slope=negative_slope,
            residual=residual, backend=backend,
        )  # fmt: skip
        grads = torch.autograd.grad(out.square().sum(), (x, residual), create_graph=True)
        penalties.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs))
    for ours, theirs in zip(*penalties):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("training", [True, False])
def test_float64_passes_gradcheck_to_second_order(training):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 4, 2, 3, 2, dtype=torch.float64).requires_grad_().unbind()
    weight, bias = torch.randn(2, 2, dtype=torch.float64).requires_grad_().unbind()

    def function(x, weight, bias, residual):
        running = (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
        return batch_norm_leaky_relu(
            x, weight, bias, *running, training=training, negative_slope=0.3, statistics_groups=2, residual=residual
        )

    assert torch.autograd.gradcheck(function, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, residual), fast_mode=True)


def test_statistics_groups_equal_one_call_per_group():
    torch.manual_seed(0)
    x, residual = channels_last(6, 20, 5, 5), channels_last(6, 20, 5, 5)
    together, apart = (torch.zeros(20), torch.ones(20)), (torch.zeros(20), torch.ones(20))
    options = {"training": True, "backend": "cpu"}
    joined = batch_norm_leaky_relu(x, None, None, *together, statistics_groups=3, residual=residual, **options)
    parts = [
        batch_norm_leaky_relu(part, None, None, *apart, residual=other, **options)
        for part, other in zip(x.chunk(3), residual.chunk(3))
    ]
    torch.testing.assert_close(joined, torch.cat(parts), rtol=0, atol=0)
    torch.testing.assert_close(together, apart, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("negative_slope", [0.0, 1.0])
def test_same_input_gives_the_same_bits(training, negative_slope):
    x, residual = (channels_last(16, 40, 9, 9).requires_grad_() for _ in range(2))
    weight = torch.randn(40, requires_grad=True)

    def run():
        out = batch_norm_leaky_relu(
            x, weight, None, torch.zeros(40), torch.ones(40), training=training, negative_slope=negative_slope,
            residual=residual, backend="cpu",
        )  # fmt: skip
        return (out, *torch.autograd.grad(out.square().sum(), (x, weight, residual)))

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)


@pytest.mark.parametrize("of_input", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_residual", ["contiguous", "channels_last", "expanded", "sliced"])
def test_any_strides_give_the_same_numbers(of_input, of_residual):
    layouts = {
        "contiguous": torch.randn(4, 12, 6, 5),
        "channels_last": channels_last(4, 12, 6, 5),
        "expanded": torch.randn(1, 12, 6, 5).expand(4, 12, 6, 5),
        "sliced": channels_last(4, 20, 6, 5)[:, 3:15],
    }
    x, grad = torch.randn(4, 12, 6, 5).contiguous(memory_format=of_input), torch.randn(4, 12, 6, 5)
    results = []
    for backend in ("cpu", "reference"):
        inputs = x.clone().requires_grad_(), layouts[of_residual].detach().requires_grad_()
        out = batch_norm_leaky_relu(
            inputs[0], None, None, None, None, training=True, residual=inputs[1], backend=backend
        )
        results.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("negative_slope", "tensors"), [(0.0, 2), (0.2, 2), (1.0, 1)])
def test_input_and_output_are_kept_for_backward_and_the_residual_is_not(negative_slope, tensors):
    x, residual = (channels_last(4, 8, 9, 9).requires_grad_() for _ in range(2))
    kept = set()

    def remember(tensor):
        if tensor.numel() == x.numel():
            kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        batch_norm_leaky_relu(
            x, None, None, None, None, training=True, negative_slope=negative_slope, residual=residual, backend="cpu"
        )
    assert len(kept) == tensors
    assert residual.data_ptr() not in kept


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_what_is_not_differentiated_is_the_same(training, with_residual):
    x, residual = channels_last(4, 6, 3, 3), channels_last(4, 6, 3, 3) if with_residual else None
    weight = torch.rand(6, requires_grad=True)
    results = []
    for grad_enabled in (True, False):
        running = torch.zeros(6), torch.ones(6)
        with torch.set_grad_enabled(grad_enabled):
            out = batch_norm_leaky_relu(x, weight, None, *running, training=training, residual=residual, backend="cpu")
        assert out.requires_grad == grad_enabled
        results.append([out.detach(), *running])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_residual_may_change_after_it_was_added():
    x, residual = channels_last(4, 3, 2, 2).requires_grad_(), channels_last(4, 3, 2, 2)
    out = batch_norm_leaky_relu(x, None, None, None, None, training=True, residual=residual, backend="cpu")
    (expected,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
    residual.zero_()
    assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], expected)


def test_an_output_changed_before_backward_is_torchs_own_error():
    x, residual = (channels_last(4, 3, 2, 2).requires_grad_() for _ in range(2))
    out = batch_norm_leaky_relu(x, None, None, None, None, training=True, residual=residual, backend="cpu")
    loss = out.sum()
    out.detach().mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_one_gradient_alone(wanted):
    values = [channels_last(4, 3, 5, 5), torch.rand(3), torch.rand(3), channels_last(4, 3, 5, 5)]
    results = []
    for backend in ("cpu", "reference"):
        x, weight, bias, residual = inputs = [value.clone() for value in values]
        inputs[wanted].requires_grad_()
        out = batch_norm_leaky_relu(x, weight, bias, None, None, training=True, residual=residual, backend=backend)
        results.append(torch.autograd.grad(out.square().sum(), inputs[wanted]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_slope_below_zero_has_torchs_gradients():
    values = [channels_last(4, 3, 5, 5) for _ in range(2)]
    results = []
    for backend in ("cpu", "reference"):
        x, residual = (value.clone().requires_grad_() for value in values)
        out = batch_norm_leaky_relu(
            x, None, None, None, None, training=True, negative_slope=-0.5, residual=residual, backend=backend
        )
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), (x, residual))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("bad", "negative_slope"), [("nan", 0.2), ("inf", 0.0), ("inf", 0.2), ("-inf", 0.0), ("-inf", 0.2)]
)
def test_a_bad_value_in_the_residual_stays_its_own(bad, negative_slope):
    x, residual = channels_last(4, 8, 3, 3), channels_last(4, 8, 3, 3)
    residual[1, 2, 0, 0] = float(bad)
    results = []
    for backend in ("cpu", "reference"):
        leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
        out = batch_norm_leaky_relu(
            leaves[0], None, None, torch.zeros(8), torch.ones(8), negative_slope=negative_slope, residual=leaves[1],
            backend=backend,
        )  # fmt: skip
        results.append((out.detach(), *torch.autograd.grad(out.sum(), leaves)))
    torch.testing.assert_close(*results, equal_nan=True)


def test_empty_batch_is_what_torch_makes_of_it():
    x = torch.empty(0, 3, 4, 4)
    assert batch_norm_leaky_relu(x, None, None, torch.zeros(3), torch.ones(3), residual=x).shape == x.shape


X = torch.randn(4, 3, 2, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"residual": torch.ones(3, 1, 1)}, ValueError, r"residual must have the input's shape \(4, 3, 2, 2\); got"),
        ({"residual": X.double()}, TypeError, "residual must be of the input's dtype torch.float32; got torch.float64"),
        ({"residual": X.to("meta")}, ValueError, "residual must be on the input's device cpu; got meta"),
        ({"residual": 1.0}, TypeError, "residual must be a torch.Tensor; got float"),
        ({"residual": X, "order": "conv_act_bn"}, ValueError, "residual is added between norm and activation"),
    ],
)
def test_bad_residuals_are_named(changes, error, message):
    running = torch.zeros(3), torch.ones(3)
    with pytest.raises(error, match=message):
        batch_norm_leaky_relu(X, None, None, *running, training=True, **changes)
    assert not running[0].any(), "no statistics before the arguments are checked"


def test_compiled_step_equals_the_eager_one():
    torch._dynamo.reset()
    values = [channels_last(4, 6, 5, 5), torch.rand(6), torch.randn(6), channels_last(4, 6, 5, 5)]

    def step(x, weight, bias, residual, mean, var):
        return batch_norm_leaky_relu(
            x * 2, weight, bias, mean, var, training=True, statistics_groups=2, residual=residual * 2, backend="cpu"
        ).square().mean()  # fmt: skip

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        inputs = [value.clone().requires_grad_() for value in values]
        running = torch.zeros(6), torch.ones(6)
        loss = function(*inputs, *running)
        loss.backward()
        results.append([loss.detach(), *(value.grad for value in inputs), *running])
    torch.testing.assert_close(*results)


def test_function_transforms_and_forward_mode_run_as_plain_torch():
    x, residual, tangent = torch.randn(3, 4, 3, 2, 2).unbind()

    def function(residual):
        return batch_norm_leaky_relu(x, None, None, None, None, training=True, residual=residual).square().sum()

    leaf = residual.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(function)(residual), expected)
    _, derivative = torch.func.jvp(function, (residual,), (tangent,))
    torch.testing.assert_close(derivative, (expected * tangent).sum(), rtol=1e-3, atol=1e-4)


def test_the_reference_is_the_composition_of_torchs_functions():
    x, residual = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64).unbind()
    ours = batch_norm_leaky_relu(x, None, None, None, None, training=True, negative_slope=0.0, residual=residual)
    assert torch.equal(ours, F.relu(F.batch_norm(x, None, None, training=True) + residual))
