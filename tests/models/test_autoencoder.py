"""The autoencoder: shapes, halvings, refusals."""

from __future__ import annotations

import pytest
import torch

from ganvas import models


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 12, 28, 32, 36, 64])
def test_image_comes_back_in_its_shape_through_a_latent_of_the_given_size(size, channels):
    model = models.create("conv_autoencoder", size=size, channels=channels, latent_size=9, width=4)
    images = torch.rand(2, channels, size, size) * 2 - 1
    latent = model.encode(images)
    assert latent.shape == (2, 9)
    assert model.decode(latent).shape == images.shape
    assert model(images).abs().max() <= 1


@pytest.mark.parametrize(("size", "side"), [(8, 4), (28, 7), (32, 4), (40, 5)])
def test_map_is_halved_while_its_side_is_even_and_above_four(size, side):
    model = models.create("conv_autoencoder", size=size, width=1, latent_size=3)
    halvings = (size // side).bit_length() - 1
    channels = 2 ** (halvings - 1)
    assert model.encoder[-1].in_features == channels * side * side


def test_channels_stop_doubling_at_eight_times_the_width():
    model = models.create("conv_autoencoder", size=128, width=2, latent_size=3)
    widths = [layer.out_channels for layer in model.encoder if isinstance(layer, torch.nn.Conv2d)]
    assert widths == [2, 4, 8, 16, 16]


def test_forward_is_decoding_after_encoding():
    model = models.create("conv_autoencoder", size=8, width=4).eval()
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(model(images), model.decode(model.encode(images)))


def test_every_parameter_gets_a_gradient():
    model = models.create("conv_autoencoder", size=16, width=4)
    images = torch.rand(4, 3, 16, 16)
    torch.nn.functional.mse_loss(model(images), images).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_state_dict_carries_the_network_to_a_new_one():
    model = models.create("conv_autoencoder", size=16, width=4)
    images = torch.rand(4, 3, 16, 16)
    model(images)  # moves the running statistics away from their start
    other = models.create("conv_autoencoder", size=16, width=4)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images), other.eval()(images))


def test_images_and_latents_of_another_shape_are_refused():
    model = models.create("conv_autoencoder", size=8, width=4, latent_size=5)
    with pytest.raises(ValueError, match=r"images must be .* \(N, 3, 8, 8\) .* got torch.float32 \(2, 1, 8, 8\)"):
        model(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"latent must be .* \(N, 5\), got torch.float32 \(2, 6\)"):
        model.decode(torch.zeros(2, 6))
