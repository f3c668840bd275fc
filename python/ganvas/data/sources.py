"""Data sets by name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable

from . import cifar10, digits, folder, mnist
from .dataset import ImageDataset
from .options import DEFAULT_MEMORY_LIMIT, LoadOptions

SOURCES: dict[str, Callable[[LoadOptions], ImageDataset]] = {
    "digits": digits.load,
    "mnist": mnist.load,
    "cifar10": cifar10.load,
    "folder": folder.load,
}


def names() -> tuple[str, ...]:
    """The names that ``load`` knows."""
    return tuple(SOURCES)


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    split: str = "train",
    size: int | None = None,
    channels: int | None = None,
    skip_unreadable: bool = False,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    min_classes: int = 2,
) -> ImageDataset:
    """Read a data set.

    name: ``digits`` (scikit-learn's, needs no files), ``mnist`` (IDX files), ``cifar10`` (binary or python batches) or
        ``folder`` (class folders of PNG, JPEG or WebP files).
    root: the folder that holds the files; not for ``digits``.
    split: ``train`` or ``test``.
    size: side of the square images in pixels; None for the source's own: 8, 28, 32, and for ``folder`` the most common
        shorter side, at most 64.
    channels: 1 or 3; None for the source's own: 1, 1, 3, and for ``folder`` 1 if all files are grey, else 3.
    skip_unreadable: leave unreadable image files out and list them in ``.skipped``, instead of raising (``folder``).
    memory_limit: bytes of uint8 pixels that may stay in memory (2 GiB). A larger ``folder`` is streamed from its files;
        for the other sources it is an error.
    min_classes: how many classes a ``folder`` must have; 1 where labels do not matter, as for an unconditional GAN, and
    then
        images that lie directly in root are one class.

    Returns an ``InMemoryDataset`` (``images``, ``labels``), or a ``StreamedFolder`` when the images exceed
    memory_limit.
    Raises ValueError or TypeError for arguments or file contents that make no sense, FileNotFoundError for missing
    files.
    """
    if name not in SOURCES:
        close = difflib.get_close_matches(str(name), SOURCES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name must be one of {', '.join(SOURCES)}; got {name!r}{hint}")
    options = LoadOptions(
        root=root,
        split=split,
        size=size,
        channels=channels,
        skip_unreadable=skip_unreadable,
        memory_limit=memory_limit,
        min_classes=min_classes,
    )
    return SOURCES[name](options)
