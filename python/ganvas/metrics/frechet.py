"""Fréchet distance between real and generated images, over the features of a given extractor.

    d²(N(μ₁, Σ₁), N(μ₂, Σ₂)) = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁^½ Σ₂ Σ₁^½)^½

(Dowson & Landau 1982; on features of images: Heusel et al. 2017, arXiv:1706.08500, eq. 6.) Only over Inception-v3's
features is this number called "FID". Over any other extractor it has another scale and another meaning, so here it
carries the extractor's name and fingerprint: ``FD[digits-cnn@1a2b3c]``.

Why not ``torchmetrics.image.FrechetInceptionDistance(feature=module)``, whose value this one equals (a test compares
them): it must know the number of features before the first batch or runs the extractor on random 299×299 images to find
out, rounds the result to the features' dtype, takes the eigenvalues of the non-symmetric Σ₁Σ₂, which singular
covariances (fewer samples than features) disturb, and keeps the statistics of the real images inside of one object,
where two evaluations can't share them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ganvas.metrics.features import FeatureExtractor, check_features


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of feature vectors, in float64, in a form in which two sets combine exactly.

    Attributes:
        count: number of vectors N.
        mean: (D,) float64.
        scatter: (D, D) float64, Σᵢ (xᵢ − mean)(xᵢ − mean)ᵀ. Centred sums, since E[xxᵀ] − μμᵀ would cancel for features
            whose mean is large against their spread.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of one batch of features (N, D), N ≥ 1, any floating dtype.

        Raises:
            ValueError: no floating point (N, D), empty, NaN or infinite.
        """
        check_features(features)
        features = features.detach().double()
        mean = features.mean(dim=0)
        centred = features - mean
        return cls(features.shape[0], mean, centred.T @ centred)

    def merged(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets together (Chan, Golub & LeVeque 1983, the pairwise update).

        Raises:
            ValueError: different numbers of features.
        """
        _check_same_width(self, other)
        count = self.count + other.count
        delta = other.mean.to(self.mean.device) - self.mean
        mean = self.mean + delta * (other.count / count)
        between_sets = torch.outer(delta, delta) * (self.count * other.count / count)
        return FeatureStatistics(count, mean, self.scatter + other.scatter.to(self.scatter.device) + between_sets)

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, the unbiased estimate scatter / (N − 1).

        Raises:
            ValueError: fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Fréchet (2-Wasserstein) distance between the two Gaussians with these statistics.

    With fewer samples than features a covariance is singular. The value is finite and right for the covariances given,
    but the estimate is biased upwards by sampling, the more the fewer samples: compare only distances that were made
    with the same number of samples, and prefer several times D.

    Returns:
        The distance, at least 0 (a value below, by rounding, is 0).

    Raises:
        ValueError: different numbers of features, fewer than two samples on one side.
    """
    _check_same_width(first, second)
    first_covariance, second_covariance = first.covariance, second.covariance.to(first.mean.device)
    shift = (first.mean - second.mean.to(first.mean.device)).square().sum()
    # tr (Σ₁^½ Σ₂ Σ₁^½)^½ is tr (A Aᵀ)^½ for A = Σ₁^½ Σ₂^½, the sum of A's singular values. In this form nothing that
    # rounding made slightly negative comes under a root.
    overlap = torch.linalg.svdvals(_symmetric_root(first_covariance) @ _symmetric_root(second_covariance)).sum()
    distance = shift + first_covariance.trace() + second_covariance.trace() - 2 * overlap
    return max(0.0, float(distance))


def _symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric positive semidefinite root of such a matrix (D, D), also of a singular one."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    # A zero eigenvalue comes out as ± rounding error, and the root would turn 1e-16 into 1e-8: below the resolution of
    # the decomposition it is zero (the convention of matrix_rank).
    resolution = eigenvalues[-1].clamp(min=0) * matrix.shape[0] * torch.finfo(matrix.dtype).eps
    roots = torch.where(eigenvalues > resolution, eigenvalues, 0.0).sqrt()
    return (vectors * roots) @ vectors.T


def _check_same_width(first: FeatureStatistics, second: FeatureStatistics) -> None:
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            "both sides must have the same number of features,"
            f" got {first.mean.shape[0]} and {second.mean.shape[0]}: did two extractors make them?"
        )


class FrechetDistance:
    """Fréchet distance of generated images to real ones over the features of ``extractor``.

    The real side is accumulated once and kept, through :meth:`reset`, for as many evaluations as a GAN run has::

        distance = FrechetDistance(ClassifierFeatures(classifier), name="digits-cnn")
        for images, _ in real_batches:
            distance.update(images, real=True)
        ...                                             # each evaluation:
        for images in generated_batches:
            distance.update(images, real=False)
        log[distance.name] = distance.compute()         # "FD[digits-cnn@1a2b3c]"
        distance.reset()

    Args:
        extractor: module from images (N, C, H, W) in [-1, 1] to features (N, D). It is copied; the copy is frozen, in
            evaluation mode.
        name: what the extractor is called.

    Attributes:
        extractor: the frozen copy as a :class:`FeatureExtractor`; other metrics can use it too, see
            :meth:`update_features`.
        name: the name of the metric, with the extractor's fingerprint.
        real: :class:`FeatureStatistics` of the real images; None before the first. It may be set to statistics that
            another ``FrechetDistance`` with the same extractor has gathered.
        generated: the same for the generated ones.

    Raises:
        TypeError: ``extractor`` is no ``nn.Module``.
        ValueError: ``name`` is empty.
    """

    def __init__(self, extractor: nn.Module, name: str) -> None:
        self.extractor = FeatureExtractor(extractor, name)
        self.name = f"FD[{self.extractor.identity}]"
        self.real: FeatureStatistics | None = None
        self.generated: FeatureStatistics | None = None

    def update(self, images: Tensor, *, real: bool) -> None:
        """Add a batch of images (N, C, H, W), floating point in [-1, 1], to the real or the generated side.

        Raises:
            ValueError: images that are none, and features that are NaN, infinite or of another width than before.
        """
        self.update_features(self.extractor(images), real=real)

    def update_features(self, features: Tensor, *, real: bool) -> None:
        """Add features (N, D) that ``self.extractor`` has made, for a caller who needs them for other metrics as well.

        Raises:
            ValueError: empty, NaN or infinite features, or of another width than those before.
        """
        batch = FeatureStatistics.of(features)
        for known in (self.real, self.generated):
            if known is not None:
                _check_same_width(known, batch)
        if real:
            self.real = batch if self.real is None else self.real.merged(batch)
        else:
            self.generated = batch if self.generated is None else self.generated.merged(batch)

    def compute(self) -> float:
        """The distance between everything added on either side.

        Raises:
            ValueError: a side with fewer than two images.
        """
        if self.real is None or self.generated is None:
            missing = "real" if self.real is None else "generated"
            raise ValueError(f"no {missing} images: call update(images, real={missing == 'real'}) first")
        return frechet_distance(self.real, self.generated)

    def reset(self) -> None:
        """Forget the generated side; the real one stays."""
        self.generated = None
