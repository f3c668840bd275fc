"""The CUDA kernels of BatchNorm + LeakyReLU and of pending activations: accuracy, streams, CUDA graphs, any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ganvas.ops import batch_norm_leaky_relu
from ganvas.ops.backends import cpu, cuda
from ganvas.ops.pending import Pending

if not cuda.MISSING:
    from ganvas.ops.backends.cuda.max_pool import max_pool, max_pool_backward
    from ganvas.ops.backends.cuda.pending import activate, finish_statistics, settle
    from ganvas.ops.backends.cuda.statistics import batch_normalised

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def kernels_run_here():
    reason = cuda.can_run("batch_norm_leaky_relu", torch.empty(1, 1, device="cuda"))
    if reason is not None:
        pytest.skip(reason)


def pixels(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, device="cuda").to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


class Layer:
    """A normalisation's inputs, and what comes of them: output, gradients, running statistics."""

    def __init__(self, shape, dtype=torch.float32, with_residual=False, **options):
        torch.manual_seed(sum(shape))
        channels = shape[1]
        self.options = {"training": True, "momentum": 0.3, "negative_slope": 0.2, "statistics_groups": 1, **options}
        self.leaves = [pixels(*shape, dtype=dtype), *torch.randn(2, channels, device="cuda")]
        if with_residual:
            self.leaves.append(pixels(*shape, dtype=dtype))
        self.running = torch.randn(channels, device="cuda"), torch.rand(channels, device="cuda") + 0.5
        self.grad = pixels(*shape, dtype=dtype)

    def run(self, backend: str, dtype: torch.dtype | None = None, kink: Tensor | None = None) -> list[Tensor]:
        """``kink``: where the pre-activation is above 0; otherwise the layer's own result tells."""
        x, weight, bias, *residual = leaves = [
            (t if dtype is None else t.to(dtype)).detach().clone(memory_format=torch.preserve_format).requires_grad_()
            for t in self.leaves
        ]
        running = [t.clone() if dtype is None else t.to(dtype) for t in self.running]
        options = self.options if kink is None else {**self.options, "negative_slope": 1.0}
        slope = self.options["negative_slope"]
        if kink is not None and options.get("order") == "conv_act_bn":
            x = torch.where(kink, x, slope * x)
        output = batch_norm_leaky_relu(
            x, weight, bias, *running, residual=residual[0] if residual else None, backend=backend, **options
        )
        if kink is not None and options.get("order") != "conv_act_bn":
            output = torch.where(kink, output, slope * output)
        grads = torch.autograd.grad(output, leaves, self.grad.to(output.dtype))
        return [output.detach(), *grads, *running]

    def kink(self, results: list[Tensor]) -> Tensor:
        return (self.leaves[0] if self.options.get("order") == "conv_act_bn" else results[0]) > 0


def compare_with_torch(accuracy, layer: Layer) -> None:
    ours, torchs = layer.run("cuda"), layer.run("reference")
    kink, torchs_kink = layer.kink(ours), layer.kink(torchs)
    if layer.options.get("order") != "conv_act_bn":
        # The kernel's side is that of a value that it did not round: float16 may have made a 0 of it.
        straight = layer.run("reference", torch.float64, torch.ones_like(kink))[0]
        kink |= (ours[0] == 0) & (straight > 0)
    exact, torchs_exact = (layer.run("reference", torch.float64, sides) for sides in (kink, torchs_kink))
    names = ["output", "grad_input", "grad_weight", "grad_bias", *["grad_residual"][: len(layer.leaves) - 3]]
    for i, name in enumerate([*names, "running_mean", "running_var"]):
        # Sums over all pixels may cancel: each of their terms is about as large as a pixel's gradient.
        many = layer.grad.numel() / exact[i].numel()
        terms = exact[i].abs() + many**0.5 if name in ("grad_weight", "grad_bias") else exact[i].abs() + 1.0
        accuracy.check(name, ours[i], exact[i], torchs[i], torchs_exact[i], 2.0 if name == "output" else 3.0, terms)


SHAPES = [
    (128, 512, 4, 4), (64, 64, 32, 32), (256, 3, 32, 32), (100, 1, 28, 28), (33, 65, 17, 13), (16, 130, 31, 7),
    (4096, 100), (7, 1000), (2, 65_536), (64, 32, 64, 64), (3, 2049, 5, 5),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["conv_bn_act", "conv_act_bn"])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_is_as_accurate_as_torch(accuracy, shape, order, dtype):
    compare_with_torch(accuracy, Layer(shape, dtype, order=order))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES[::2])
def test_with_a_residual_it_is_as_accurate_as_torch(accuracy, shape, training, dtype):
    compare_with_torch(accuracy, Layer(shape, dtype, with_residual=True, training=training))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["conv_bn_act", "conv_act_bn"])
@pytest.mark.parametrize("shape", SHAPES[1::2])
def test_fixed_statistics_are_as_accurate_as_torch(accuracy, shape, order, dtype):
    compare_with_torch(accuracy, Layer(shape, dtype, order=order, training=False))


@pytest.mark.parametrize("shape", [(128, 256, 4, 4), (64, 64, 32, 32), (64, 3, 31, 17)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_groups_have_statistics_of_their_own(accuracy, shape, with_residual):
    compare_with_torch(accuracy, Layer(shape, with_residual=with_residual, statistics_groups=2))


@pytest.mark.parametrize("negative_slope", [-0.5, 0.0, 1.0])
@pytest.mark.parametrize("shape", [(128, 512, 4, 4), (64, 64, 32, 32)])
def test_any_slope_is_the_cpus(shape, negative_slope):
    layer = Layer(shape, negative_slope=negative_slope)
    ours = layer.run("cuda")
    layer.leaves, layer.grad = [leaf.cpu() for leaf in layer.leaves], layer.grad.cpu()
    layer.running = tuple(values.cpu() for values in layer.running)
    for result, cpus in zip(ours, layer.run("cpu")):
        error = (result.cpu() - cpus).norm() / cpus.norm()  # a sign flip at the kink moves single values
        assert error < 5e-3


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(128, 512, 4, 4), (64, 64, 32, 32), (64, 3, 31, 17)])
def test_same_input_gives_the_same_bits(shape, with_residual):
    layer = Layer(shape, torch.bfloat16, with_residual)
    for first, second in zip(layer.run("cuda"), layer.run("cuda")):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skipped", [1, 2, 3])
@pytest.mark.parametrize("shape", [(128, 64, 2, 2), (64, 64, 16, 16), (64, 6, 31, 16)])
def test_a_slice_at_an_odd_address_is_read_in_place(dtype, skipped, shape):
    layer = Layer(shape, dtype, training=False)
    expected = layer.run("cuda")
    for tensor in (layer.leaves[0], layer.grad):
        flat = torch.empty(skipped + tensor.numel(), dtype=dtype, device="cuda")[skipped:]
        tensor.set_(flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor))
    assert layer.grad.data_ptr() % 16
    running = layer.running
    output = cuda.batch_norm_leaky_relu.evaluate(*layer.leaves, *running, 1e-5, 0.2, False)
    grads = cuda.batch_norm_leaky_relu.backward(layer.grad, *layer.leaves, *running, False, 1e-5, 0.2, False, 1)
    assert torch.equal(output, expected[0])
    assert torch.equal(grads[0], expected[1])
    torch.testing.assert_close(grads[1:], tuple(expected[2:4]), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("shape", [(128, 64, 2, 2), (64, 64, 32, 32)])
def test_what_is_not_finite_ends_where_torchs_ends(shape):
    layer = Layer(shape)
    layer.leaves[0][1, 2, 1, 1] = float("inf")
    for result, expected in zip(layer.run("cuda")[:4], layer.run("reference")[:4]):
        assert torch.equal(result.isfinite(), expected.isfinite())


@pytest.mark.parametrize("shape", [(128, 64, 2, 2), (64, 64, 32, 32)])
def test_runs_on_the_current_stream(shape):
    stream, x = torch.cuda.Stream(), torch.zeros(shape, device="cuda", memory_format=torch.channels_last)
    values = pixels(*shape)
    expected = batch_norm_leaky_relu(values, None, None, None, None, training=True, backend="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would see the zeros
        x.copy_(values)
        output = batch_norm_leaky_relu(x, None, None, None, None, training=True, backend="cuda")
    stream.synchronize()
    assert torch.equal(output, expected)


def test_two_streams_at_once_do_not_mix():
    streams = [torch.cuda.Stream() for _ in range(2)]
    layers = [Layer((64, 64, 32, 32)), Layer((64, 32, 32, 32))]
    expected = [layer.run("cuda") for layer in layers]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream, layer in zip(streams, layers):
            with torch.cuda.stream(stream):
                results.append(layer.run("cuda"))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert all(torch.equal(a, b) for a, b in zip(result, expected[i % 2]))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(128, 64, 2, 2), (64, 64, 32, 32), (20, 3, 31, 17)])
def test_a_cuda_graph_replays_a_training_step(shape, with_residual):
    layer = Layer(shape, torch.bfloat16, with_residual)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer.run("cuda")  # loads the kernels, which a capture may not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.run("cuda")
    for _ in range(3):
        layer.leaves[0].copy_(pixels(*shape))
        graph.replay()
        for replayed, eager in zip(captured, layer.run("cuda")):
            assert torch.equal(replayed, eager)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(training, with_residual):
    channels = 6
    x, grad, residual = (pixels(4, channels, 3, 3) for _ in range(3))
    weight, bias, mean = torch.randn(3, channels, device="cuda")
    var = torch.rand(channels, device="cuda") + 0.5
    added, order, name = ((residual,), (), "add_leaky_relu") if with_residual else ((), (False,), "leaky_relu")
    ops = {"eval": (x, weight, bias, *added, mean, var, 1e-5, 0.2, *order)}
    if training:
        ops = {"train": (x, weight, bias, *added, 1e-5, 0.2, *order, 1)}
    arguments = (x, weight, bias, mean[None], var[None], training, 1e-5, 0.2, *order, 1)
    ops["backward"] = (grad, *added, *arguments)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    for step, values in ops.items():
        op = getattr(torch.ops.ganvas, f"batch_norm_{name}_{step}").default
        assert set(torch.library.opcheck(op, values, test_utils=tests).values()) == {"SUCCESS"}


def test_more_values_than_32_bits_count():
    rows, channels = 2**25 + 8, 128
    free, _ = torch.cuda.mem_get_info()
    if free < 5 * 2 * rows * channels:
        pytest.skip(f"needs {10 * rows * channels / 2**30:.0f} GiB of free GPU memory; {free / 2**30:.0f} GiB are free")
    x = torch.zeros(rows, channels, dtype=torch.bfloat16, device="cuda")
    x[::2] = 2.0
    output, mean, var = cuda.batch_norm_leaky_relu.train(x, None, None, 0.0, 0.5, False, 1)
    assert (mean == 1.0).all()
    assert (var == 1.0).all()
    assert output[-2:, -1].tolist() == [1.0, -0.5]
    assert output[2**24].eq(1.0).all()
    grad, *_ = cuda.batch_norm_leaky_relu.backward(x, x, None, None, mean, var, True, 0.0, 1.0, False, 1)
    assert grad[-2:, -1].abs().max() == 0.0  # a multiple of x̂ is projected out


# Pending activations.


def pending(shape, dtype=torch.float32, groups=1, activation_first=False) -> Pending:
    stored, channels = pixels(*shape, dtype=dtype), shape[1]
    weight, bias = torch.randn(2, channels, device="cuda")
    mean, var = torch.randn(groups, channels, device="cuda"), torch.rand(groups, channels, device="cuda") + 0.5
    scale = weight * (var + 1e-5).rsqrt()
    return Pending(
        stored, scale, bias - mean * scale, mean, var, weight, bias, 1e-5, 0.2, activation_first, batch_statistics=True
    )


def on_cpu(values):
    if isinstance(values, Tensor):
        return values.cpu()
    return Pending(*(on_cpu(value) if isinstance(value, Tensor) else value for value in values))


@pytest.mark.parametrize("shape", [(6, 64, 5, 5), (64, 64, 32, 32), (20, 7, 31, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation_first", [False, True])
def test_pending_activations_are_the_cpus(shape, dtype, activation_first):
    given = pending(shape, dtype, 2, activation_first)
    grad, sums = pixels(*shape, dtype=dtype), torch.randn(2, 2, shape[1], device="cuda")
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5 if dtype is torch.float32 else 2e-2}
    torch.testing.assert_close(activate(given).cpu(), cpu.activate(on_cpu(given)), **tolerance)
    ours = settle(grad.clone(memory_format=torch.preserve_format), sums, given)
    cpus = cpu.settle(grad.cpu(), sums.cpu(), on_cpu(given))
    for result, expected in zip(ours, cpus):
        torch.testing.assert_close(result.cpu(), expected, **tolerance)


@pytest.mark.parametrize("shape", [(6, 64, 5, 5), (64, 64, 32, 32), (20, 7, 31, 17)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation_first", [False, True])
def test_batch_statistics_and_an_activation_that_is_written_later_are_trainings(shape, dtype, activation_first):
    x, weight, bias = pixels(*shape, dtype=dtype), *torch.randn(2, shape[1], device="cuda")
    running = [[torch.zeros(shape[1], device="cuda"), torch.ones(shape[1], device="cuda")] for _ in range(2)]
    result, _ = batch_normalised(x, None, weight, bias, *running[0], 0.3, 1e-5, 0.2, activation_first, 2)
    output, mean, var = cuda.batch_norm_leaky_relu.train(
        x, weight, bias, 1e-5, 0.2, activation_first, 2, *running[1], 0.3
    )
    torch.testing.assert_close((result.mean, result.var), (mean, var), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(running[0], running[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(activate(result), output, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize(("tiles", "channels"), [(1, 64), (333, 65), (100_000, 16)])
def test_tiles_of_statistics_are_joined(tiles, channels):
    values = 5 + torch.randn(2, tiles, 3, channels, device="cuda")
    counts, means = torch.full((2, tiles), 3.0, device="cuda"), values.mean(2)
    deviations = (values - means[:, :, None]).square().sum(2)
    running = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")
    output = pixels(2, channels, 3, 1)
    result = finish_statistics(output, counts, means, deviations, None, None, *running, 1.0, 1e-5, 0.2, False)
    exact = values.double().flatten(1, 2)
    torch.testing.assert_close(result.mean.double(), exact.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.var.double(), exact.var(1, unbiased=False), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(running[1].double(), exact[1].var(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 64, 6, 6), (64, 32, 33, 31), (20, 7, 8, 5), (128, 256, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation_first", [False, True])
def test_max_pooling_is_the_cpus(shape, dtype, activation_first):
    given = pending(shape, dtype, 2, activation_first)
    pooled, _ = max_pool(given)
    expected, winners = cpu.max_pool(on_cpu(given))
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5 if dtype is torch.float32 else 2e-2}
    torch.testing.assert_close(pooled.cpu(), expected, **tolerance)
    grad = pixels(*pooled.shape, dtype=dtype)
    ours = max_pool_backward(grad, winners.cuda(), given)  # of near equals, those that the CPU found
    for result, cpus in zip(ours, cpu.max_pool_backward(grad.cpu(), winners, on_cpu(given))):
        error = (result.cpu().float() - cpus.float()).norm() / cpus.float().norm()
        assert error < (1e-4 if dtype is torch.float32 else 1e-2)
