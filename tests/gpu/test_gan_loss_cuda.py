"""The CUDA kernel of the GAN losses on a GPU: as accurate as torch, on any stream, in CUDA graphs, for any count."""

from __future__ import annotations

import pytest
import torch

from ganvas.ops import discriminator_loss, generator_loss
from ganvas.ops.backends import cuda, reference
from ganvas.ops.gan_loss import KINDS

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def kernels_run_here():
    reason = cuda.can_run("discriminator_loss", torch.empty(1, device="cuda"))
    if reason is not None:
        pytest.skip(reason)


def logits(count, dtype=torch.float32):
    return (3 * torch.randn(count, device="cuda")).to(dtype)


def value_and_gradients(loss_of, *values):
    values = [value.detach().clone().requires_grad_() for value in values]
    loss = loss_of(*values)
    return [loss.detach(), *torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)]


def check(accuracy, ours, exact, theirs, values):
    for name, a, b, c in zip(("loss", "gradient", "other gradient"), ours, exact, theirs):
        # A loss may cancel (wgan's does): its terms are as large as the logits.
        terms = values.double().abs().mean() + b.abs() if name == "loss" else None
        accuracy.check(name, a, b, c, b, 2.0, terms=terms)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("real_count", "fake_count"), [(1, 1), (128, 128), (31, 2049), (1_000_003, 65_537)])
def test_discriminator_is_as_accurate_as_torch(accuracy, kind, dtype, real_count, fake_count):
    torch.manual_seed(real_count)
    if kind == "relativistic":
        fake_count = real_count
    real, fake = logits(real_count, dtype), logits(fake_count, dtype)
    smoothing = 0.1 if kind in ("bce", "lsgan") else 0.0

    def ours(r, f):
        return discriminator_loss(r, f, kind, label_smoothing=smoothing, backend="cuda")

    def theirs(r, f):
        return reference.discriminator_loss(r, f, kind, smoothing)

    check(
        accuracy, value_and_gradients(ours, real, fake), value_and_gradients(theirs, real.double(), fake.double()),
        value_and_gradients(theirs, real, fake), real,
    )  # fmt: skip
    _, metrics = discriminator_loss(real, fake, kind, return_metrics=True, backend="cuda")
    expected = reference.discriminator_metrics(real.double(), fake.double())
    torch.testing.assert_close(torch.stack(metrics), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 333, 100_000])
def test_generator_is_as_accurate_as_torch(accuracy, kind, dtype, count):
    torch.manual_seed(count)
    fake, real = logits(count, dtype), logits(count, dtype)

    def ours(f, r):
        return generator_loss(f, r, kind, backend="cuda")

    def theirs(f, r):
        return reference.generator_loss(f, r, kind)

    check(
        accuracy, value_and_gradients(ours, fake, real), value_and_gradients(theirs, fake.double(), real.double()),
        value_and_gradients(theirs, fake, real), fake,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_end_where_torchs_end(kind, bad):
    real, fake = torch.tensor([0.5, bad, -2.0], device="cuda"), torch.tensor([1.0, 0.0, -1.0], device="cuda")
    ours = value_and_gradients(lambda r, f: discriminator_loss(r, f, kind, backend="cuda"), real, fake)
    theirs = value_and_gradients(lambda r, f: discriminator_loss(r, f, kind, backend="reference"), real, fake)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("count", [128, 1_000_003])
def test_same_input_gives_the_same_bits(count):
    real, fake = logits(count), logits(count)
    first, second = (
        value_and_gradients(lambda r, f: discriminator_loss(r, f, backend="cuda"), real, fake) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_any_shape_and_strides():
    real, fake = torch.randn(4, 6, device="cuda")[:, ::2], torch.randn(2, 3, 5, device="cuda").transpose(0, 2)
    ours = value_and_gradients(lambda r, f: discriminator_loss(r, f, backend="cuda"), real, fake)
    theirs = value_and_gradients(lambda r, f: discriminator_loss(r, f, backend="reference"), real, fake)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_at_an_odd_address_is_read_in_place(dtype):
    real, fake = logits(100_001, dtype)[1:], logits(5_003, dtype)[3:]
    ours = discriminator_loss(real, fake, backend="cuda")
    theirs = discriminator_loss(real.clone(), fake.clone(), backend="cuda")
    assert torch.equal(ours, theirs)


def test_second_order_gradients_equal_the_reference():
    real, fake = logits(9), logits(9)

    def curvature(backend):
        r, f = real.clone().requires_grad_(), fake.clone().requires_grad_()
        grads = torch.autograd.grad(discriminator_loss(r, f, backend=backend), (r, f), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), (r, f))

    torch.testing.assert_close(curvature("cuda"), curvature("reference"))


@pytest.mark.parametrize("count", [128, 1_000_003])
def test_runs_on_the_current_stream(count):
    stream = torch.cuda.Stream()
    fake = torch.zeros(count, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would see the zeros
        fake.fill_(2.0)
        loss = generator_loss(fake, kind="wgan", backend="cuda")
    stream.synchronize()
    assert loss.item() == -2.0


def test_several_streams_at_once_do_not_mix():
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = [torch.full((1_000_003,), float(i), device="cuda") for i in range(len(streams))]
    torch.cuda.synchronize()
    losses = []
    for _ in range(20):
        for stream, fake in zip(streams, inputs):
            with torch.cuda.stream(stream):
                losses.append(generator_loss(fake, kind="wgan", backend="cuda"))
    torch.cuda.synchronize()
    assert [loss.item() for loss in losses] == [-0.0, -1.0, -2.0, -3.0] * 20


@pytest.mark.parametrize("count", [128, 1_000_003])
def test_a_cuda_graph_replays_value_and_gradients(count):
    real, fake = logits(count).requires_grad_(), logits(count).requires_grad_()

    def step():
        loss, metrics = discriminator_loss(real, fake, return_metrics=True, backend="cuda")
        return [loss, *torch.autograd.grad(loss, (real, fake)), metrics.real_logit]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # loads the kernel, which a capture may not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            real.copy_(logits(count))
            fake.copy_(logits(count))
        graph.replay()
        for replayed, eager in zip(captured, step()):
            assert torch.equal(replayed, eager)


def test_compiled_losses_equal_the_eager_ones():
    torch._dynamo.reset()

    def step(real, fake):
        loss, metrics = discriminator_loss(real, fake, "hinge", return_metrics=True, backend="cuda")
        return loss + generator_loss(fake, backend="cuda"), metrics.real_accuracy

    results = []
    real, fake = logits(16), logits(16)
    for function in (step, torch.compile(step, fullgraph=True)):
        leaves = real.clone().requires_grad_(), fake.clone().requires_grad_()
        loss, accuracy = function(*leaves)
        loss.backward()
        results.append([loss.detach(), accuracy, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["discriminator_loss", "generator_loss"])
def test_opcheck(name):
    arguments = {
        "discriminator_loss": (logits(4), logits(5), "bce", 0.1),
        "generator_loss": (logits(4), logits(4), "relativistic"),
    }
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    results = torch.library.opcheck(getattr(torch.ops.ganvas, name).default, arguments[name], test_utils=tests)
    assert set(results.values()) == {"SUCCESS"}


def test_more_logits_than_32_bits_count():
    count = 2**32 + 3
    free, _ = torch.cuda.mem_get_info()
    if free < 2.2 * 2 * count:
        pytest.skip(f"needs {2.2 * 2 * count / 2**30:.0f} GiB of free GPU memory; {free / 2**30:.0f} GiB are free")
    fake = torch.full((count,), -3.0, dtype=torch.bfloat16, device="cuda")
    fake[2**31 + 1] = fake[-1] = 2.0
    loss, grad, _ = torch.ops.ganvas.generator_loss(fake, None, "lsgan")  # ½ (x − 1)², gradient (x − 1)/count
    assert loss.item() == 8.0
    assert grad[2**31].item() == pytest.approx(-4.0 / count, rel=1e-2)
    assert grad[2**31 + 1].item() == pytest.approx(1.0 / count, rel=1e-2)
    assert grad[-1].item() == pytest.approx(1.0 / count, rel=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_the_logits_are():
    real, fake = logits(8).to("cuda:1"), logits(8).to("cuda:1")
    with torch.cuda.device(0):
        ours = discriminator_loss(real, fake, backend="cuda")
    assert ours.device == real.device
    torch.testing.assert_close(ours, reference.discriminator_loss(real, fake, "bce"))
