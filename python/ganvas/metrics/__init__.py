"""Metrics of classifiers and generators, on plain tensors and modules.

==========================================  =====================================================================
Question                                    Metric
==========================================  =====================================================================
Is the classifier right?                    :class:`ClassificationMetrics`, :func:`evaluate_classifier`
Are generated images distributed as real?   :class:`FrechetDistance`, named after its extractor
Are they realistic, are all kinds there?    :func:`precision_recall`
Has the generator collapsed?                :func:`sample_diversity`
Would they do to learn the classes from?    :func:`classification_accuracy_score`
==========================================  =====================================================================
"""

from ganvas.metrics.classification import ClassificationMetrics, evaluate_classifier
from ganvas.metrics.classification_score import classification_accuracy_score
from ganvas.metrics.diversity import image_spread, sample_diversity
from ganvas.metrics.features import ClassifierFeatures, FeatureExtractor, fingerprint
from ganvas.metrics.frechet import FeatureStatistics, FrechetDistance, frechet_distance
from ganvas.metrics.manifold import PrecisionRecall, precision_recall

__all__ = [
    "ClassificationMetrics",
    "ClassifierFeatures",
    "FeatureExtractor",
    "FeatureStatistics",
    "FrechetDistance",
    "PrecisionRecall",
    "classification_accuracy_score",
    "evaluate_classifier",
    "fingerprint",
    "frechet_distance",
    "image_spread",
    "precision_recall",
    "sample_diversity",
]
