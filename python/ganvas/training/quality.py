"""How good a generator is: Fréchet distance, precision, recall, diversity, classification accuracy score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ganvas.data import BatchLoader, ImageDataset
from ganvas.metrics import (
    FrechetDistance,
    classification_accuracy_score,
    image_spread,
    precision_recall,
    sample_diversity,
)
from ganvas.training.extractor import Extractor, small_classifier
from ganvas.training.preparation import EVALUATION_BATCH

_LEAST_TEST_IMAGES = 1000
_DIVERSITY_SAMPLES = 512
_SEED = 0x6A17  # Of the latents of all measurements: two runs are compared on the same ones.
_CAS_IMAGES_SHOWN = 80_000


def reference_set(train: ImageDataset, test: ImageDataset) -> ImageDataset:
    """The real images to compare with: the test set, or the training set where the test set is too small to estimate a
    covariance from (Fréchet distances are biased upwards by few samples)."""
    return test if len(test) >= min(_LEAST_TEST_IMAGES, len(train)) else train


class GeneratorQuality:
    """Measures generators against a fixed set of real images and on fixed latents, so that epochs compare.

    Args:
        extractor: see :mod:`ganvas.training.extractor`.
        reference: batches of real images.
        samples: how many real and how many generated images to compare, at most.
    """

    def __init__(self, extractor: Extractor, reference: BatchLoader, samples: int) -> None:
        self._device = reference.device
        self._distance = FrechetDistance(extractor.module, extractor.name)
        self.name = self._distance.name
        images, labels = _first(reference, samples)
        self._real_features = self._features(images)
        self._distance.update_features(self._real_features, real=True)
        self._labels = labels.sort().values
        images, labels = images[:_DIVERSITY_SAMPLES], labels[:_DIVERSITY_SAMPLES]
        self._spreads = {
            label: image_spread(images[labels == label])
            for label, count in zip(*(values.tolist() for values in labels.unique(return_counts=True)))
            if count >= 8
        }
        self._spread = image_spread(images)

    @torch.no_grad()
    def measure(self, averaged: nn.Module, current: nn.Module) -> dict[str, float]:
        """Numbers for the log, by metric name. Both generators are left in evaluation mode.

        Args:
            averaged: the generator whose quality is of interest, the moving average.
            current: the one in training. Its diversity is measured, since the average shows a collapse much later.
        """
        features = self._features(generate(averaged, self._labels, seed=_SEED))
        self._distance.reset()
        self._distance.update_features(features, real=False)
        precision, recall = precision_recall(self._real_features, features)
        return {
            self.name: self._distance.compute(),
            "test/precision": precision,
            "test/recall": recall,
            "test/diversity": self._diversity(current),
        }

    def _diversity(self, generator: nn.Module) -> float:
        """Of a conditional generator the mean over the classes: one image a class would look diverse as a whole."""
        if generator.num_classes is None or not self._spreads:
            return sample_diversity(generate(generator, self._labels[:_DIVERSITY_SAMPLES], seed=_SEED), self._spread)
        values = []
        for label, spread in self._spreads.items():
            # A class of equal images has nothing to fall short of.
            if spread > 0:
                labels = torch.full((64,), label, device=self._device)
                values.append(sample_diversity(generate(generator, labels, seed=_SEED), spread))
        return sum(values) / len(values) if values else 1.0

    def _features(self, images: Tensor) -> Tensor:
        return self._distance.extractor.extract(images.split(EVALUATION_BATCH))


@torch.no_grad()
def generate(generator: nn.Module, labels: Tensor, *, seed: int) -> Tensor:
    """One image per label (N, C, H, W) in [-1, 1], from latents of a seed of their own; in evaluation mode.

    ``labels``: (N,) int64 on the generator's device; an unconditional generator ignores their values.
    """
    generator.eval()
    # Drawn on the CPU, so that every device generates from the same ones; and in blocks of one size, because torch's
    # stream of normal numbers depends on how many are drawn at once, and the first images should not.
    source = torch.Generator().manual_seed(seed)
    images = []
    for batch_labels in labels.split(EVALUATION_BATCH):
        block = torch.randn(EVALUATION_BATCH, int(generator.latent_size), generator=source)  # type: ignore[arg-type]
        latent = block[: len(batch_labels)].to(labels.device)
        images.append(generator(latent, batch_labels if generator.num_classes is not None else None).float())
    return torch.cat(images)


def classification_score(
    generator: nn.Module, description: dict[str, Any], test: BatchLoader, samples: int | None
) -> float:
    """Classification accuracy score on the test set, see :func:`ganvas.metrics.classification_accuracy_score`.

    ``samples``: generated images to train on; as many as there are training images, within 2,000 and 20,000, if None.
    """
    samples = samples or min(20_000, max(2_000, description["train_images"]))
    epochs = max(2, min(20, _CAS_IMAGES_SHOWN // samples))
    return classification_accuracy_score(
        generator, small_classifier(description), test.epoch(0), num_samples=samples, epochs=epochs
    )


def _first(loader: BatchLoader, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images and labels of a loader (all if there are fewer)."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch_images, batch_labels in loader.epoch(0):
        images.append(batch_images)
        labels.append(batch_labels)
        if sum(map(len, images)) >= count:
            break
    return torch.cat(images)[:count], torch.cat(labels)[:count]
