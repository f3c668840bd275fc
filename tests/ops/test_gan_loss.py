"""The fused GAN losses against their formulas in float64, beside torch's own kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ganvas.ops import discriminator_loss, generator_loss
from ganvas.ops.backends import reference
from ganvas.ops.gan_loss import KINDS

DTYPES = [torch.float32, torch.bfloat16]
BOTH = pytest.mark.parametrize("backend", ["cpu", "reference"])


def value_and_gradients(loss_of, *logits):
    logits = [value.detach().clone().requires_grad_() for value in logits]
    loss = loss_of(*logits)
    return [loss.detach(), *torch.autograd.grad(loss, logits, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 31, 128, 5000])
def test_discriminator_is_as_accurate_as_torch(accuracy, kind, dtype, count):
    torch.manual_seed(count)
    real, fake = (3 * torch.randn(count)).to(dtype), (3 * torch.randn(count)).to(dtype)
    smoothing = 0.1 if kind in ("bce", "lsgan") else 0.0
    ours = value_and_gradients(
        lambda r, f: discriminator_loss(r, f, kind, label_smoothing=smoothing, backend="cpu"), real, fake
    )
    theirs = value_and_gradients(lambda r, f: reference.discriminator_loss(r, f, kind, smoothing), real, fake)
    exact = value_and_gradients(
        lambda r, f: reference.discriminator_loss(r, f, kind, smoothing), real.double(), fake.double()
    )
    for name, a, b, c in zip(("loss", "grad_real", "grad_fake"), ours, exact, theirs):
        # A loss may cancel (wgan's does): its terms are as large as the logits.
        accuracy.check(name, a, b, c, b, 2.0, terms=real.double().abs().mean() + b.abs() if name == "loss" else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_generator_is_as_accurate_as_torch(accuracy, kind, dtype):
    torch.manual_seed(1)
    fake, real = (3 * torch.randn(333)).to(dtype), (3 * torch.randn(333)).to(dtype)
    ours = value_and_gradients(lambda f, r: generator_loss(f, r, kind, backend="cpu"), fake, real)
    theirs = value_and_gradients(lambda f, r: reference.generator_loss(f, r, kind), fake, real)
    exact = value_and_gradients(lambda f, r: reference.generator_loss(f, r, kind), fake.double(), real.double())
    for name, a, b, c in zip(("loss", "grad_fake", "grad_real"), ours, exact, theirs):
        # A loss may cancel (wgan's does): its terms are as large as the logits.
        accuracy.check(name, a, b, c, b, 2.0, terms=real.double().abs().mean() + b.abs() if name == "loss" else None)


@BOTH
def test_bce_is_binary_cross_entropy_with_logits(backend):
    real, fake = torch.randn(64), torch.randn(64)
    ones, zeros = torch.ones(64), torch.zeros(64)
    expected = F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)
    torch.testing.assert_close(discriminator_loss(real, fake, backend=backend), expected)
    smoothed = F.binary_cross_entropy_with_logits(real, 0.9 * ones) + F.binary_cross_entropy_with_logits(fake, zeros)
    torch.testing.assert_close(discriminator_loss(real, fake, label_smoothing=0.1, backend=backend), smoothed)
    torch.testing.assert_close(generator_loss(fake, backend=backend), F.binary_cross_entropy_with_logits(fake, ones))


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_ten_thousand_stay_finite(kind, backend):
    real = torch.tensor([-1e4, 1e4, 0.0, 88.0, -104.0], requires_grad=True)
    fake = torch.tensor([1e4, -1e4, 0.0, -88.0, 104.0], requires_grad=True)
    for loss in (
        discriminator_loss(real, fake, kind, backend=backend),
        generator_loss(fake, real, kind, backend=backend),
    ):
        grads = torch.autograd.grad(loss, (real, fake), allow_unused=True, materialize_grads=True)
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_end_where_torchs_end(kind, bad):
    real, fake = torch.tensor([0.5, bad, -2.0]), torch.tensor([1.0, 0.0, -1.0])
    ours = value_and_gradients(lambda r, f: discriminator_loss(r, f, kind, backend="cpu"), real, fake)
    theirs = value_and_gradients(lambda r, f: discriminator_loss(r, f, kind, backend="reference"), real, fake)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@BOTH
def test_metrics_are_means_and_shares(backend):
    real, fake = torch.tensor([2.0, 1.0, -1.0, 0.0]), torch.tensor([-3.0, 1.0, -2.0, -0.0])
    _, metrics = discriminator_loss(real, fake, return_metrics=True, backend=backend)
    assert metrics.real_logit.item() == pytest.approx(0.5)
    assert metrics.fake_logit.item() == pytest.approx(-1.0)
    assert metrics.real_accuracy.item() == 0.5
    assert metrics.fake_accuracy.item() == 0.5
    assert not metrics.real_logit.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_second_order_gradients_equal_the_reference(kind):
    torch.manual_seed(0)
    real, fake = torch.randn(9), torch.randn(9)

    def curvature(backend):
        r, f = real.clone().requires_grad_(), fake.clone().requires_grad_()
        loss = discriminator_loss(r, f, kind, backend=backend)
        grads = torch.autograd.grad(loss, (r, f), create_graph=True)
        # The square of the inputs keeps the graph connected for kinds with a constant gradient.
        total = sum((grad.square() * value).sum() for grad, value in zip(grads, (r, f)))
        return torch.autograd.grad(total, (r, f))

    torch.testing.assert_close(curvature("cpu"), curvature("reference"))


@pytest.mark.parametrize("kind", KINDS)
def test_float64_passes_gradcheck_to_second_order(kind):
    torch.manual_seed(0)
    real = torch.randn(5, dtype=torch.float64, requires_grad=True)
    fake = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, f: discriminator_loss(r, f, kind), (real, fake))
    if kind not in ("wgan", "hinge"):  # piecewise linear: nothing to differentiate twice
        assert torch.autograd.gradgradcheck(lambda r, f: discriminator_loss(r, f, kind), (real, fake))


def test_incoming_gradient_scales_the_result():
    real, fake = torch.randn(7, requires_grad=True), torch.randn(7, requires_grad=True)
    once = torch.autograd.grad(discriminator_loss(real, fake, backend="cpu"), (real, fake))
    thrice = torch.autograd.grad(3.0 * discriminator_loss(real, fake, backend="cpu"), (real, fake))
    torch.testing.assert_close(thrice, tuple(3.0 * grad for grad in once))


def test_a_graph_is_made_only_where_a_gradient_can_be_asked_for():
    plain, leaf = torch.randn(7), torch.randn(7, requires_grad=True)
    for loss_of in (discriminator_loss, lambda real, fake: generator_loss(fake, real, "relativistic")):
        assert loss_of(plain, leaf).requires_grad
        assert loss_of(leaf, plain).requires_grad
        assert not loss_of(plain, plain).requires_grad
        with torch.no_grad():
            assert not loss_of(leaf, leaf).requires_grad
            assert torch.equal(loss_of(leaf, leaf), loss_of(leaf.detach(), leaf.detach()))


def test_no_gradient_for_logits_that_need_none():
    real, fake = torch.randn(7), torch.randn(7, requires_grad=True)
    discriminator_loss(real, fake, backend="cpu").backward()
    assert real.grad is None
    torch.testing.assert_close(fake.grad, torch.sigmoid(fake.detach()) / 7)


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    real, fake = torch.randn(7, requires_grad=True), torch.randn(7, requires_grad=True)
    loss = discriminator_loss(real, fake, backend="cpu")
    first = torch.autograd.grad(loss, (real, fake), retain_graph=True)
    for grad in first:
        grad.add_(1.0)  # the caller's own from now on
    second = torch.autograd.grad(loss, (real, fake))
    torch.testing.assert_close(first, tuple(grad + 1.0 for grad in second))


def test_logits_changed_in_place_are_refused_where_the_gradient_is_differentiated_again():
    logits = torch.randn(7, requires_grad=True) * 1.0
    loss = generator_loss(logits, backend="cpu")
    logits.detach().mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_results_lie_with_the_logits_wherever_the_default_device_is():
    real, fake = torch.randn(7, requires_grad=True), torch.randn(7)
    expected = discriminator_loss(real, fake, return_metrics=True, backend="cpu")
    with torch.device("meta"):
        found = discriminator_loss(real, fake, return_metrics=True, backend="cpu")
    torch.testing.assert_close(found, expected)


def test_any_shape_and_strides():
    real, fake = torch.randn(4, 6)[:, ::2], torch.randn(2, 3, 5).transpose(0, 2)
    ours = value_and_gradients(lambda r, f: discriminator_loss(r, f, backend="cpu"), real, fake)
    theirs = value_and_gradients(lambda r, f: discriminator_loss(r, f, backend="reference"), real, fake)
    torch.testing.assert_close(ours, theirs)


def test_sums_do_not_depend_on_the_number_of_threads():
    real, fake = torch.randn(100_001), torch.randn(100_001)
    threads = torch.get_num_threads()
    losses = []
    for count in (1, 2):
        torch.set_num_threads(count)
        losses.append(discriminator_loss(real, fake, backend="cpu"))
    torch.set_num_threads(threads)
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: discriminator_loss(x, x, "bse"), ValueError, "kind must be one of bce, .*; got 'bse'"),
        (lambda x: discriminator_loss(x, x.double()), TypeError, "fake_logits must be of real_logits' dtype"),
        (lambda x: discriminator_loss(x, x[:2], "relativistic"), ValueError, r"real_logits' shape \(4,\); got \(2,\)"),
        (lambda x: discriminator_loss(x[:0], x), ValueError, "real_logits must hold at least one logit"),
        (lambda x: discriminator_loss(x, x, label_smoothing=1.0), ValueError, r"must lie in \[0, 1\); got 1.0"),
        (lambda x: discriminator_loss(x, x, "wgan", label_smoothing=0.1), ValueError, "label_smoothing needs kind"),
        (lambda x: discriminator_loss(x.int(), x), TypeError, "real_logits must be of a floating-point dtype"),
        (lambda x: discriminator_loss(x, x.to("meta")), ValueError, "fake_logits must be on real_logits' device"),
        (lambda x: generator_loss(x, kind="relativistic"), ValueError, "real_logits is required"),
        (lambda x: generator_loss(x, kind="gan"), ValueError, "kind must be one of"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(4))
