"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, part of the scikit-learn package.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository.
"""

from __future__ import annotations

import numpy as np
import torch

from .dataset import InMemoryDataset, fit_to_options
from .options import LoadOptions

CLASS_NAMES = tuple("0123456789")
TEST_EVERY = 5
"""The set has no split of its own: of each class, in file order, every fifth image is a test image."""


def load(options: LoadOptions) -> InMemoryDataset:
    """The digits as uint8, their 0..16 ink levels spread over 0..255. Raises ValueError if a root is given."""
    if options.root is not None:
        raise ValueError(f"data set 'digits' comes with scikit-learn and takes no root; got {str(options.root)!r}")
    from sklearn.datasets import load_digits  # a second of import time, which the other sources need not pay

    ink, labels = load_digits(return_X_y=True)
    pixels = np.rint(ink.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    chosen = in_test_split(labels) if options.split == "test" else ~in_test_split(labels)
    return fit_to_options(
        "digits",
        torch.from_numpy(pixels[chosen]),
        torch.from_numpy(labels[chosen].astype(np.int64)),
        CLASS_NAMES,
        options,
    )


def in_test_split(labels: np.ndarray) -> np.ndarray:
    """(N,) class indices to an (N,) mask of the test images: stratified, fixed, free of any random generator."""
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        mask[np.flatnonzero(labels == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return mask
