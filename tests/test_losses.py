"""GAN losses: the modules are the operations, the penalties have their closed forms and gradients."""

import pytest
import torch
from torch import nn

from ganvas import ops
from ganvas.losses import (
    DiscriminatorLoss,
    GeneratorLoss,
    feature_matching,
    gradient_penalty,
    r1_penalty,
    r2_penalty,
)
from ganvas.nn import ConvBNLeakyReLU
from ganvas.ops.gan_loss import KINDS

PENALTIES = pytest.mark.parametrize("penalty", [r1_penalty, r2_penalty])


def images(count: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 4, 4, dtype=dtype, generator=source).requires_grad_()


class LinearDiscriminator(nn.Module):
    """D(x) = wᵀx, whose gradient is w everywhere."""

    def __init__(self, norm: float = 3.0) -> None:
        super().__init__()
        weight = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        self.weight = nn.Parameter(norm * weight / weight.norm())

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.flatten(1) @ self.weight.to(batch.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_compute_the_operations(kind):
    real, fake = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(DiscriminatorLoss(kind)(real, fake), ops.discriminator_loss(real, fake, kind))
    assert torch.equal(GeneratorLoss(kind)(fake, real), ops.generator_loss(fake, real, kind))


def test_label_smoothing_reaches_the_operation_and_changes_the_loss():
    real, fake = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    smoothed = DiscriminatorLoss("bce", label_smoothing=0.1)(real, fake)
    assert torch.equal(smoothed, ops.discriminator_loss(real, fake, "bce", label_smoothing=0.1))
    assert smoothed != DiscriminatorLoss("bce")(real, fake)


def test_metrics_come_with_the_same_loss():
    module = DiscriminatorLoss("hinge")
    real, fake = torch.tensor([2.0, 1.0, 1.0, -1.0]), torch.tensor([-2.0, 3.0, -1.0, 1.0])
    loss, metrics = module.with_metrics(real, fake)
    assert torch.equal(loss, module(real, fake))
    assert [float(value) for value in metrics] == [0.75, 0.25, 0.75, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "vanilla"}, "kind must be one of bce, .*'vanilla'"),
        ({"kind": "bce", "label_smoothing": 1.0}, "label_smoothing must lie in"),
        ({"kind": "hinge", "label_smoothing": 0.1}, "label_smoothing needs kind 'bce' or 'lsgan'"),
    ],
)
def test_options_that_mean_nothing_are_refused_when_the_module_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        DiscriminatorLoss(**options)


def test_generator_loss_refuses_an_unknown_kind_when_it_is_made():
    with pytest.raises(ValueError, match="kind must be one of"):
        GeneratorLoss("vanilla")


@PENALTIES
def test_penalty_of_a_linear_discriminator_is_half_gamma_times_its_squared_norm(penalty):
    discriminator, batch = LinearDiscriminator(norm=3.0), images()
    value = penalty(discriminator(batch), batch, gamma=4.0)
    assert value.item() == pytest.approx(4 / 2 * 9)
    value.backward()
    torch.testing.assert_close(discriminator.weight.grad, 4.0 * discriminator.weight.detach())


@PENALTIES
def test_penalty_is_the_mean_over_images_of_the_squared_gradient_of_each(penalty):
    batch = images()
    logits = 0.5 * batch.square().flatten(1).sum(dim=1)  # ∇ₓ = x
    expected = 0.5 * 10 * batch.detach().flatten(1).norm(dim=1).square().mean()
    torch.testing.assert_close(penalty(logits, batch), expected)
    torch.testing.assert_close(penalty(logits.reshape(-1, 1), batch), expected)


@PENALTIES
def test_penalty_leaves_the_graph_to_the_adversarial_loss(penalty):
    discriminator, batch = LinearDiscriminator(), images()
    logits = discriminator(batch)
    (penalty(logits, batch) + DiscriminatorLoss("wgan")(logits, torch.zeros(5, dtype=torch.float64))).backward()
    expected = 10 * discriminator.weight.detach() - batch.detach().flatten(1).mean(dim=0)
    torch.testing.assert_close(discriminator.weight.grad, expected)


def test_r1_through_a_fused_block_equals_plain_torch():
    torch.manual_seed(0)
    block = ConvBNLeakyReLU(2, 3, 3, padding=1).double()
    fused = nn.Sequential(block, nn.Flatten(), nn.Linear(48, 1).double())
    plain = nn.Sequential(block.conv, block.bn, block.act, *fused[1:])

    def gradients(model: nn.Module) -> list[torch.Tensor]:
        batch = images()
        return list(torch.autograd.grad(r1_penalty(model(batch), batch), [*fused.parameters()], materialize_grads=True))

    for ours, theirs in zip(gradients(fused), gradients(plain)):
        torch.testing.assert_close(ours, theirs)


def test_penalties_have_correct_gradients_of_their_own():
    source = torch.Generator().manual_seed(0)
    first, second = (torch.randn(32, 4, dtype=torch.float64, generator=source).requires_grad_() for _ in range(2))

    def smooth_discriminator(batch: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(batch.flatten(1) @ first) * torch.sin(batch.flatten(1) @ second)).sum(dim=1)

    real, fake = images(3, seed=1), images(3, seed=2)

    def r1(*_):
        return r1_penalty(smooth_discriminator(real), real)

    def wgan_gp(*_):
        return gradient_penalty(smooth_discriminator, real, fake, rng=torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(r1, (first, second), fast_mode=True)
    assert torch.autograd.gradcheck(wgan_gp, (first, second), fast_mode=True)


@pytest.mark.parametrize(("norm", "expected"), [(1.0, 0.0), (3.0, 40.0), (0.5, 2.5)])
def test_gradient_penalty_of_a_linear_discriminator_measures_its_distance_from_slope_one(norm, expected):
    discriminator = LinearDiscriminator(norm)
    value = gradient_penalty(discriminator, images(seed=1), images(seed=2))
    assert value.item() == pytest.approx(expected, abs=1e-12)


def test_gradient_penalty_of_a_flat_discriminator_is_finite_with_a_finite_gradient():
    discriminator = LinearDiscriminator(norm=0.0)
    value = gradient_penalty(discriminator, images(seed=1), images(seed=2))
    value.backward()
    assert value.item() == 10.0
    assert discriminator.weight.grad.isfinite().all()


def test_gradient_penalty_looks_at_one_point_of_each_segment_between_real_and_fake():
    seen = []

    def recorded(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch.detach())
        return batch.flatten(1).sum(dim=1)

    real, fake = torch.ones(200, 1, 2, 2), torch.zeros(200, 1, 2, 2)
    gradient_penalty(recorded, real, fake, rng=torch.Generator().manual_seed(0))
    (batch,) = seen
    mix = batch.flatten(1)[:, 0]
    assert torch.equal(batch, mix.reshape(-1, 1, 1, 1).expand_as(batch))
    assert mix.min() >= 0
    assert mix.max() <= 1
    assert float(mix.mean()) == pytest.approx(0.5, abs=0.1)
    assert mix.unique().numel() > 190


def test_gradient_penalty_repeats_with_its_random_generator_and_does_not_reach_the_images():
    discriminator, real, fake = (
        nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.Tanh(), nn.Linear(4, 1)),
        images(),
        images(),
    )
    discriminator.double()
    values = [gradient_penalty(discriminator, real, fake, rng=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*values)
    values[0].backward()
    assert real.grad is None
    assert fake.grad is None


def test_penalty_in_half_precision_does_not_overflow():
    batch = images(dtype=torch.float16)
    logits = 100 * batch.flatten(1).sum(dim=1)  # ‖∇‖² = 32 · 100² = 320 000, beyond float16
    value = r1_penalty(logits, batch, gamma=2.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(320_000)


def test_feature_matching_is_the_squared_distance_of_the_means():
    real = torch.tensor([[0.0, 2.0], [2.0, 2.0]], requires_grad=True)  # mean (1, 2)
    fake = torch.tensor([[4.0, 6.0]], requires_grad=True)
    value = feature_matching(real, fake)
    value.backward()
    assert value.item() == 3**2 + 4**2
    assert fake.grad.tolist() == [[6.0, 8.0]]
    assert real.grad is None


@PENALTIES
def test_logits_without_a_way_back_to_the_images_are_refused(penalty):
    discriminator, batch = LinearDiscriminator(), images()
    with pytest.raises(ValueError, match=r"requires_grad_\(\)"):
        penalty(discriminator(batch.detach()), batch.detach())
    with torch.no_grad(), pytest.raises(ValueError, match=r"requires_grad_\(\)"):
        penalty(discriminator(batch), batch)
    with pytest.raises(ValueError, match=r"do not depend on .*_images"):
        penalty(discriminator(batch), images(seed=1))


@PENALTIES
def test_penalty_refuses_what_is_no_batch_with_one_logit_per_image(penalty):
    batch = images()
    with pytest.raises(ValueError, match=r"one logit for each of .*_images, got \(5, 32\) for 5 images"):
        penalty(batch.flatten(1), batch)
    with pytest.raises(ValueError, match="at least one image"):
        penalty(torch.zeros(0), torch.zeros(0, 1, 2, 2))
    with pytest.raises(ValueError, match="gamma must not be negative"):
        penalty(LinearDiscriminator()(batch), batch, gamma=-1)


def test_gradient_penalty_refuses_images_that_do_not_pair():
    with pytest.raises(ValueError, match="fake_images must have the shape, dtype and device of real_images"):
        gradient_penalty(LinearDiscriminator(), images(5), images(4))
    with pytest.raises(ValueError, match="weight must not be negative"):
        gradient_penalty(LinearDiscriminator(), images(), images(), weight=-1.0)


def test_feature_matching_refuses_features_that_do_not_match():
    with pytest.raises(ValueError, match="with the same features"):
        feature_matching(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="at least one sample"):
        feature_matching(torch.zeros(2, 3), torch.zeros(0, 3))
