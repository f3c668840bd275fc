"""The network whose features the quality of a generator is measured in: trained by ganvas on the run's own data.

A classifier where the data has classes (its features separate what people told apart); the encoder of an autoencoder
where there is one class only. Either is small and trained briefly: it has to be the same for all epochs of a run, not
good. It is kept as ``extractor.safetensors``, so a resumed run and ``ganvas evaluate`` measure with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from ganvas import models
from ganvas.data import BatchLoader
from ganvas.metrics import ClassifierFeatures, evaluate_classifier
from ganvas.training.autoencoder import reconstruction_error
from ganvas.training.optimizers import descend, make_optimizer
from ganvas.training.run_folder import RunFolder

WEIGHTS = "extractor"
"""Name of the weights file in the run folder."""
_IMAGES_SHOWN = 60_000
_MOST_EPOCHS = 20
_LEARNING_RATE = 2e-3

ClassifierMaker = Callable[[], nn.Module]


@dataclass(frozen=True)
class Extractor:
    """A trained module from images (N, C, H, W) to features (N, D), what it is called, and how good it is."""

    module: nn.Module
    name: str
    quality: dict[str, float]


def small_classifier(description: dict[str, Any]) -> ClassifierMaker:
    """Makes fresh classifiers for the data of a run, for features and for the classification accuracy score.

    ``description``: the ``data`` section of ``config.json``.
    """
    return lambda: models.create(
        "cnn_32_64",
        num_classes=len(description["class_names"]),
        channels=description["channels"],
        size=description["size"],
    )


def obtain_extractor(
    folder: RunFolder,
    description: dict[str, Any],
    train: BatchLoader,
    test: BatchLoader,
    *,
    seed: int,
    epochs: int | None,
) -> Extractor:
    """The extractor of the run folder, trained and saved there if it is not yet.

    Args:
        description: the ``data`` section of ``config.json``.
        train: batches to train on, without augmentation, since real images are compared as they are; the extractor
            lives on its device.
        test: batches to measure ``quality`` on.
        seed: of the weights.
        epochs: of training; enough to see 60,000 images, at most 20, if None.
    """
    labelled = len(description["class_names"]) > 1
    recipe = _classifier if labelled else _autoencoder
    with torch.random.fork_rng([train.device] if train.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return recipe(folder, description, train, test, epochs)


def _classifier(
    folder: RunFolder, description: dict[str, Any], train: BatchLoader, test: BatchLoader, epochs: int | None
) -> Extractor:
    classifier = small_classifier(description)().to(train.device)
    _train_or_load(
        folder, classifier, train, epochs, lambda images, labels: F.cross_entropy(classifier(images), labels)
    )
    accuracy = evaluate_classifier(classifier, test.epoch(0), len(description["class_names"])).accuracy()
    return Extractor(ClassifierFeatures(classifier), f"{description['name']}-cnn", {"extractor/accuracy": accuracy})


def _autoencoder(
    folder: RunFolder, description: dict[str, Any], train: BatchLoader, test: BatchLoader, epochs: int | None
) -> Extractor:
    network = models.create("conv_autoencoder", channels=description["channels"], size=description["size"])
    network.to(train.device)
    _train_or_load(folder, network, train, epochs, lambda images, labels: F.mse_loss(network(images), images))
    error = reconstruction_error(network, test)
    return Extractor(_Encoder(network), f"{description['name']}-autoencoder", {"extractor/loss": error})


class _Encoder(nn.Module):
    """The first half of an autoencoder as a module of its own."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(images)  # type: ignore[operator]


def _train_or_load(
    folder: RunFolder,
    network: nn.Module,
    loader: BatchLoader,
    epochs: int | None,
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> None:
    if folder.has_weights(WEIGHTS):
        folder.load_weights(WEIGHTS, network)
        return
    epochs = epochs or min(_MOST_EPOCHS, max(1, _IMAGES_SHOWN // (len(loader) * loader.batch_size)))
    optimizer = make_optimizer("adam", network, _LEARNING_RATE)
    schedule = OneCycleLR(optimizer, [_LEARNING_RATE] * len(optimizer.param_groups), total_steps=epochs * len(loader))
    network.train()
    for epoch in range(epochs):
        for images, labels in loader.epoch(epoch):
            descend(loss_of(images, labels), network, optimizer)
            schedule.step()
    folder.save_weights(WEIGHTS, network, epochs=epochs)
