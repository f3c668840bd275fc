"""Modules over :mod:`ganvas.ops`, and :func:`convert`, which makes an existing model use them."""

from ganvas.nn.blocks import ConvBNLeakyReLU, ConvTransposeBNLeakyReLU, LinearBNLeakyReLU
from ganvas.nn.convert import convert, revert
from ganvas.nn.fused import FusedSequential
from ganvas.nn.proof import Comparison, ConversionError, Proof
from ganvas.nn.report import ConversionReport, FusedRun, Skipped
from ganvas.nn.statistics_groups import statistics_groups, supports_statistics_groups

__all__ = [
    "Comparison",
    "ConvBNLeakyReLU",
    "ConvTransposeBNLeakyReLU",
    "ConversionError",
    "ConversionReport",
    "FusedRun",
    "FusedSequential",
    "LinearBNLeakyReLU",
    "Proof",
    "Skipped",
    "convert",
    "revert",
    "statistics_groups",
    "supports_statistics_groups",
]
