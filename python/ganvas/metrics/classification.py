"""Accuracy and confusion matrix of a classifier, accumulated over batches (torchmetrics' multiclass counts)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from ganvas.metrics._evaluation import device_of, evaluation_mode


class ClassificationMetrics:
    """Counts of (true class, predicted class) over any number of batches, and what follows from them.

    One ``torchmetrics.classification.MulticlassConfusionMatrix`` holds the counts as int64, so the accuracy is an
    exact ratio of integers and does not depend on how the samples were cut into batches.

    Args:
        num_classes: number of classes K, at least 2.
        device: where the counts are kept; the batches may be on any device.

    Raises:
        ValueError: ``num_classes`` below 2.
    """

    def __init__(self, num_classes: int, *, device: torch.device | str = "cpu") -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        self._device = torch.device(device)
        # validate_args=False: update() below has checked the batch, with messages that name the argument.
        self._counts = MulticlassConfusionMatrix(num_classes, validate_args=False).to(self._device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add one batch; an empty batch adds nothing.

        Args:
            logits: (N, K) scores of any floating dtype; the largest of a row is the prediction, the first one on a tie.
            labels: (N,) integer classes in [0, K).

        Raises:
            ValueError: shapes that do not fit, labels that are no integers or outside [0, K), NaN among the logits
                (a NaN has no argmax; infinities are in order).
        """
        if logits.dim() != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits must have shape (N, {self.num_classes}), got {tuple(logits.shape)}")
        if labels.shape != logits.shape[:1]:
            raise ValueError(
                f"labels must have shape ({logits.shape[0]},) to go with the logits, got {tuple(labels.shape)}"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        if labels.numel() == 0:
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"labels must lie in [0, {self.num_classes}), got values from {low} to {high}")
        if logits.isnan().any():
            raise ValueError("logits contain NaN: the classifier has diverged or its input was not finite")
        self._counts.update(logits.argmax(dim=1).to(self._device), labels.to(self._device, torch.int64))

    def confusion_matrix(self) -> Tensor:
        """(K, K) int64 on the CPU: entry (i, j) counts the samples of class i that were taken for class j."""
        # confmat is the documented state of the metric; compute() would warn about the (legitimate) case of no samples.
        return self._counts.confmat.detach().cpu().clone()

    @property
    def count(self) -> int:
        """Number of samples added so far."""
        return int(self.confusion_matrix().sum())

    def accuracy(self) -> float:
        """Share of the samples whose prediction is their label, in [0, 1].

        Raises:
            ValueError: no sample was added.
        """
        counts = self.confusion_matrix()
        total = int(counts.sum())
        if total == 0:
            raise ValueError("accuracy of no samples: call update() with at least one sample first")
        return int(counts.diagonal().sum()) / total

    def per_class_accuracy(self) -> Tensor:
        """(K,) float64 on the CPU: accuracy among the samples of each class; NaN for a class without samples."""
        counts = self.confusion_matrix().double()
        return counts.diagonal() / counts.sum(dim=1)

    def reset(self) -> None:
        """Forget every sample."""
        self._counts.reset()


def evaluate_classifier(
    classifier: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    *,
    device: torch.device | str | None = None,
) -> ClassificationMetrics:
    """Run a classifier over labelled batches in evaluation mode, without gradients.

    Args:
        classifier: images (N, C, H, W) to logits (N, K). Its training mode is put back afterwards.
        batches: pairs of images and integer labels (N,), on any device. Tensors in memory serve as
            ``zip(images.split(500), labels.split(500))``.
        num_classes: number of classes K.
        device: where the classifier runs; its first parameter's device when None.

    Returns:
        The metrics of all batches together.

    Raises:
        ValueError: what :meth:`ClassificationMetrics.update` refuses, or no sample in ``batches``.
    """
    device = device_of(classifier) if device is None else torch.device(device)
    metrics = ClassificationMetrics(num_classes)
    with evaluation_mode(classifier):
        for images, labels in batches:
            metrics.update(classifier(images.to(device)), labels)
    if metrics.count == 0:
        raise ValueError("batches held no samples: nothing to evaluate")
    return metrics
