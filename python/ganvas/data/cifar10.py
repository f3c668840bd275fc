"""CIFAR-10 from its binary or its python batches.

A binary batch is a row of records of 1 + 3072 bytes: the label, then 32x32 red, green and blue planes. A python batch
is a pickled dict of the same planes (``data``, (N, 3072) uint8) and ``labels``.
Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from . import restricted_pickle
from .dataset import InMemoryDataset, fit_to_options
from .options import LoadOptions

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SUBFOLDERS = (".", "cifar-10-batches-bin", "cifar-10-batches-py")
PIXELS = 3 * 32 * 32
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
MAX_FILE_BYTES = 64 * 1024**2
"""Twice the size of a real batch: a larger file is something else, and is not read."""

Batch = tuple[np.ndarray, np.ndarray]


def load(options: LoadOptions) -> InMemoryDataset:
    """Read one split: (N, 3, 32, 32) uint8. Raises FileNotFoundError or ValueError, naming the file."""
    root = options.require_root(
        "cifar10", "data_batch_1.bin ... test_batch.bin, or the same names without .bin (python batches)"
    )
    paths, read_batch = find_batches(root, BATCHES[options.split])
    for path in paths:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path}: oversized: {path.stat().st_size:,} bytes, where a batch has about 31 million")
    batches = [read_batch(path) for path in paths]
    counts = [len(labels) for _, labels in batches]
    if len(set(counts)) > 1:
        raise ValueError(f"{root}: the training batches must be of one size; got {counts} images: is one truncated?")
    images = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([labels for _, labels in batches]).astype(np.int64)
    return fit_to_options("cifar10", torch.from_numpy(images), torch.from_numpy(labels), CLASS_NAMES, options)


def find_batches(root: Path, names: tuple[str, ...]) -> tuple[list[Path], Callable[[Path], Batch]]:
    """The files of a split and the function that reads them. Raises FileNotFoundError, naming what is missing."""
    for folder in SUBFOLDERS:
        for suffix, read_batch in ((".bin", read_binary_batch), ("", read_python_batch)):
            paths = [root / folder / (name + suffix) for name in names]
            missing = [path.name for path in paths if not path.is_file()]
            if not missing:
                return paths, read_batch
            if len(missing) < len(paths):
                raise FileNotFoundError(f"{root / folder} lacks {', '.join(missing)}")
    archives = ", ".join(sorted(path.name for path in root.glob("cifar-10*.tar.gz")))
    hint = f"; unpack {archives} first" if archives else ""
    raise FileNotFoundError(f"root {str(root)!r} has neither {names[0]}.bin nor {names[0]}{hint}")


def read_binary_batch(path: Path) -> Batch:
    """(N, 3072) uint8 pixels and (N,) labels. Raises ValueError unless the file is a whole number of good records."""
    content = np.fromfile(path, dtype=np.uint8)
    record = 1 + PIXELS
    if not len(content) or len(content) % record:
        raise ValueError(
            f"{path}: truncated or oversized: {len(content):,} bytes are not a whole number of records of {record:,}"
        )
    records = content.reshape(-1, record)
    return np.ascontiguousarray(records[:, 1:]), check_labels(path, records[:, 0])


def read_python_batch(path: Path) -> Batch:
    """(N, 3072) uint8 pixels and (N,) labels of a pickled batch. Raises ValueError; runs nothing that the pickle
    names."""
    with path.open("rb") as file:
        try:
            batch = restricted_pickle.load_dict(file)
        except Exception as error:  # a damaged pickle makes the standard library raise nearly anything
            raise ValueError(f"{path}: not a CIFAR-10 python batch: {error}") from error
    pixels = batch.get(b"data", batch.get("data"))
    labels = batch.get(b"labels", batch.get("labels"))
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        raise ValueError(f"{path}: not a CIFAR-10 python batch: 'data' must be a uint8 array of shape (N, {PIXELS})")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(label) is int for label in labels):
        raise ValueError(f"{path}: not a CIFAR-10 python batch: 'labels' must be a list of {len(pixels)} integers")
    if not labels:
        raise ValueError(f"{path} holds no images")
    return pixels, check_labels(path, np.array(labels))


def check_labels(path: Path, labels: np.ndarray) -> np.ndarray:
    """The labels, if all are 0 to 9; else ValueError."""
    if labels.min() < 0 or labels.max() >= len(CLASS_NAMES):
        raise ValueError(f"{path}: labels must be 0 to 9; got {labels.min()} to {labels.max()}")
    return labels
