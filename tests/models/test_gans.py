"""GANs: shapes, the architecture counted by hand, labels, statistics groups, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ganvas import models
from ganvas.nn import statistics_groups

# As small as they get: mlp_conv_gan has no width to turn down, so one of it must do.
SMALL = [
    pytest.param("dcgan", {"size": 16, "channels": 2, "width": 4, "num_classes": None}, id="dcgan"),
    pytest.param("dcgan", {"size": 16, "channels": 2, "width": 4, "num_classes": 5}, id="dcgan-conditional"),
    pytest.param("mlp_conv_gan", {"num_classes": 2}, id="mlp_conv_gan-conditional"),
]


def make(name, options, seed=0):
    torch.manual_seed(seed)
    return models.create(name, **options)


def inputs(generator, count=4):
    labels = None if generator.num_classes is None else torch.arange(count) % generator.num_classes
    return torch.randn(count, generator.latent_size), labels


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("num_classes", [None, 10])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_dcgan_makes_and_judges_images_of_every_size(size, channels, num_classes):
    generator, discriminator = models.create(
        "dcgan", size=size, channels=channels, num_classes=num_classes, latent_size=12, width=4
    )
    images = generator(*inputs(generator, 2))
    assert images.shape == (2, channels, size, size)
    assert discriminator(images, inputs(generator, 2)[1]).shape == (2,)


@pytest.mark.parametrize("channels", [1, 3])
def test_mlp_conv_gan_makes_and_judges_images_of_28_pixels(channels):
    generator, discriminator = models.create("mlp_conv_gan", channels=channels)
    images = generator(torch.randn(2, 100))
    assert images.shape == (2, channels, 28, 28)
    assert discriminator(images).shape == (2,)


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_networks_say_what_they_take(name, options):
    generator, discriminator = make(name, options)
    size, channels = options.get("size", 28), options.get("channels", 1)
    assert generator.latent_size == 100
    for network in (generator, discriminator):
        assert (network.size, network.channels, network.num_classes) == (size, channels, options["num_classes"])


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_generated_images_lie_between_minus_one_and_one(name, options):
    generator, _ = make(name, options)
    latent, labels = inputs(generator)
    assert generator(1e3 * latent, labels).abs().max() <= 1


def test_dcgan_has_the_parameters_of_the_original():
    # 4x4 convolutions without bias (but the outermost) between 100, 512, 256, 128, 64 and 3 channels.
    generator, discriminator = models.create("dcgan")
    steps = 512 * 256 + 256 * 128 + 128 * 64
    assert count(generator) == 16 * (100 * 512 + steps + 64 * 3) + 3 + 2 * (512 + 256 + 128 + 64)
    assert count(discriminator) == 16 * (3 * 64 + steps + 512) + 64 + 1 + 2 * (512 + 256 + 128)


def test_mlp_conv_gan_has_the_parameters_its_description_says():
    generator, discriminator = models.create("mlp_conv_gan")

    def dense(inputs, outputs):
        return inputs * outputs + outputs

    def conv(inputs, outputs):
        return 9 * inputs * outputs + outputs

    towers = dense(100, 256) + dense(256, 512) + dense(512, 1024) + dense(1024, 12544)
    norms = 2 * (256 + 512 + 1024 + 12544 + 128 + 128)
    assert count(generator) == towers + conv(256, 128) + conv(128, 128) + conv(128, 1) + norms
    convs = conv(1, 128) + 3 * conv(128, 128) + 4 * 2 * 128
    assert count(discriminator) == convs + dense(128 * 14 * 14, 512) + dense(512, 256) + dense(256, 1)


def test_mlp_conv_gan_normalises_with_the_momentum_keras_calls_eight_tenths():
    norms = [
        layer
        for network in models.create("mlp_conv_gan")
        for layer in network.modules()
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))
    ]
    assert len(norms) == 10
    assert all(norm.momentum == pytest.approx(1 - 0.8) for norm in norms)


def test_mlp_conv_gan_activates_before_it_normalises_in_dense_layers():
    generator, _ = models.create("mlp_conv_gan")
    kinds = [type(layer).__name__ for layer in generator.body]
    assert kinds[:12] == ["Linear", "LeakyReLU", "BatchNorm1d"] * 4


@pytest.mark.parametrize("num_classes", [None, 5])
def test_dcgan_starts_from_the_distribution_of_radford_et_al(num_classes):
    torch.manual_seed(0)
    for network in models.create("dcgan", size=32, num_classes=num_classes):
        convs = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        assert torch.cat([m.weight.detach().flatten() for m in convs]).std() == pytest.approx(0.02, rel=0.02)
        gammas = torch.cat([m.weight.detach() for m in norms])
        assert gammas.mean() == pytest.approx(1, abs=0.01)
        assert gammas.std() == pytest.approx(0.02, rel=0.2)
        assert not torch.cat([m.bias for m in norms]).any()


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_every_parameter_gets_a_gradient(name, options):
    generator, discriminator = make(name, options)
    count = 2 * (options["num_classes"] or 1)
    latent, labels = inputs(generator, count)  # every class: each has rows of its own
    discriminator(generator(latent, labels), labels).square().sum().backward()
    for network in (generator, discriminator):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    # The first layer's gradient has come through all the others.
    assert next(generator.body.parameters()).grad.any()


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_evaluation_is_deterministic_and_looks_at_each_image_alone(name, options):
    generator, discriminator = make(name, options)
    latent, labels = inputs(generator)
    first = None if labels is None else labels[:1]
    generator.eval(), discriminator.eval()
    images = generator(latent, labels)
    assert torch.equal(images, generator(latent, labels))
    torch.testing.assert_close(images[:1], generator(latent[:1], first))
    torch.testing.assert_close(discriminator(images, labels)[:1], discriminator(images[:1], first))


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_state_dict_carries_the_networks_to_new_ones(name, options):
    pair, other = make(name, options), make(name, options, seed=1)
    latent, labels = inputs(pair[0])
    pair[1](pair[0](latent, labels), labels)  # moves the running statistics away from their start
    for source, target in zip(pair, other):
        target.load_state_dict(source.state_dict())
        source.eval(), target.eval()
    images = pair[0](latent, labels)
    assert torch.equal(images, other[0](latent, labels))
    assert torch.equal(pair[1](images, labels), other[1](images, labels))


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_real_and_generated_images_in_one_batch_are_judged_as_in_two(name, options):
    _, together = make(name, options)
    _, apart = make(name, options)
    size, channels = together.size, together.channels
    real, fake = torch.randn(4, channels, size, size).tanh(), torch.rand(4, channels, size, size)
    labels = None if together.num_classes is None else torch.arange(8) % together.num_classes
    halves = (None, None) if labels is None else labels.chunk(2)
    with statistics_groups(together, 2):
        logits = together(torch.cat([real, fake]), labels)
    torch.testing.assert_close(
        logits, torch.cat([apart(real, halves[0]), apart(fake, halves[1])]), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(together.state_dict(), apart.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dcgan", "mlp_conv_gan"])
def test_label_changes_the_image_and_the_verdict(name):
    options = {"num_classes": 3, **({"size": 16, "width": 4} if name == "dcgan" else {})}
    generator, discriminator = make(name, options)
    generator.eval(), discriminator.eval()
    latent = torch.randn(1, 100).expand(3, -1)
    images = generator(latent, torch.arange(3))
    assert not torch.allclose(images[0], images[1])
    verdicts = discriminator(images[:1].expand(3, -1, -1, -1), torch.arange(3))
    assert len(set(verdicts.tolist())) == 3


@pytest.fixture(scope="module")
def conditional():
    return models.create("dcgan", size=16, channels=1, num_classes=3, width=4)


@pytest.fixture(scope="module")
def unconditional():
    return models.create("dcgan", size=16, channels=1, width=4)


def both(pair, labels, count=2):
    """The two calls that take labels, each with images or latents that are right."""
    generator, discriminator = pair
    yield lambda: generator(torch.zeros(count, 100), labels)
    yield lambda: discriminator(torch.zeros(count, 1, 16, 16), labels)


def test_labels_are_required_where_the_networks_are_conditional(conditional):
    for call in both(conditional, None):
        with pytest.raises(ValueError, match=r"int64 tensor of shape \(2,\) .* network is conditional, got None"):
            call()


def test_labels_are_refused_where_the_networks_are_not(unconditional):
    for call in both(unconditional, torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="labels must be None: this network is unconditional"):
            call()


@pytest.mark.parametrize(
    "labels", [torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int64)]
)
def test_labels_of_another_dtype_or_shape_are_refused(conditional, labels):
    for call in both(conditional, labels):
        with pytest.raises(ValueError, match=r"int64 tensor of shape \(2,\) with values in 0\.\.2, got torch\."):
            call()


def test_labels_must_be_as_many_as_images(conditional):
    for call in both(conditional, torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"shape \(2,\) .* got torch.int64 \(3,\)"):
            call()


@pytest.mark.parametrize("label", [3, -1])
def test_labels_beyond_the_classes_are_refused(conditional, label):
    for call in both(conditional, torch.tensor([0, label])):
        with pytest.raises(ValueError, match=r"values in 0\.\.2, got values in"):
            call()


def test_labels_that_are_no_tensor_are_refused(conditional):
    for call in both(conditional, [0, 1]):
        with pytest.raises(TypeError, match=r"labels must be an int64 tensor .* got list"):
            call()


@pytest.mark.parametrize("wrong", [(2, 99), (100,), (2, 100, 1, 1)])
def test_latents_of_another_shape_are_refused(unconditional, wrong):
    with pytest.raises(ValueError, match=r"latent must be .* shape \(N, 100\), got torch.float32"):
        unconditional[0](torch.zeros(wrong))


def test_images_of_another_shape_are_refused_by_the_discriminator(unconditional):
    with pytest.raises(ValueError, match=r"shape \(N, 1, 16, 16\) in \[-1, 1\], got torch.float32 \(2, 3, 16, 16\)"):
        unconditional[1](torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_empty_batch_gives_an_empty_batch_in_evaluation(name, options):
    generator, discriminator = make(name, options)
    generator.eval(), discriminator.eval()
    images = generator(*inputs(generator, 0))
    assert images.shape == (0, generator.channels, generator.size, generator.size)
    assert discriminator(images, inputs(generator, 0)[1]).shape == (0,)
