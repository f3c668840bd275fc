"""Classifiers: shapes, parameters counted by hand, determinism, refusals."""

from __future__ import annotations

import pytest
import torch

from ganvas import models

NAMES = models.names("classifier")


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (1, 8), (2, 17), (4, 64)])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_features_have_the_promised_shapes(name, channels, size):
    model = models.create(name, num_classes=7, channels=channels, size=size)
    images = torch.rand(2, channels, size, size) * 2 - 1
    assert model(images).shape == (2, 7)
    assert model.features(images).shape == (2, model.head.in_features)


@pytest.mark.parametrize("name", NAMES)
def test_default_takes_colour_images_of_32_pixels_and_ten_classes(name):
    model = models.create(name)
    assert (model.num_classes, model.channels, model.size) == (10, 3, 32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_a_linear_map_of_the_features(name):
    model = models.create(name, size=16).eval()
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(model(images), model.head(model.features(images)))


def dense(inputs, outputs):
    return inputs * outputs + outputs


def conv(inputs, outputs):
    return inputs * outputs * 9 + outputs


def conv_bn(inputs, outputs):
    return inputs * outputs * 9 + 2 * outputs


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mlp", dense(32 * 32 * 3, 128) + dense(128, 10)),
        ("cnn_32_64", conv(3, 32) + conv(32, 64) + dense(8 * 8 * 64, 128) + dense(128, 10)),
        ("cnn_32_64_128", conv(3, 32) + conv(32, 64) + conv(64, 128) + dense(4 * 4 * 128, 64) + dense(64, 10)),
        ("cnn_32_64_128_dropout", conv(3, 32) + conv(32, 64) + conv(64, 128) + dense(4 * 4 * 128, 64) + dense(64, 10)),
        (
            "resnet",
            conv_bn(3, 32) + 2 * conv_bn(32, 32)
            + conv_bn(32, 64) + 2 * conv_bn(64, 64)
            + conv_bn(64, 128) + 2 * conv_bn(128, 128)
            + dense(128, 10),
        ),
    ],
)  # fmt: skip
def test_parameters_number_what_the_architecture_says(name, parameters):
    assert sum(parameter.numel() for parameter in models.create(name).parameters()) == parameters


def test_resnet_follows_every_convolution_by_batch_norm_and_leaky_relu():
    layers = [layer for layer in models.create("resnet").modules() if not list(layer.children())]
    kinds = [type(layer).__name__ for layer in layers]
    starts = [i for i, kind in enumerate(kinds) if kind == "Conv2d"]
    assert len(starts) == 9
    assert all(kinds[i : i + 3] == ["Conv2d", "BatchNorm2d", "LeakyReLU"] for i in starts)


def test_dropout_changes_training_and_not_evaluation():
    model = models.create("cnn_32_64_128_dropout", dropout=0.5)
    images = torch.rand(4, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_does_not_depend_on_the_other_images_of_the_batch(name):
    model = models.create(name, size=16).eval()
    images = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    model = models.create(name, size=16)
    torch.nn.functional.cross_entropy(model(torch.rand(4, 3, 16, 16)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_carries_the_network_to_a_new_one(name):
    torch.manual_seed(0)
    model = models.create(name, size=16)
    model(torch.rand(8, 3, 16, 16))  # moves the running statistics away from their start
    other = models.create(name, size=16)
    other.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(model.eval()(images), other.eval()(images))


@pytest.mark.parametrize("method", ["forward", "features"])
@pytest.mark.parametrize("name", NAMES)
def test_images_of_another_shape_are_refused_with_the_expected_one(name, method):
    model = models.create(name, channels=1, size=16)
    for wrong in [(2, 3, 16, 16), (2, 1, 16, 17), (1, 16, 16), (2, 256)]:
        with pytest.raises(ValueError, match=r"shape \(N, 1, 16, 16\) in \[-1, 1\], got torch.float32"):
            getattr(model, method)(torch.zeros(wrong))


def test_images_that_are_bytes_are_refused():
    with pytest.raises(ValueError, match=r"floating point tensor .* got torch.uint8 \(2, 3, 32, 32\)"):
        models.create("mlp")(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_images_that_are_no_tensor_are_refused():
    with pytest.raises(TypeError, match=r"images must be a floating point tensor .* got list"):
        models.create("mlp")([1.0])
