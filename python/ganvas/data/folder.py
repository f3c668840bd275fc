"""A folder of image files as a data set: decoded into memory when the pixels fit, streamed from the files when not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .dataset import ImageDataset, InMemoryDataset, UnreadableFile
from .folder_listing import FolderListing, list_folder
from .image_files import FORMATS, decode_files, read_image
from .options import LoadOptions

NATURAL_SIZE_RANGE = (8, 64)
HEADER_SAMPLE = 1000
"""Training files whose headers decide the natural size and channels."""
MAX_LISTED = 10
"""Unreadable files that an error message names before it only counts."""
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")


@dataclass(frozen=True, eq=False, kw_only=True)
class StreamedFolder(ImageDataset):
    """A folder that is too large for memory: an item is decoded when it is asked for.

    paths: the N image files, in the order of ``labels``.
    """

    paths: tuple[str, ...] = field(repr=False)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(self.paths[index], self.size, self.channels), int(self.labels[index])


def load(options: LoadOptions) -> ImageDataset:
    """Read one split of a folder (layouts: ``folder_listing``).

    Every file is decoded once here, also when the set is streamed later, so that a damaged file is known before
    training.
    Raises FileNotFoundError or ValueError; unreadable files are all found first and raised as one ValueError,
    unless ``options.skip_unreadable``.
    """
    root = options.require_root("folder", "CLASS/ folders of images, or train/CLASS/ and test/CLASS/")
    listing = list_folder(root)
    if len(listing.class_names) < options.min_classes:
        raise ValueError(
            f"root {str(root)!r} has {len(listing.class_names)} class ({', '.join(listing.class_names)}), at least "
            f"{options.min_classes} are needed: put the images of each class in a folder of their own, ROOT/CLASS/. "
            "An unconditional generator or an autoencoder can do with min_classes=1"
        )
    files = listing.train if options.split == "train" else listing.test
    if not files:
        raise ValueError(f"root {str(root)!r} has no images for the {options.split} split")
    size, channels = natural_format(listing)
    return read_files(files, listing.class_names, options.size or size, options.channels or channels, options)


def read_files(
    files: Sequence[tuple[Path, int]], class_names: tuple[str, ...], size: int, channels: int, options: LoadOptions
) -> ImageDataset:
    """Decode the files of one split, into memory if they fit."""
    paths = [path for path, _ in files]
    labels = np.array([label for _, label in files], dtype=np.int64)
    shape = (len(paths), channels, size, size)
    fits = np.prod(shape, dtype=object) <= options.memory_limit
    # In channels_last memory order, as decoded pixels lie and as the loader wants them.
    images = np.empty((len(paths), size, size, channels), dtype=np.uint8).transpose(0, 3, 1, 2) if fits else None
    failures = decode_files(paths, size, channels, images)
    if failures and not options.skip_unreadable:
        raise ValueError(describe_failures(paths, failures))

    readable = np.array([index for index in range(len(paths)) if index not in failures], dtype=np.int64)
    lost = sorted(set(labels) - set(labels[readable]))
    if lost and (options.split == "train" or not len(readable)):
        lost_names = ", ".join(class_names[label] for label in lost)
        raise ValueError(f"no readable image is left of class {lost_names}; {describe_failures(paths, failures)}")

    shared: dict[str, Any] = dict(
        name="folder",
        split=options.split,
        class_names=class_names,
        channels=channels,
        size=size,
        labels=torch.from_numpy(labels[readable]),
        skipped=tuple(UnreadableFile(str(paths[index]), failures[index]) for index in sorted(failures)),
    )
    if images is None:
        return StreamedFolder(paths=tuple(str(paths[index]) for index in readable), **shared)
    return InMemoryDataset(images=torch.from_numpy(images[readable] if failures else images), **shared)


def describe_failures(paths: Sequence[Path], failures: dict[int, str]) -> str:
    """The message that lists the unreadable files: the first of them by name, and how many there are."""
    listed = [f"  {paths[index]}: {failures[index]}" for index in sorted(failures)[:MAX_LISTED]]
    if len(failures) > MAX_LISTED:
        listed.append(f"  ... and {len(failures) - MAX_LISTED} more")
    return "\n".join(
        [
            f"{len(failures)} of {len(paths)} image files cannot be read; "
            "repair or remove them, or leave them out with skip_unreadable=True (--skip-unreadable):",
            *listed,
        ]
    )


def natural_format(listing: FolderListing) -> tuple[int, int]:
    """(size, channels) of a folder, read from the headers of up to 1000 training files spread over the classes.

    The size is the most common shorter side, between 8 and 64 (the larger of two equally common ones); the channels are
    1 if every file is grey, else 3. Both splits get the same answer, because only training files are asked.
    """
    sides: Counter[int] = Counter()
    all_grey = True
    for path, _ in listing.train[:: -(-len(listing.train) // HEADER_SAMPLE)]:
        try:
            with Image.open(path, formats=FORMATS) as image:
                sides[min(image.size)] += 1
                all_grey &= image.mode in GREY_MODES
        except Exception:  # reported with its reason when the file is decoded
            continue
    if not sides:
        return NATURAL_SIZE_RANGE[1], 3
    side = max(sides, key=lambda side: (sides[side], side))
    return min(max(side, NATURAL_SIZE_RANGE[0]), NATURAL_SIZE_RANGE[1]), 1 if all_grey else 3
