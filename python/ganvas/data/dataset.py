"""The data sets that ``load`` returns: what they share, and the form that stays in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .options import LoadOptions
from .pixels import convert_channels, resize


class UnreadableFile(NamedTuple):
    """A file that was left out of a data set, and why."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageDataset(Dataset):
    """Labelled square images; item ``i`` is (image uint8 (C, size, size), label int).

    labels: (N,) int64, indices into ``class_names``.
    skipped: the unreadable files that were left out.
    Raises TypeError or ValueError if the labels are not such.
    """

    name: str
    split: str = "train"
    class_names: tuple[str, ...]
    channels: int
    size: int
    labels: Tensor = field(repr=False)
    skipped: tuple[UnreadableFile, ...] = ()

    def __post_init__(self) -> None:
        if self.labels.dtype != torch.int64 or self.labels.dim() != 1:
            raise TypeError(f"labels must be int64 of shape (N,); got {self.labels.dtype} {tuple(self.labels.shape)}")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.class_names):
            raise ValueError(
                f"labels must be 0 to {len(self.class_names) - 1} for {len(self.class_names)} class names; "
                f"got {int(self.labels.min())} to {int(self.labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class InMemoryDataset(ImageDataset):
    """A data set whose pixels are one tensor, which ``BatchLoader`` keeps on the training device.

    images: (N, C, size, size) uint8; in channels_last memory order the loader needs no copy. Raises TypeError or
    ValueError if the tensors are not such.
    """

    images: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = (len(self.labels), self.channels, self.size, self.size)
        if self.images.dtype != torch.uint8 or tuple(self.images.shape) != expected:
            raise TypeError(
                f"images must be uint8 of shape (N, channels, size, size) = {expected}; "
                f"got {self.images.dtype} {tuple(self.images.shape)}"
            )

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def fit_to_options(
    name: str, images: Tensor, labels: Tensor, class_names: tuple[str, ...], options: LoadOptions
) -> InMemoryDataset:
    """A source's own pixels, brought to the size and channels that were asked for.

    images: (N, C, H, H) uint8; labels: (N,) int64.
    Raises ValueError, before the pixels are resized, if the result would exceed ``options.memory_limit`` bytes.
    """
    channels = options.channels or images.shape[1]
    size = options.size or images.shape[2]
    num_bytes = len(images) * channels * size * size
    if num_bytes > options.memory_limit:
        raise ValueError(
            f"{name} at size={size}, channels={channels} takes {num_bytes:,} bytes, "
            f"more than memory_limit={options.memory_limit:,}; ask for a smaller size or raise memory_limit"
        )
    return InMemoryDataset(
        name=name,
        split=options.split,
        class_names=class_names,
        channels=channels,
        size=size,
        images=resize(convert_channels(images, channels), size).contiguous(memory_format=torch.channels_last),
        labels=labels,
    )
