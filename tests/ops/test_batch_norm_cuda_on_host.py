"""The CUDA kernels of BatchNorm + LeakyReLU, run by the processor (``cuda_on_host/``), beside torch's own kernels.

The imagined GPU has three multiprocessors: a few tens of thousands of values take several blocks. What only a GPU shows
is in ``tests/gpu``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from kernels_on_host import DTYPES, FencedMemory, HostNative, check_arguments, compiled, needs_compiler, stand_in
from torch import Tensor

from ganvas.ops.backends import reference
from ganvas.ops.pending import Pending

pytest.importorskip("ganvas._native")

from ganvas.ops.backends.cuda import batch_norm_leaky_relu, pending, statistics

pytestmark = needs_compiler

FUNCTIONS = {
    "batch_norm_workspace_cuda": "Lillli",
    "batch_norm_leaky_relu_forward_cuda": "illlffiipppppppfppplip",
    "batch_norm_leaky_relu_backward_cuda": "illlffiipppppppppppplip",
    "batch_statistics_workspace_cuda": "Lillli",
    "batch_statistics_cuda": "illlffipppppfppppplip",
    "settle_pending_gradient_cuda": "illlffiippppppppip",
    "finish_statistics_workspace_cuda": "Llll",
    "finish_statistics_cuda": "lllpppppfppfppppplip",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_native_module_takes_the_same_arguments(name):
    check_arguments(name, FUNCTIONS[name])


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> HostNative:
    kernels = "batch_norm_forward", "batch_norm_backward", "statistics"
    folder = tmp_path_factory.mktemp("cuda_on_host")
    return HostNative(compiled(folder, "batch_norm_leaky_relu", *kernels), FUNCTIONS)


@pytest.fixture
def memory():
    fenced = FencedMemory()
    yield fenced
    fenced.check()


@pytest.fixture
def kernels(host, memory, monkeypatch) -> Any:
    return stand_in(monkeypatch, batch_norm_leaky_relu, host, memory)


@pytest.fixture
def of_batch(host, memory, monkeypatch) -> Any:
    return stand_in(monkeypatch, statistics, host, memory)


@pytest.fixture
def activations(kernels, host, memory, monkeypatch) -> Any:
    return stand_in(monkeypatch, pending, host, memory)


class Case(NamedTuple):
    """Of a normalisation: (N, C) or (N, C, H, W), and what is done with it."""

    shape: tuple[int, ...]
    groups: int = 1
    dtype: torch.dtype = torch.float32
    activation_first: bool = False
    with_residual: bool = False
    training: bool = True
    negative_slope: float = 0.2
    mean: float = 0.0
    affine: bool = True


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    grad: Tensor
    running_mean: Tensor
    running_var: Tensor


EPS, MOMENTUM = 1e-5, 0.3


def inputs_of(case: Case, seed: int = 0) -> Inputs:
    torch.manual_seed(seed)
    layout = torch.channels_last if len(case.shape) == 4 else torch.contiguous_format

    def values(mean: float = 0.0) -> Tensor:
        return (torch.randn(case.shape) + mean).to(case.dtype).contiguous(memory_format=layout)

    channels = case.shape[1]
    return Inputs(
        values(case.mean), *(torch.randn(2, channels) if case.affine else (None, None)),
        values() if case.with_residual else None, values(), torch.randn(channels), torch.rand(channels) + 0.5,
    )  # fmt: skip


RESULTS = ("output", "grad_input", "grad_weight", "grad_bias", "grad_residual")


def ours(kernels: Any, memory: FencedMemory, case: Case, inputs: Inputs) -> list[Tensor | None]:
    """RESULTS, then the moved running statistics."""
    x, weight, bias, residual, grad, *running = (None if t is None else memory.copy(t) for t in inputs)
    options, groups = (EPS, case.negative_slope), case.groups
    if residual is None:
        if case.training:
            output, mean, var = kernels.train(
                x, weight, bias, *options, case.activation_first, groups, *running, MOMENTUM
            )
        else:
            mean, var = running
            output = kernels.evaluate(x, weight, bias, mean, var, *options, case.activation_first)
        norm = (weight, bias, mean, var, case.training, *options)
        grads = (*kernels.backward(grad, x, *norm, case.activation_first, groups), None)
    else:
        if case.training:
            output, mean, var = kernels.add_train(x, weight, bias, residual, *options, groups, *running, MOMENTUM)
        else:
            mean, var = running
            output = kernels.add_evaluate(x, weight, bias, residual, mean, var, *options)
        grads = kernels.add_backward(grad, output, x, weight, bias, mean, var, case.training, *options, groups)
    return [output, *grads, *running]


def of_reference(case: Case, inputs: Inputs, dtype: torch.dtype | None = None, mask: Tensor | None = None) -> list:
    """The same by the reference; with ``mask`` the kink is where that has it: one sign flip moves gradients."""
    dtype = dtype or inputs.x.dtype
    parameters = torch.float64 if dtype is torch.float64 else torch.float32
    x, residual, grad = (None if t is None else t.to(dtype) for t in (inputs.x, inputs.residual, inputs.grad))
    weight, bias, *running = (
        None if t is None else t.clone().to(parameters)
        for t in (inputs.weight, inputs.bias, inputs.running_mean, inputs.running_var)
    )
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for t in (x, weight, bias, residual)
        if t is not None
    ]
    named = iter(leaves)
    x, weight, bias, residual = (None if t is None else next(named) for t in (x, weight, bias, residual))
    order = "conv_act_bn" if case.activation_first else "conv_bn_act"
    slope = case.negative_slope

    def kink(values: Tensor) -> Tensor:
        return torch.where(mask, values, slope * values)

    given = x if mask is None or not case.activation_first else kink(x)
    output = reference.batch_norm_leaky_relu(
        given, weight, bias, *running, training=case.training, momentum=MOMENTUM, eps=EPS,
        negative_slope=slope if mask is None else 1.0, order=order, residual=residual,
        statistics_groups=case.groups if case.training else 1,
    )  # fmt: skip
    if mask is not None and not case.activation_first:
        output = kink(output)
    found = dict(zip(map(id, leaves), torch.autograd.grad(output, leaves, grad)))
    grads = [None if t is None else found[id(t)] for t in (x, weight, bias, residual)]
    return [output.detach(), *grads, *running]


def terms_of(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """How large the terms are of which the results are sums that may cancel."""
    x, axes = inputs.x.double(), [0, *range(2, inputs.x.dim())]
    if case.activation_first:
        x = torch.where(x > 0, x, case.negative_slope * x)
    shape = [1, -1] + [1] * (x.dim() - 2)
    if case.training:
        parts = x.chunk(case.groups)
        mean = torch.cat([p.mean(axes, keepdim=True).expand_as(p) for p in parts])
        var = torch.cat([p.var(axes, unbiased=False, keepdim=True).expand_as(p) for p in parts])
    else:
        mean, var = (t.double().view(shape) for t in (inputs.running_mean, inputs.running_var))
    deviation = (var + EPS).sqrt()
    # The mean is kept in float32: no more of it can be told.
    normalised = (x - mean).abs() / deviation + mean.abs() * torch.finfo(torch.float32).eps / deviation
    grad = inputs.grad.double().abs() * max(1.0, abs(case.negative_slope))
    ones = torch.ones(x.shape[1], dtype=torch.float64)
    weight, bias = (ones if t is None else t.double().abs() for t in (inputs.weight, inputs.bias))
    output = weight.view(shape) * normalised + bias.view(shape)
    if inputs.residual is not None:
        output = output + inputs.residual.double().abs()
    return {
        "output": output,
        "grad_input": weight.view(shape) / deviation * (grad + normalised),
        "grad_weight": (grad * normalised).sum(axes),
        "grad_bias": grad.sum(axes),
    }


def compare_with_torch(accuracy, kernels, memory, case: Case, inputs: Inputs | None = None) -> None:
    inputs = inputs or inputs_of(case)
    results, torchs = ours(kernels, memory, case, inputs), of_reference(case, inputs)
    masks = [(inputs.x if case.activation_first else output) > 0 for output in (results[0], torchs[0])]
    if case.negative_slope < 0 and not case.activation_first:  # both sides of the kink are above 0
        unbent = of_reference(case._replace(negative_slope=1.0), inputs, torch.float64)[0]
        masks = [unbent > 0, unbent > 0]
    exact, torchs_exact = (of_reference(case, inputs, torch.float64, mask) for mask in masks)
    terms = terms_of(case, inputs)
    for i, name in enumerate((*RESULTS, "running_mean", "running_var")):
        if torchs[i] is None:
            continue
        assert results[i].dtype == torchs[i].dtype
        factor = 2.0 if name in ("output", "running_mean", "running_var") else 3.0
        size = (
            exact[i] * case.groups if "running" in name else terms.get(name)
        )  # a running statistic is rounded each time
        accuracy.check(name, results[i], exact[i], torchs[i], torchs_exact[i], factor, size)


# Channels that fill vectors of 16 bytes and such that do not, rows for one launch and for several, few and many.
SHAPES = [
    (2, 1),
    (5, 7),
    (33, 130),
    (4, 1, 65, 65),
    (2, 3, 5, 3),
    (10, 3, 25, 23),
    (3, 7, 4, 4),
    (30, 7, 21, 5),
    (2, 8, 3, 2),
    (40, 8, 10, 8),
    (11, 17, 13, 11),
    (12, 32, 12, 11),
    (13, 64, 9, 8),
    (6, 130, 3, 7),
    (3, 1033, 1, 2),
]


@pytest.mark.parametrize("activation_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_training_is_as_accurate_as_torch(accuracy, kernels, memory, shape, dtype, activation_first):
    compare_with_torch(accuracy, kernels, memory, Case(shape, dtype=dtype, activation_first=activation_first))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1::2])
@pytest.mark.parametrize("training", [True, False])
def test_with_a_residual_it_is_as_accurate_as_torch(accuracy, kernels, memory, shape, dtype, training):
    compare_with_torch(accuracy, kernels, memory, Case(shape, dtype=dtype, with_residual=True, training=training))


@pytest.mark.parametrize("activation_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[::2])
def test_fixed_statistics_are_as_accurate_as_torch(accuracy, kernels, memory, shape, dtype, activation_first):
    case = Case(shape, dtype=dtype, activation_first=activation_first, training=False)
    compare_with_torch(accuracy, kernels, memory, case)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((6, 5), 3), ((4, 3, 3, 3), 2), ((12, 8, 5, 5), 3), ((40, 8, 15, 11), 2), ((20, 130, 5, 3), 2)],
)
def test_groups_have_statistics_of_their_own(accuracy, kernels, memory, shape, groups, with_residual):
    compare_with_torch(accuracy, kernels, memory, Case(shape, groups, with_residual=with_residual))


@pytest.mark.parametrize("shape", [(9, 8, 3, 3), (40, 8, 15, 11)])
@pytest.mark.parametrize("activation_first", [False, True])
@pytest.mark.parametrize("negative_slope", [-0.5, 0.0, 1.0, 1.5])
def test_any_slope(accuracy, kernels, memory, shape, activation_first, negative_slope):
    case = Case(shape, activation_first=activation_first, negative_slope=negative_slope)
    compare_with_torch(accuracy, kernels, memory, case)


@pytest.mark.parametrize("shape", [(9, 8, 3, 3), (40, 8, 15, 11)])
@pytest.mark.parametrize("negative_slope", [0.0, 1.0])
def test_any_slope_with_a_residual(accuracy, kernels, memory, shape, negative_slope):
    compare_with_torch(accuracy, kernels, memory, Case(shape, with_residual=True, negative_slope=negative_slope))


@pytest.mark.parametrize("shape", [(9, 12, 3, 3), (40, 12, 15, 11)])
def test_without_weight_and_bias(accuracy, kernels, memory, shape):
    compare_with_torch(accuracy, kernels, memory, Case(shape, affine=False))


@pytest.mark.parametrize("shape", [(9, 8, 3, 3), (40, 8, 15, 11), (20, 7, 15, 15)])
@pytest.mark.parametrize("mean", [-30.0, 1e4])
def test_a_mean_far_from_zero_cancels_nothing(accuracy, kernels, memory, shape, mean):
    case = Case(shape, mean=mean, negative_slope=1.0)
    compare_with_torch(accuracy, kernels, memory, case)
    inputs = inputs_of(case)
    _, means, variances = kernels.train(inputs.x, None, None, 0.0, 1.0, False, 1)
    torch.testing.assert_close(means[0].double(), inputs.x.double().mean((0, 2, 3)), rtol=2e-7, atol=0)
    torch.testing.assert_close(
        variances[0].double(), inputs.x.double().var((0, 2, 3), unbiased=False), rtol=1e-4, atol=0
    )


def test_a_first_value_far_from_the_others_costs_no_accuracy(kernels):
    x = 1000.0 + torch.randn(40, 8, 15, 11).contiguous(memory_format=torch.channels_last)
    x[0, :, 0, 0] = 0.0
    _, means, variances = kernels.train(x, None, None, 0.0, 1.0, False, 1)
    torch.testing.assert_close(means[0].double(), x.double().mean((0, 2, 3)), rtol=2e-7, atol=0)
    torch.testing.assert_close(variances[0].double(), x.double().var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(9, 7, 3, 3), (40, 8, 15, 11)])
def test_a_constant_channel_has_no_variance(kernels, shape):
    x = torch.full(shape, 0.1).contiguous(memory_format=torch.channels_last)
    output, mean, var = kernels.train(x, None, torch.arange(shape[1]).float(), 1e-5, 1.0, False, 1)
    assert torch.equal(mean, torch.full_like(mean, 0.1))
    assert not var.any()
    assert torch.equal(output, torch.arange(shape[1]).float().view(1, -1, 1, 1).expand(shape))


@pytest.mark.parametrize("shape", [(9, 8, 3, 3), (40, 8, 15, 11)])
@pytest.mark.parametrize("activation_first", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("negative_slope", [0.0, 0.2])
def test_what_is_not_finite_ends_where_torchs_ends(
    kernels, memory, shape, activation_first, bad, training, negative_slope
):
    case = Case(shape, activation_first=activation_first, training=training, negative_slope=negative_slope)
    inputs = inputs_of(case)
    inputs.x[1, 2, 1, 1] = bad
    results, expected = ours(kernels, memory, case, inputs), of_reference(case, inputs)
    # ReLU's gradient in torch is 0 whatever comes in; with a slope, and in the kernels, a product with the slope.
    for result, torchs in list(zip(results, expected))[: 2 if negative_slope else 1]:
        assert torch.equal(result.isnan(), torchs.isnan())
        assert torch.equal(result.isinf(), torchs.isinf())
    for result, torchs in zip(results[2:4], expected[2:4]):
        assert torch.equal(result.isfinite(), torchs.isfinite())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 8, 3, 3), (40, 8, 13, 11), (20, 6, 15, 15)])
@pytest.mark.parametrize("skipped", [1, 2, 4])
def test_slices_at_any_address_are_read_in_place(kernels, memory, dtype, shape, skipped):
    """The same numbers, whatever an access is wide; their sums may be added in another order."""
    case = Case(shape, dtype=dtype, with_residual=True)
    inputs = inputs_of(case)
    layout = torch.channels_last

    def sliced(tensor: Tensor) -> Tensor:
        flat = torch.empty(skipped + tensor.numel(), dtype=tensor.dtype)[skipped:]
        return flat.as_strided(tensor.shape, torch.empty(tensor.shape, device="meta", memory_format=layout).stride())

    moved = inputs._replace(
        **{name: sliced(getattr(inputs, name)).copy_(getattr(inputs, name)) for name in ("x", "residual", "grad")}
    )
    running = inputs.running_mean, inputs.running_var
    results = []
    for x, weight, bias, residual, grad, *_ in (inputs, moved):
        output = kernels.add_evaluate(x, weight, bias, residual, *running, EPS, 0.2)
        grads = kernels.add_backward(grad, output, x, weight, bias, *running, False, EPS, 0.2, 1)
        results.append([output, grads[0], grads[3]])
    for ours_, expected in zip(*results):
        assert torch.equal(ours_, expected)


@pytest.mark.parametrize(
    ("shape", "launches"), [((128, 64, 2, 2), (1, 1, 1)), ((3, 7, 4, 4), (1, 1, 1)), ((13, 64, 9, 8), (3, 1, 3))]
)
def test_few_launches(kernels, host, shape, launches):
    x, grad = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(2))

    def counted(call, *arguments):
        before = host.library.launches()
        return call(*arguments), host.library.launches() - before

    (_, mean, var), of_training = counted(kernels.train, x, None, None, EPS, 0.2, False, 1)
    _, of_evaluation = counted(kernels.evaluate, x, None, None, mean[0], var[0], EPS, 0.2, False)
    _, of_backward = counted(kernels.backward, grad, x, None, None, mean, var, True, EPS, 0.2, False, 1)
    assert (of_training, of_evaluation, of_backward) == launches


@pytest.mark.parametrize("shape", [(128, 64, 2, 2), (13, 64, 9, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation_first", [False, True])
def test_each_byte_moves_once_in_a_pass(kernels, host, shape, dtype, activation_first):
    x, grad = (torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    size = x.nbytes // 16
    options = (EPS, 0.2, activation_first)

    def moved(call, *arguments):
        result, read, written = host.vectors_moved(lambda: call(*arguments))
        return result, (read / size, written / size)

    (_, mean, var), of_training = moved(kernels.train, x, None, None, *options, 1)
    _, of_evaluation = moved(kernels.evaluate, x, None, None, mean[0], var[0], *options)
    _, of_backward = moved(kernels.backward, grad, x, None, None, mean, var, True, *options, 1)
    assert (of_training, of_evaluation, of_backward) == ((2, 1), (1, 1), (4, 1))


@pytest.mark.parametrize("shape", [(128, 64, 2, 2), (13, 64, 9, 8)])
def test_a_residual_is_read_once_and_its_gradient_written_once(kernels, host, shape):
    x, residual, grad = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(3))
    size = x.nbytes // 16
    (output, mean, var), *of_training = host.vectors_moved(
        lambda: kernels.add_train(x, None, None, residual, EPS, 0.2, 1)
    )
    _, *of_backward = host.vectors_moved(
        lambda: kernels.add_backward(grad, output, x, None, None, mean, var, True, EPS, 0.2, 1)
    )
    assert of_training == [3 * size, size]
    assert of_backward == [5 * size, 2 * size]  # the second pass reads the residual's gradient, not the output's


def test_a_gpu_of_any_size_gives_the_same_numbers(kernels, host):
    x, grad = (torch.randn(40, 8, 15, 11).contiguous(memory_format=torch.channels_last) for _ in range(2))
    results = []
    for multiprocessors in (1, 3, 20):
        host.library.set_multiprocessors(multiprocessors)
        output, mean, var = kernels.train(x, None, None, EPS, 0.2, False, 1)
        results.append([output, mean, var, *kernels.backward(grad, x, None, None, mean, var, True, EPS, 0.2, False, 1)])
    host.library.set_multiprocessors(3)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case((9, 8, 3, 3), 3), Case((40, 8, 15, 11), 2), Case((6, 7, 3, 3), 2, activation_first=True),
        Case((6, 130, 3, 7), with_residual=True), Case((6, 8, 3, 3), 2, with_residual=True),
    ],
)  # fmt: skip
def test_threads_may_take_turns_in_any_order(kernels, memory, host, case):
    inputs = inputs_of(case)
    for first, second in zip(*host.in_both_orders(lambda: ours(kernels, memory, case, inputs))):
        assert (first is None and second is None) or torch.equal(first, second)


def test_a_refused_launch_names_the_kernel(kernels, host):
    host.library.fail_next_launch()
    with pytest.raises(
        RuntimeError, match="batch_norm_leaky_relu_forward: CUDA error cudaErrorCooperativeLaunchTooLarge"
    ):
        kernels.train(torch.randn(4, 8), None, None, EPS, 0.2, False, 1)


# Statistics for an activation that stays pending.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation_first", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((4, 3, 3, 3), 2), ((10, 3, 25, 23), 1), ((12, 8, 5, 5), 3), ((13, 64, 9, 8), 1)]
)
def test_batch_statistics_are_trainings(of_batch, kernels, memory, shape, groups, dtype, activation_first):
    inputs = inputs_of(Case(shape, groups, dtype, activation_first, mean=3.0))
    running = [[memory.copy(t) for t in (inputs.running_mean, inputs.running_var)] for _ in range(2)]
    norm = memory.copy(inputs.weight), memory.copy(inputs.bias)
    x = memory.copy(inputs.x)
    result, written = of_batch.batch_normalised(
        x, None, *norm, *running[0], MOMENTUM, EPS, 0.2, activation_first, groups
    )
    assert written is None
    _, mean, var = kernels.train(x, *norm, EPS, 0.2, activation_first, groups, *running[1], MOMENTUM)
    torch.testing.assert_close((result.mean, result.var), (mean, var), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(running[0], running[1], rtol=1e-5, atol=1e-6)
    scale = inputs.weight / (result.var.double() + EPS).sqrt()
    torch.testing.assert_close(result.scale.double(), scale, rtol=3e-7, atol=0)
    shift = inputs.bias - result.mean.double() * scale
    torch.testing.assert_close(result.shift.double(), shift, rtol=3e-7, atol=3e-7 * (1 + 3 * scale.abs().max().item()))
    assert (result.stored, result.batch_statistics, result.activation_first) == (x, True, activation_first)


@pytest.mark.parametrize("shape", [(128, 64, 2, 2), (13, 64, 9, 8)])
def test_batch_statistics_read_each_byte_once_in_two_launches(of_batch, host, shape):
    x, before = torch.randn(shape).contiguous(memory_format=torch.channels_last), host.library.launches()
    _, read, written = host.vectors_moved(
        lambda: of_batch.batch_normalised(x, None, None, None, None, None, 0.0, EPS, 0.2, False, 1)
    )
    assert (read, written) == (x.nbytes // 16, 0)
    assert host.library.launches() == before + 2


def test_threads_may_take_turns_in_any_order_for_batch_statistics(of_batch, host):
    x = torch.randn(20, 7, 15, 15).contiguous(memory_format=torch.channels_last)
    first, second = host.in_both_orders(
        lambda: list(of_batch.batch_normalised(x, None, None, None, None, None, 0.0, EPS, 0.2, False, 2)[0][1:5])
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# Statistics that a convolution's kernel left.


def tile_statistics(values: Tensor, tiles: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of (rows, C) values cut into tiles of so many rows; what belongs to no row is NaN."""
    counts, of_row = torch.tensor(tiles).double(), torch.repeat_interleave(torch.tensor(tiles))
    zeros, values = torch.zeros(len(tiles), values.shape[1], dtype=torch.float64), values.double()
    means = zeros.index_add(0, of_row, values) / counts[:, None]
    deviations = zeros.index_add(0, of_row, (values - means[of_row]).square())
    return counts.float(), means.float(), torch.where(counts[:, None] > 0, deviations, torch.nan).float()


@pytest.mark.parametrize(
    ("channels", "tiles"), [(1, [3]), (5, [0, 2, 7]), (64, [4] * 40), (33, [1, 0, 3] * 30), (1, [1, 3] * 70_000)]
)
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_tiles_are_joined(activations, memory, channels, tiles, mean):
    torch.manual_seed(0)
    groups, rows = 2, sum(tiles)
    values = torch.randn(groups, rows, channels) + mean
    stacked = [torch.stack(part) for part in zip(*(tile_statistics(group, tiles) for group in values))]
    weight, bias, running_mean, running_var = torch.randn(4, channels)
    running = memory.copy(running_mean), memory.copy(running_var)
    output = torch.empty(groups, channels, rows, 1)
    result = activations.finish_statistics(
        output, *(memory.copy(part) for part in stacked), memory.copy(weight), memory.copy(bias), *running, 0.1, 1e-3,
        0.2, False,
    )  # fmt: skip
    exact = values.double()
    expected_mean, expected_var = exact.mean(1), exact.var(1, unbiased=False)
    torch.testing.assert_close(result.mean.double(), expected_mean, rtol=2e-7, atol=2e-7)
    torch.testing.assert_close(result.var.double(), expected_var, rtol=1e-5 if mean == 0 else 1e-3, atol=1e-9)
    scale = weight / (result.var.double() + 1e-3).sqrt()
    torch.testing.assert_close(result.scale.double(), scale, rtol=3e-7, atol=0)
    shift = bias - result.mean.double() * scale
    torch.testing.assert_close(
        result.shift.double(), shift, rtol=3e-7, atol=3e-7 * (1 + mean * scale.abs().max().item())
    )
    moved = running_mean.double(), running_var.double()
    for group in range(groups):
        unbiased = expected_var[group] * rows / (rows - 1)
        moved = moved[0].lerp(expected_mean[group], 0.1), moved[1].lerp(unbiased, 0.1)
    torch.testing.assert_close(running[0].double(), moved[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(running[1].double(), moved[1], rtol=1e-3, atol=1e-6)
    assert (result.stored, result.batch_statistics, result.eps) == (output, True, 1e-3)


def test_many_tiles_take_two_launches_and_give_the_same_bits(activations, host):
    statistics = torch.full((1, 140_000), 3.0), torch.randn(1, 140_000, 1), torch.rand(1, 140_000, 1)
    before = host.library.launches()
    results = host.in_both_orders(
        lambda: activations.finish_statistics(
            torch.empty(1, 1, 1, 1), *statistics, None, None, None, None, 0.0, 0.0, 0.2, False
        )
    )
    assert host.library.launches() - before == 4
    assert torch.equal(results[0].mean, results[1].mean)
    assert torch.equal(results[0].var, results[1].var)


# Pending activations.


def pending_of(case: Case, inputs: Inputs) -> Pending:
    x = inputs.x.float()
    x = torch.where(x > 0, x, case.negative_slope * x) if case.activation_first else x
    parts = x.chunk(case.groups)
    mean = torch.stack([part.mean((0, 2, 3)) for part in parts])
    var = torch.stack([part.var((0, 2, 3), unbiased=False) for part in parts])
    scale = (var + EPS).rsqrt() * (1.0 if inputs.weight is None else inputs.weight)
    shift = (0.0 if inputs.bias is None else inputs.bias) - mean * scale
    return Pending(
        inputs.x, scale, shift, mean, var, inputs.weight, inputs.bias, EPS, case.negative_slope, case.activation_first,
        case.training,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(4, 7, 3, 3), (40, 8, 15, 11)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation_first", [False, True])
def test_an_activation_that_is_written_out_is_trainings(activations, kernels, shape, dtype, activation_first):
    case = Case(shape, 2, dtype, activation_first)
    inputs = inputs_of(case)
    given = pending_of(case, inputs)
    output, mean, var = kernels.train(inputs.x, inputs.weight, inputs.bias, EPS, 0.2, activation_first, 2)
    given = given._replace(mean=mean, var=var)
    assert torch.equal(activations.activate(given), output)
    grads = kernels.backward(
        inputs.grad, inputs.x, inputs.weight, inputs.bias, mean, var, True, EPS, 0.2, activation_first, 2
    )
    for result, expected in zip(activations.activate_backward(inputs.grad, given), grads):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_a_residual_is_added_to_a_pending_activation(activations, kernels, slope):
    case = Case((6, 8, 3, 3), 2, with_residual=True, negative_slope=slope)
    inputs = inputs_of(case)
    x, weight, bias, residual, grad, *_ = inputs
    expected, mean, var = kernels.add_train(x, weight, bias, residual, EPS, slope, 2)
    given = pending_of(case, inputs)._replace(mean=mean, var=var)
    output = activations.activate_add(given, residual)
    assert torch.equal(output, expected)
    grads = kernels.add_backward(grad, output, x, weight, bias, mean, var, True, EPS, slope, 2)
    known = None if slope == 1.0 else output
    for result, of_kernels in zip(activations.activate_add_backward(grad, known, given), grads):
        assert torch.equal(result, of_kernels)


def test_what_is_not_pending_is_its_own_activation(activations):
    x = torch.randn(2, 3, 4, 4)
    assert activations.activate(Pending(x)) is x


@pytest.mark.parametrize("shape", [(4, 7, 3, 3), (40, 8, 15, 11), (6, 130, 3, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_gradient_is_settled_where_it_lies(activations, memory, shape, dtype, activation_first, training):
    case = Case(shape, 2, dtype, activation_first, training=training)
    inputs = inputs_of(case)
    given = pending_of(case, inputs)._replace(stored=memory.copy(inputs.x))
    x = inputs.x.double()
    value = torch.where(x > 0, x, 0.2 * x) if activation_first else x

    def per_pixel(values: Tensor) -> Tensor:  # (2, C)
        return values.double().repeat_interleave(shape[0] // 2, 0)[:, :, None, None]

    g, inverse = inputs.grad.double(), (per_pixel(given.var) + EPS).rsqrt()
    deviation, count = value - per_pixel(given.mean), inputs.x[: shape[0] // 2, 0].numel()
    sums = torch.stack([torch.stack([p.sum((0, 2, 3)) for p in t.chunk(2)]) for t in (g, g * deviation)])
    scale = inverse * inputs.weight.double().view(1, -1, 1, 1)
    projected = g - per_pixel(sums[0]) / count - deviation * inverse.square() * per_pixel(sums[1]) / count
    expected = scale * (projected if training else g)
    if activation_first:
        expected = torch.where(x > 0, expected, 0.2 * expected)
    grad = memory.copy(inputs.grad)
    result, of_weight, of_bias = activations.settle(grad, memory.copy(sums.float()), given)
    assert result is grad
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=precision, atol=precision * expected.abs().max().item())
    of_groups = (sums[1] * (given.var.double() + EPS).rsqrt()).sum(0)
    torch.testing.assert_close(of_weight.double(), of_groups, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_bias.double(), sums[0].sum(0), rtol=1e-5, atol=1e-5)


def test_without_a_norm_a_gradient_is_settled_already(activations, host):
    case = Case((4, 8, 3, 3), 2)
    grad, sums = torch.randn(4, 8, 3, 3), torch.randn(2, 2, 8)
    launches = host.library.launches()
    result, of_weight, of_bias = activations.settle(
        grad, sums, pending_of(case, inputs_of(case))._replace(normalised=False)
    )
    assert host.library.launches() == launches
    assert result is grad
    assert torch.equal(of_weight, sums[1].sum(0))
    assert torch.equal(of_bias, sums[0].sum(0))
