"""Features of images for the metrics of generators: which extractor it was, and numbers that can be trusted.

A feature metric means nothing without its extractor: two Fréchet distances compare only if the same weights made both
features. So every extractor is identified by a fingerprint of its weights.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ganvas.metrics._evaluation import device_of, evaluation_mode


class ClassifierFeatures(nn.Module):
    """The penultimate layer of a classifier as a module of its own: images (N, C, H, W) to features (N, D).

    Args:
        classifier: a module with a method ``features(images)`` that returns (N, D), as ganvas' classifiers have.

    Raises:
        TypeError: ``classifier`` has no callable ``features``.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        if not callable(getattr(classifier, "features", None)):
            raise TypeError(
                f"classifier must have a method features(images) -> (N, D), {type(classifier).__name__} has none"
            )
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)  # type: ignore[operator]  # checked above


def fingerprint(module: nn.Module, length: int = 6) -> str:
    """First ``length`` hexadecimal digits of the SHA-256 of the module's ``state_dict``.

    Hashed are, in the order of the sorted keys, each key, dtype, shape and the bytes of the values in row-major order.
    So the fingerprint depends on neither the device nor the memory format nor the order in which layers were
    registered, and any changed weight or running statistic changes it. The code of ``forward`` is not hashed.

    Raises:
        TypeError: the ``state_dict`` holds something other than tensors.
    """
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"module can only be fingerprinted by tensors, its state_dict has {type(value).__name__} under '{key}'"
            )
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)};".encode())
        # As uint8, because NumPy knows no bfloat16; flat, because a 0-dim tensor can't be viewed as another dtype.
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:length]


def check_features(features: Tensor, argument: str = "features", num_features: int | None = None) -> None:
    """Raise unless ``features`` is a non-empty, finite, floating point (N, D) matrix.

    Args:
        features: what to check.
        argument: the name to use in the message.
        num_features: the D that is expected, None for any.

    Raises:
        TypeError: no tensor.
        ValueError: wrong rank, dtype or D, no samples, NaN or infinite values.
    """
    if not isinstance(features, Tensor):
        raise TypeError(f"{argument} must be a tensor of shape (N, D), got {type(features).__name__}")
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(
            f"{argument} must be a floating point tensor of shape (N, D), got {features.dtype} {tuple(features.shape)}"
        )
    if features.numel() == 0:
        raise ValueError(f"{argument} must hold at least one sample and one feature, got shape {tuple(features.shape)}")
    if num_features is not None and features.shape[1] != num_features:
        raise ValueError(f"{argument} must have {num_features} features like the others, got {features.shape[1]}")
    bad = int((~features.isfinite()).any(dim=1).sum())
    if bad:
        raise ValueError(
            f"{argument} must be finite, but {bad} of {features.shape[0]} samples hold NaN or infinite values:"
            " the images or the extractor's weights are not finite"
        )


class FeatureExtractor:
    """A frozen copy of a module that turns images into features, together with the name that identifies it.

    The module is copied, put in evaluation mode and never trained again, so that the name goes on telling the truth
    when the original is trained further. Autocast is switched off inside: the features (and with them the metric) do
    not depend on the precision the surrounding training loop happens to use.

    Args:
        module: images (N, C, H, W) in [-1, 1] to features (N, D); a classifier is wrapped in
            :class:`ClassifierFeatures` first.
        name: what people call it, for example ``"digits-cnn"``.

    Attributes:
        identity: ``name@fingerprint``, for example ``"digits-cnn@1a2b3c"``.

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
        ValueError: ``name`` is empty.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module from images to features, got {type(module).__name__}")
        if not name:
            raise ValueError("name must not be empty: a feature metric is named after its extractor")
        self._module = copy.deepcopy(module).eval().requires_grad_(False)
        self.identity = f"{name}@{fingerprint(self._module)}"

    @property
    def device(self) -> torch.device:
        return device_of(self._module)

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, D) of one batch (N, C, H, W) in [-1, 1], on the extractor's device.

        Raises:
            ValueError: images that are no floating point (N, C, H, W) or none at all; features of the wrong shape,
                or NaN or infinite ones.
        """
        if images.dim() != 4 or not images.is_floating_point():
            raise ValueError(
                "images must be a floating point tensor of shape (N, C, H, W) in [-1, 1],"
                f" got {images.dtype} {tuple(images.shape)}"
            )
        if images.shape[0] == 0:
            raise ValueError("images must hold at least one image, got a batch of 0")
        images = images.to(self.device)
        with evaluation_mode(self._module), torch.autocast(images.device.type, enabled=False):
            features = self._module(images)
        check_features(features, "features of the extractor")
        if features.shape[0] != images.shape[0]:
            raise ValueError(
                "the extractor must return one row per image,"
                f" got {features.shape[0]} rows for {images.shape[0]} images"
            )
        return features

    def extract(self, batches: Iterable[Tensor]) -> Tensor:
        """Features of several batches of images, one below the other: (sum of N, D).

        Raises:
            ValueError: as :meth:`__call__`, or no batch at all.
        """
        features = [self(images) for images in batches]
        if not features:
            raise ValueError("batches held no images: no features to extract")
        return torch.cat(features)
