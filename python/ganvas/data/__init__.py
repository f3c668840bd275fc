"""Image data: sources by name, tensors that stay on the training device, and a loader that can resume anywhere.

``load(name, ...)`` reads one of ``names()`` and returns an ``ImageDataset``; ``BatchLoader`` turns that, or any torch
Dataset of (image, label), into batches of float32 images in [-1, 1] on the training device, augmented there by an
``Augmentation``.
"""

from .adapt import as_image_dataset, to_image_tensor
from .augmentation import Augmentation
from .dataset import ImageDataset, InMemoryDataset, UnreadableFile
from .folder import StreamedFolder
from .image_files import read_image
from .loader import BatchLoader
from .options import DEFAULT_MEMORY_LIMIT
from .pixels import to_float, to_uint8
from .sources import load, names

__all__ = [
    "DEFAULT_MEMORY_LIMIT",
    "Augmentation",
    "BatchLoader",
    "ImageDataset",
    "InMemoryDataset",
    "StreamedFolder",
    "UnreadableFile",
    "as_image_dataset",
    "load",
    "names",
    "read_image",
    "to_float",
    "to_image_tensor",
    "to_uint8",
]
