"""Each kind of network can learn: a few steps on a few images bring its loss down."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ganvas import models
from ganvas.ops import discriminator_loss, generator_loss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", models.names("classifier"))
def test_classifier_learns_a_few_images_by_heart(name):
    model = models.create(name, channels=1, size=16)
    images, labels = torch.rand(20, 1, 16, 16) * 2 - 1, torch.arange(20) % 10
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    first = None
    for _ in range(80):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        first = first or loss.item()
        if loss < 0.1 * first:
            return
    pytest.fail(f"the loss only fell from {first:.3f} to {loss.item():.3f}")


def test_autoencoder_reconstructs_a_few_images():
    model = models.create("conv_autoencoder", size=16, channels=1, latent_size=16, width=8)
    images = F.interpolate(torch.rand(16, 1, 4, 4), size=16, mode="bilinear") * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = F.mse_loss(model(images), images)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Predicting the mean image leaves the variance; well below it the latent must tell the images apart.
    assert losses[-1] < 0.3 * images.var(dim=0).mean() < losses[0]


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("dcgan", {"size": 16, "channels": 1, "width": 8, "num_classes": 2}, 40),
        # 28 million parameters for the optimisers to walk over.
        pytest.param("mlp_conv_gan", {"num_classes": 2}, 4, marks=pytest.mark.slow),
    ],
)
def test_discriminator_learns_and_then_a_generator_learns_to_fool_it(name, options, steps):
    generator, discriminator = models.create(name, **options)
    labels = torch.arange(8) % 2
    real = (2.0 * labels - 1).reshape(8, 1, 1, 1).expand(8, 1, generator.size, generator.size).contiguous()
    latent = torch.randn(8, generator.latent_size)

    def descend(network, loss_of):
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.5, 0.999))
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    with torch.no_grad():
        fake = generator(latent, labels)
    losses = descend(
        discriminator, lambda: discriminator_loss(discriminator(real, labels), discriminator(fake, labels), kind="bce")
    )
    assert losses[-1] < 0.5 * losses[0]

    losses = descend(generator, lambda: generator_loss(discriminator(generator(latent, labels), labels), kind="bce"))
    assert losses[-1] < 0.5 * losses[0]
