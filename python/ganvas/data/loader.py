"""Batches of float images on the training device, in an order that can be taken up again at any batch.

Order and augmentation are a pure function of (seed, epoch, batch index), independent of the device, of the number of
workers and of every global random generator: ``epoch(3, start=17)`` yields what ``epoch(3)`` yields from its 18th batch
on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .adapt import FloatRange, read_items, to_unit_range
from .augmentation import Augmentation
from .dataset import ImageDataset, InMemoryDataset
from .folder import StreamedFolder
from .image_files import available_cores
from .options import require_integer
from .pixels import to_float

Batch = tuple[Tensor, Tensor]
MAX_WORKERS = 8
# What a seed is derived for; the numbers keep the streams of one epoch apart.
ORDER, AUGMENTATION, ITEMS = range(3)


class BatchLoader:
    """Batches of a data set: (images float32 (N, C, H, W) in [-1, 1], channels_last, on ``device``; labels (N,) int64).

    dataset: an InMemoryDataset, whose tensors are moved to the device once; or any map-style torch Dataset of (image,
    label),
        read through a torch DataLoader (accepted images: ``ganvas.data.adapt``).
    drop_last: leave out the last batch if it is smaller than batch_size.
    augmentation: applied on the device; None for none.
    num_workers: processes that read a data set which is not in memory; None for one per core, at most 8, for a streamed
        folder, and 0 (read in this process) for other data sets. Any number gives the same batches: random transforms
        inside the data set that draw from torch's, numpy's or Python's global generator are seeded batch by batch.
    float_range: the range of a foreign data set's floating-point images.
    Raises TypeError or ValueError for arguments that make no sense, or a data set that would give no batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
        augmentation: Augmentation | None = None,
        num_workers: int | None = None,
        float_range: FloatRange = (0.0, 1.0),
    ) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(f"dataset must have a length and items by index; {type(dataset).__name__} has not")
        if require_integer("batch_size", batch_size) < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        if require_integer("seed", seed) < 0:
            raise ValueError(f"seed must not be negative; got {seed}")
        if num_workers is not None and require_integer("num_workers", num_workers) < 0:
            raise ValueError(f"num_workers must not be negative; got {num_workers}")
        if not float_range[0] < float_range[1]:
            raise ValueError(f"float_range must be (low, high) with low < high; got {float_range}")
        if not len(dataset):
            raise ValueError("dataset is empty")
        if drop_last and len(dataset) < batch_size:
            raise ValueError(
                f"batch_size {batch_size} exceeds the {len(dataset)} images, and drop_last leaves no batch"
            )
        if augmentation is not None and isinstance(dataset, ImageDataset):
            augmentation.check_size(dataset.size)
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.device = torch.device(device)
        self.augmentation = augmentation
        self.num_workers = default_workers(dataset) if num_workers is None else num_workers
        self.float_range = float_range
        self._read: Callable[[Tensor, int, int], Iterator[Batch]]
        if isinstance(dataset, InMemoryDataset):
            # (N, H, W, C): whole images are copied, in the order of memory that the networks want.
            self._pixels = dataset.images.to(self.device).permute(0, 2, 3, 1).contiguous()
            self._labels = dataset.labels.to(self.device)
            self._read = self._read_memory
        else:
            self._read = self._read_items

    def __len__(self) -> int:
        """Batches per epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)  # type: ignore[arg-type]
        return full + bool(rest and not self.drop_last)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over the batches ``start``, ``start + 1``, ... of an epoch.

        Raises ValueError if epoch is negative or start is not in [0, len(self)].
        """
        if require_integer("epoch", epoch) < 0:
            raise ValueError(f"epoch must not be negative; got {epoch}")
        if not 0 <= require_integer("start", start) <= len(self):
            raise ValueError(f"start must be 0 to {len(self)}, the batches of an epoch; got {start}")
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        count = len(self.dataset)  # type: ignore[arg-type]
        order = torch.arange(count)
        if self.shuffle:
            order = torch.randperm(count, generator=generator_for(self.seed, epoch, ORDER))
        augment = self.augmentation
        if augment is not None:
            # Drawn for the whole epoch on the CPU and moved once: the same on every device, and no transfer per batch.
            draws = torch.rand(count, augment.num_random, generator=generator_for(self.seed, epoch, AUGMENTATION))
            draws = self._on_device(draws)
        for number, (images, labels) in enumerate(self._read(order, epoch, start), start):
            if augment is not None:
                position = number * self.batch_size
                images = augment(images, draws[position : position + len(images)])
            in_unit_range = images if images.is_floating_point() else to_float(images)
            yield in_unit_range.contiguous(memory_format=torch.channels_last), labels

    def _read_memory(self, order: Tensor, epoch: int, start: int) -> Iterator[Batch]:
        order = self._on_device(order)
        for number in range(start, len(self)):
            indices = order[number * self.batch_size : (number + 1) * self.batch_size]
            images = self._pixels.index_select(0, indices).permute(0, 3, 1, 2)
            yield images, self._labels.index_select(0, indices)

    def _on_device(self, tensor: Tensor) -> Tensor:
        """A copy that the host does not wait for: it may be steps ahead of the device."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _read_items(self, order: Tensor, epoch: int, start: int) -> Iterator[Batch]:
        batches = [
            (number, order[number * self.batch_size :][: self.batch_size].tolist())
            for number in range(start, len(self))
        ]
        reader = DataLoader(
            BatchReader(self.dataset, self.seed, epoch, self.float_range),
            sampler=batches,  # type: ignore[arg-type]
            batch_size=None,  # an "item" of the reader is a whole batch
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            # A DataLoader draws a number from the global generator when it starts, unless it has one of its own.
            generator=generator_for(self.seed, epoch, ITEMS),
        )
        for images, labels in reader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class BatchReader(Dataset):
    """A data set of batches, item (batch number, indices), each read under generators seeded by (seed, epoch,
    number)."""

    def __init__(self, dataset: Dataset, seed: int, epoch: int, float_range: FloatRange) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = epoch
        self.float_range = float_range

    def __getitem__(self, request: tuple[int, list[int]]) -> Batch:
        number, indices = request
        with seeded_generators(derive_seed(self.seed, self.epoch, ITEMS, number)):
            images, labels = read_items(self.dataset, indices)
        return to_unit_range(images, self.float_range), labels


@contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Seed the global CPU generators of torch, numpy and Python inside the block, and put them back after it."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - the one data sets draw from
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def derive_seed(seed: int, *key: int) -> int:
    """A 64-bit seed for a purpose within a run; neighbouring keys give unrelated seeds."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def generator_for(seed: int, *key: int) -> torch.Generator:
    """A CPU generator of its own for each key: see :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *key))


def default_workers(dataset: Any) -> int:
    """Decoding files pays for processes; a foreign data set may not survive being sent to one."""
    return min(available_cores(), MAX_WORKERS) if isinstance(dataset, StreamedFolder) else 0
