"""Images and data sets of other libraries.

A torch Dataset of (image, label) may hold its images as
- a Pillow image of any mode: grey modes become one channel, all others RGB;
- a tensor (C, H, W) or (H, W), or a numpy array (H, W), (H, W, C) or (C, H, W), with C 1 or 3:
  uint8 in 0..255, or floating point in ``float_range``, which is (0, 1) as torchvision's ToTensor makes it if not said
  otherwise.
Labels are integers or integer tensors of one element. torchvision's classification sets are such.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .dataset import ImageDataset
from .image_files import convert_mode
from .options import CHANNELS, require_integer

FloatRange = tuple[float, float]
OVERSHOOT = 0.1
"""Part of the range by which floats may lie outside (a bicubic resize overshoots) and be clamped; beyond it, it is an
error."""


@singledispatch
def to_image_tensor(image: Any) -> Tensor:
    """One image of a foreign data set as a (C, H, W) tensor, uint8 or float32 in its own range (see the module).

    Raises TypeError for another type or dtype, ValueError for another shape.
    """
    raise TypeError(f"image must be a Pillow image, a tensor or a numpy array; got {type(image).__name__}")


@to_image_tensor.register
def _(image: Tensor) -> Tensor:
    if image.dim() == 2:
        image = image[None]
    if image.dim() != 3 or image.shape[0] not in CHANNELS:
        raise ValueError(f"image tensor must be (C, H, W) or (H, W) with C 1 or 3; got shape {tuple(image.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image must be uint8 or floating point; got {image.dtype}")
    return image if image.dtype == torch.uint8 else image.float()


@to_image_tensor.register
def _(image: np.ndarray) -> Tensor:
    if image.ndim == 3 and image.shape[2] in CHANNELS:
        image = image.transpose(2, 0, 1)
    if image.ndim not in (2, 3):
        raise ValueError(f"image array must be (H, W), (H, W, C) or (C, H, W) with C 1 or 3; got shape {image.shape}")
    return to_image_tensor(torch.from_numpy(np.array(image)))


@to_image_tensor.register
def _(image: Image.Image) -> Tensor:
    grey = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;")
    return to_image_tensor(np.asarray(convert_mode(image, "L" if grey else "RGB")))


def to_unit_range(images: Tensor, float_range: FloatRange) -> Tensor:
    """(N, C, H, W) images as the augmentation takes them: uint8 as they are, floats from float_range to [-1, 1].

    Raises ValueError for NaN and for floats that lie well outside float_range, which would train, and badly.
    """
    if not images.is_floating_point():
        return images
    low, high = float_range
    margin = OVERSHOOT * (high - low)
    smallest, largest = (float(value) for value in images.aminmax())
    if not (low - margin <= smallest and largest <= high + margin):
        raise ValueError(
            f"images have values from {smallest:.4g} to {largest:.4g}, but float_range is ({low:g}, {high:g}); "
            "pass the float_range of the data set to BatchLoader, or leave its images uint8"
        )
    return images.sub(low).mul_(2 / (high - low)).sub_(1).clamp_(-1, 1)


def read_items(dataset: Any, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
    """The items of a map-style data set as (images (N, C, H, W) uint8 or float32, labels (N,) int64).

    Raises TypeError if an item is no (image, label), ValueError if the images differ in shape.
    """
    images, labels = [], []
    for index in indices:
        item = dataset[index]
        if not isinstance(item, Sequence) or len(item) != 2:
            raise TypeError(f"item {index} of the data set must be (image, label); got {type(item).__name__}")
        images.append(to_image_tensor(item[0]))
        labels.append(to_label(item[1]))
        if images[-1].shape != images[0].shape or images[-1].dtype != images[0].dtype:
            raise ValueError(
                f"images must all have one shape and dtype; "
                f"item {index} is {tuple(images[-1].shape)} {images[-1].dtype}, "
                f"others are {tuple(images[0].shape)} {images[0].dtype}: resize or crop them in the data set"
            )
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


def to_label(label: Any) -> int:
    """A label as an int. Raises TypeError for a float, a vector (one-hot) or anything else."""
    single = label.item() if getattr(label, "shape", None) == () else label
    return require_integer("label", single)


@dataclass(frozen=True, eq=False, kw_only=True)
class AdaptedDataset(ImageDataset):
    """A foreign data set with the description that models are built from; its items are passed on as they are."""

    dataset: Any = field(repr=False)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


def as_image_dataset(
    dataset: Any, *, name: str | None = None, class_names: Sequence[str] | None = None
) -> ImageDataset:
    """Describe any torch Dataset of (image, label): size and channels are read from its first item.

    name: the class name of the data set if not given.
    class_names: the attribute ``classes`` if not given, which torchvision's sets have.
    An ImageDataset is returned as it is. Labels are the attribute ``targets``, or read item by item.
    Raises ValueError for an empty set, images that are not square, or unknown class names.
    """
    if isinstance(dataset, ImageDataset):
        return dataset
    if not len(dataset):
        raise ValueError("dataset is empty")
    images, _ = read_items(dataset, [0])
    _, channels, height, width = images.shape
    if height != width:
        raise ValueError(f"images must be square; the first of the data set is {height}x{width}")
    given = class_names if class_names is not None else getattr(dataset, "classes", None)
    if given is None:
        raise ValueError("class_names must be given: the data set has no attribute 'classes'")
    targets = getattr(dataset, "targets", None)
    labels = (
        [to_label(t) for t in targets]
        if targets is not None
        else [to_label(dataset[i][1]) for i in range(len(dataset))]
    )
    return AdaptedDataset(
        name=name or type(dataset).__name__.lower(),
        class_names=tuple(str(class_name) for class_name in given),
        channels=channels,
        size=height,
        labels=torch.tensor(labels, dtype=torch.int64),
        dataset=dataset,
    )
