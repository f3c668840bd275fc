"""The fused BatchNorm + LeakyReLU against its float64 formula, beside torch's own kernels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ganvas.ops import batch_norm_leaky_relu
from ganvas.ops.backends import reference

ORDERS = ("conv_bn_act", "conv_act_bn")


def formula(x, weight, bias, mask, *, eps, negative_slope, order, groups, mean=None, var=None):
    """In float64 and with the kink decided by ``mask``: one sign flip near zero moves gradients in any library."""

    def normalise(group):
        axes = [0, *range(2, group.dim())]
        shape = [1, -1] + [1] * (group.dim() - 2)
        m = group.mean(axes, keepdim=True) if mean is None else mean.view(shape)
        v = group.var(axes, keepdim=True, unbiased=False) if var is None else var.view(shape)
        return (group - m) / (v + eps).sqrt() * weight.view(shape) + bias.view(shape)

    def activate(value):
        return torch.where(mask, value, negative_slope * value)

    x = activate(x) if order == "conv_act_bn" else x
    out = torch.cat([normalise(part) for part in x.chunk(groups)])
    return activate(out) if order == "conv_bn_act" else out


def forward_and_gradients(function, inputs, grad_output):
    inputs = [value.detach().clone(memory_format=torch.preserve_format).requires_grad_() for value in inputs]
    output = function(*inputs)
    output.backward(grad_output.to(output.dtype))
    return [output.detach(), *(value.grad for value in inputs)]


def magnitudes(x, weight, grad_output, running, *, training, groups, eps):
    """How large the terms are of which the gradients are sums that may cancel.

    Those of the weight's are products of numbers that are rounded themselves: once more as much. Of two terms torch may
    by chance have rounded neither.
    """
    axes = [0, *range(2, x.dim())]
    mean, var = (None, None) if training else (value.double() for value in running)
    ones = torch.ones(x.shape[1], dtype=torch.float64)
    options = {"eps": eps, "negative_slope": 1.0, "order": "conv_bn_act", "groups": groups if training else 1}
    x = x.double().requires_grad_()
    normalised = formula(x, ones, 0 * ones, x > 0, mean=mean, var=var, **options)
    grad = grad_output.double().abs()
    scale = (weight.double().abs() * (1.0 if training else (var + eps).rsqrt())).view(-1, *[1] * (x.dim() - 2))
    if training:
        scale = scale / x.detach().var(axes, keepdim=True, unbiased=False).add(eps).sqrt()
    return {
        "grad_input": scale * (grad + normalised.detach().abs()),
        "grad_weight": 2 * (grad * normalised.detach().abs()).sum(axes),
        "grad_bias": grad.sum(axes),
    }


def compare_with_torch(accuracy, x, *, training=True, groups=1, negative_slope=0.2, order="conv_bn_act", eps=1e-5):
    channels = x.shape[1]
    weight, bias = torch.randn(channels), torch.randn(channels)
    running = (torch.randn(channels), torch.rand(channels) + 0.5)
    grad_output = torch.randn(x.shape)
    options = {
        "training": training, "momentum": 0.3, "eps": eps, "negative_slope": negative_slope, "order": order,
        "statistics_groups": groups,
    }  # fmt: skip
    results, runnings = {}, {}
    for name, function in (("ours", batch_norm_leaky_relu), ("torch", reference.batch_norm_leaky_relu)):
        runnings[name] = copy.deepcopy(running)
        backend = {"backend": "cpu"} if name == "ours" else {}
        results[name] = forward_and_gradients(
            lambda *args, f=function, n=name, b=backend: f(*args, *runnings[n], **options, **b),
            (x, weight, bias),
            grad_output,
        )
    exact = {}
    for name, result in results.items():
        mask = (result[0] if order == "conv_bn_act" else x) > 0
        statistics = {} if training else {"mean": running[0].double(), "var": running[1].double()}
        exact[name] = forward_and_gradients(
            lambda *args, m=mask, s=statistics: formula(
                *args, m, eps=eps, negative_slope=negative_slope, order=order, groups=groups if training else 1, **s
            ),
            (x.double(), weight.double(), bias.double()),
            grad_output.to(x.dtype).double(),
        )
    terms = magnitudes(x, weight, grad_output, running, training=training, groups=groups, eps=eps)
    for i, name in enumerate(("output", "grad_input", "grad_weight", "grad_bias")):
        factor = 2.0 if name == "output" else 3.0
        ours, theirs = results["ours"][i], results["torch"][i]
        accuracy.check(name, ours, exact["ours"][i], theirs, exact["torch"][i], factor, terms.get(name))
    exact_running = [value.double() for value in running]
    reference.batch_norm_leaky_relu(x.double(), None, None, *exact_running, **options)
    accuracy.check_running(running, runnings["ours"], runnings["torch"], exact_running, groups)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 5),
    channels=st.sampled_from([1, 2, 3, 7, 16, 33, 64, 65, 130]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    groups=st.sampled_from([1, 2]),
    order=st.sampled_from(ORDERS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    negative_slope=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    training=st.booleans(),
    mean=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 2**31),
)
@example(
    batch=2, channels=1, height=1, width=1, groups=1, order="conv_act_bn", dtype=torch.float32, negative_slope=0.01,
    training=True, mean=0.0, seed=1,
)  # fmt: skip
def test_random_shapes_are_as_accurate_as_torch(
    accuracy, batch, channels, height, width, groups, order, dtype, negative_slope, training, mean, seed
):
    torch.manual_seed(seed)
    # Two values per channel make x̂ = ±1 whatever x is, and its gradient pure cancellation in any library.
    if batch * height * width < 4:
        height += 3
    x = (torch.randn(batch * groups, channels, height, width) + mean).to(dtype)
    compare_with_torch(
        accuracy, x.contiguous(memory_format=torch.channels_last), training=training, groups=groups,
        negative_slope=negative_slope, order=order,
    )  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 48, 33, 31), (128, 100), (16, 1024, 2, 2), (33, 3, 64, 64)])
def test_larger_shapes_on_several_threads_are_as_accurate_as_torch(accuracy, shape, dtype, order):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    compare_with_torch(accuracy, x, order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_results_larger_than_the_cache_are_streamed_without_a_hole(accuracy, order):
    torch.manual_seed(0)
    compare_with_torch(accuracy, torch.randn(19, 67, 97, 67).contiguous(memory_format=torch.channels_last), order=order)


def test_statistics_survive_a_mean_far_from_zero(accuracy):
    torch.manual_seed(0)
    x = (torch.randn(32, 24, 8, 8) + 1000.0).contiguous(memory_format=torch.channels_last)
    mean, var = torch.zeros(24), torch.zeros(24)
    batch_norm_leaky_relu(x, None, None, mean, var, training=True, momentum=1.0, backend="cpu")
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_statistics_groups_equal_one_call_per_group(order):
    torch.manual_seed(0)
    x = torch.randn(6, 20, 5, 5).contiguous(memory_format=torch.channels_last)
    together, apart = (torch.zeros(20), torch.ones(20)), (torch.zeros(20), torch.ones(20))
    weight, bias = torch.randn(20), torch.randn(20)
    options = {"training": True, "order": order, "backend": "cpu"}
    joined = batch_norm_leaky_relu(x, weight, bias, *together, statistics_groups=3, **options)
    parts = [batch_norm_leaky_relu(part, weight, bias, *apart, **options) for part in x.chunk(3)]
    torch.testing.assert_close(joined, torch.cat(parts), rtol=0, atol=0)
    torch.testing.assert_close(together, apart, rtol=0, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_second_order_equal_the_reference(order, training, memory_format):
    torch.manual_seed(0)
    base = torch.randn(4, 6, 3, 3).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(6), torch.randn(6)
    running = (torch.randn(6), torch.rand(6) + 0.5)
    penalties = []
    for backend in ("cpu", "reference"):
        inputs = [base.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        out = batch_norm_leaky_relu(
            *inputs, *(r.clone() for r in running), training=training, order=order, negative_slope=0.2, backend=backend
        )
        (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), inputs, allow_unused=True))
    for ours, theirs in zip(*penalties):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("training", [True, False])
def test_float64_passes_gradcheck_to_second_order(order, training):
    torch.manual_seed(0)
    x = torch.randn(4, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        running = (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
        return batch_norm_leaky_relu(
            x, weight, bias, *running, training=training, order=order, negative_slope=0.3, statistics_groups=2
        )

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias), fast_mode=True)


def test_nan_stays_in_its_channel_and_group():
    x = torch.randn(8, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    x[0, 3, 1, 1] = float("nan")
    ours = batch_norm_leaky_relu(x, None, None, None, None, training=True, statistics_groups=2, backend="cpu")
    theirs = batch_norm_leaky_relu(x, None, None, None, None, training=True, statistics_groups=2, backend="reference")
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours[:4, 3].isnan().all()
    assert not ours[4:].isnan().any()


def test_infinity_turns_its_channel_to_nan_as_in_torch():
    x = torch.randn(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    x[1, 2, 0, 0] = float("inf")
    ours = batch_norm_leaky_relu(x, None, None, None, None, training=True, backend="cpu")
    theirs = batch_norm_leaky_relu(x, None, None, None, None, training=True, backend="reference")
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours[:, 2].isnan().all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("bad", "negative_slope"), [("nan", 0.2), ("inf", 0.0), ("inf", 0.2), ("-inf", 0.0), ("-inf", 0.2)]
)
def test_fixed_statistics_keep_a_bad_value_to_itself(order, bad, negative_slope):
    x = torch.randn(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    x[1, 2, 0, 0] = float(bad)
    results = []
    for backend in ("cpu", "reference"):
        leaf = x.clone().requires_grad_()
        options = {"order": order, "negative_slope": negative_slope, "backend": backend}
        out = batch_norm_leaky_relu(leaf, None, None, torch.zeros(8), torch.ones(8), **options)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), leaf)))
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("training", [True, False])
def test_same_input_gives_the_same_bits(training):
    x = torch.randn(16, 40, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(40, requires_grad=True)

    def run():
        running = torch.zeros(40), torch.ones(40)
        out = batch_norm_leaky_relu(x, weight, None, *running, training=training, backend="cpu")
        return (out, *torch.autograd.grad(out.square().sum(), (x, weight)))

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)


def _layouts() -> dict[str, Tensor]:
    x = torch.randn(4, 12, 6, 5)
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "every second image": torch.randn(8, 12, 6, 5)[::2],
        "channels sliced": torch.randn(4, 20, 6, 5).contiguous(memory_format=torch.channels_last)[:, 3:15],
        "transposed": torch.randn(4, 12, 5, 6).transpose(2, 3),
        "offset": torch.randn(4 * 12 * 30 + 1)[1:].view(4, 12, 6, 5),
        "expanded": torch.randn(1, 12, 6, 5).expand(4, 12, 6, 5),
    }


@pytest.mark.parametrize("layout", _layouts())
def test_any_strides_give_the_same_numbers(layout):
    x = _layouts()[layout].detach()
    ours = x.clone(memory_format=torch.preserve_format).requires_grad_() if layout != "expanded" else x.requires_grad_()
    theirs = x.detach().contiguous().requires_grad_()
    grad = torch.randn(x.shape)
    out = batch_norm_leaky_relu(ours, None, None, None, None, training=True, backend="cpu")
    expected = batch_norm_leaky_relu(theirs, None, None, None, None, training=True, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(out, ours, grad)[0], torch.autograd.grad(expected, theirs, grad)[0], rtol=1e-3, atol=1e-5
    )


def test_parameters_may_be_of_another_dtype_than_a_bfloat16_input():
    x = torch.randn(8, 6, 4, 4).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.rand(6).to(dtype).requires_grad_()
        running = torch.zeros(6, dtype=dtype), torch.ones(6, dtype=dtype)
        out = batch_norm_leaky_relu(x, weight, None, *running, training=True, backend="cpu")
        out.sum().backward()
        assert out.dtype is torch.bfloat16
        assert weight.grad is not None
        assert weight.grad.dtype is dtype
        torch.testing.assert_close(running[0].float(), 0.1 * x.float().mean((0, 2, 3)), rtol=0.02, atol=1e-3)


def test_changing_the_running_statistics_is_visible_to_autograd():
    mean, var = torch.zeros(3), torch.ones(3)
    before = mean._version, var._version
    batch_norm_leaky_relu(torch.randn(4, 3, 2, 2), None, None, mean, var, training=True, backend="cpu")
    assert mean._version > before[0]
    assert var._version > before[1]


def test_input_changed_between_forward_and_backward_is_torchs_own_error():
    x = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    leaf = x.clone().requires_grad_()
    y = leaf * 1.0
    out = batch_norm_leaky_relu(y, None, None, None, None, training=True, backend="cpu")
    y.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_empty_batch_is_what_torch_makes_of_it():
    running = torch.zeros(3), torch.ones(3)
    out = batch_norm_leaky_relu(torch.empty(0, 3, 4, 4), None, None, *running, training=False)
    assert out.shape == (0, 3, 4, 4)
    theirs = F.batch_norm(torch.empty(0, 3, 4, 4), None, None, training=True)
    assert batch_norm_leaky_relu(torch.empty(0, 3, 4, 4), None, None, None, None, training=True).shape == theirs.shape


GOOD = {"input": torch.randn(4, 3, 2, 2), "weight": None, "bias": None, "running_mean": None, "running_var": None}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": torch.zeros(4, 3, 2, 2, dtype=torch.int32)}, TypeError, "input must be of a floating-point dtype"),
        ({"input": [1.0]}, TypeError, "input must be a torch.Tensor; got list"),
        ({"input": torch.zeros(4)}, ValueError, r"input must have shape .* got \(4,\)"),
        ({"weight": torch.ones(4)}, ValueError, r"bn_weight must have shape \(3,\).* got \(4,\)"),
        ({"bias": torch.ones(3, device="meta")}, ValueError, "bn_bias must be on the input's device cpu; got meta"),
        ({"running_mean": torch.ones(3)}, ValueError, "go together"),
        ({"training": False}, ValueError, "required when training=False"),
        ({"order": "bn_conv"}, ValueError, "order must be 'conv_bn_act' or 'conv_act_bn'; got 'bn_conv'"),
        ({"eps": -1.0}, ValueError, "eps must be >= 0; got -1.0"),
        ({"statistics_groups": 3}, ValueError, "statistics_groups must divide the batch of 4; got 3"),
        ({"statistics_groups": 0}, ValueError, "statistics_groups must be at least 1; got 0"),
        ({"input": torch.randn(1, 3, 1, 1)}, ValueError, "more than 1 value per channel"),
        ({"backend": "tpu"}, ValueError, "backend must be one of cpu, triton, cuda, reference; got 'tpu'"),
        ({"input": GOOD["input"].double(), "backend": "cpu"}, ValueError, r"cannot run .*got torch\.float64"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {**GOOD, "training": True, **changes}
    with pytest.raises(error, match=message):
        batch_norm_leaky_relu(**arguments)


def test_function_transforms_and_forward_mode_run_as_plain_torch():
    x, tangent = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)

    def function(x):
        return batch_norm_leaky_relu(x, None, None, None, None, training=True).square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(function)(x), expected)
    _, derivative = torch.func.jvp(function, (x,), (tangent,))
    torch.testing.assert_close(derivative, (expected * tangent).sum(), rtol=1e-3, atol=1e-4)
