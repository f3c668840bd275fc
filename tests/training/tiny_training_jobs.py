"""Runs of a few steps on 48 images of 16×16 pixels, one for each job; also started by processes that tests kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ganvas import models
from ganvas.data import InMemoryDataset
from ganvas.nn import FusedSequential
from ganvas.training import (
    AutoencoderConfig,
    ClassifierConfig,
    GANConfig,
    SilentProgress,
    train_autoencoder,
    train_classifier,
    train_gan,
)

CLASSES = ("left", "right", "top", "bottom")
COMMON = dict(data="tiny", device="cpu", epochs=3, batch_size=16, log_every=2, threads=1, checkpoint_seconds=1e6)
STEPS = 9
"""Of a whole run: three epochs of three batches."""


def tiny_data(split: str, *, channels: int = 1, size: int = 16, count: int = 48) -> InMemoryDataset:
    """Noise with one bright half, which is the class."""
    generator = torch.Generator().manual_seed(len(split))
    labels = torch.arange(count) % len(CLASSES)
    images = torch.randint(0, 120, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    half = size // 2
    for image, label in zip(images, labels.tolist()):
        (image[:, :, :half], image[:, :, half:], image[:, :half], image[:, half:])[label].add_(120)
    return InMemoryDataset(
        name="tiny", split=split, class_names=CLASSES, channels=channels, size=size, labels=labels, images=images
    )


def tiny_classifier() -> nn.Module:
    """With dropout, so that the global random state matters."""
    return FusedSequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.1),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def run_classifier(out: Path, *, resume: bool = False, progress: Any = None, model: Any = None, **changes: Any) -> Path:
    # A model that is passed in is made, and seeded, by the caller.
    torch.manual_seed(0)
    return train_classifier(
        ClassifierConfig(out=out, shift=1, **{**COMMON, **changes}),
        train_data=tiny_data("train"),
        test_data=tiny_data("test"),
        model=model or tiny_classifier(),
        resume=resume,
        progress=progress or SilentProgress(),
    )


def run_gan(out: Path, *, resume: bool = False, progress: Any = None, networks: Any = None, **changes: Any) -> Path:
    torch.manual_seed(0)
    options = dict(
        evaluation_samples=32,
        cas_samples=16,
        extractor_epochs=1,
        samples=8,
        r1_gamma=1.0,
        r1_every=2,
        discriminator_steps=2,
    )
    return train_gan(
        GANConfig(out=out, **{**COMMON, **options, **changes}),
        train_data=tiny_data("train"),
        test_data=tiny_data("test"),
        models=networks or models.create("dcgan", size=16, channels=1, num_classes=4, width=4, latent_size=8),
        resume=resume,
        progress=progress or SilentProgress(),
    )


def run_autoencoder(out: Path, *, resume: bool = False, progress: Any = None, **changes: Any) -> Path:
    torch.manual_seed(0)
    layers = (nn.Flatten(), nn.Linear(256, 8), nn.LeakyReLU(), nn.Linear(8, 256), nn.Unflatten(1, (1, 16, 16)))
    return train_autoencoder(
        AutoencoderConfig(out=out, latent_size=4, samples=8, **{**COMMON, **changes}),
        train_data=tiny_data("train"),
        test_data=tiny_data("test"),
        model=nn.Sequential(*layers),
        resume=resume,
        progress=progress or SilentProgress(),
    )


JOBS: dict[str, Callable[..., Path]] = {
    "classifier": run_classifier,
    "gan": run_gan,
    "autoencoder": run_autoencoder,
}
