"""Which files a folder data set consists of: classes, train and test.

Layouts, the first that fits:
- ``ROOT/train/CLASS/*`` and ``ROOT/test/CLASS/*`` (or val, valid, validation);
- ``ROOT/train/CLASS/*`` or ``ROOT/CLASS/*`` alone: about one image in ten becomes a test image, by a hash of its path
  relative to the folder of classes, so that a file stays on its side when others come and go or the folder moves;
- the same with images instead of class folders: one class, named after ROOT.
Files are found at any depth below their class; names that start with a dot and other suffixes are passed over.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from .image_files import SUFFIXES

TEST_FOLDERS = ("test", "val", "valid", "validation")
TEST_FRACTION = 0.1

ImagesByClass = dict[str, list[Path]]


@dataclass(frozen=True)
class FolderListing:
    """Sorted class names, and for each split the files and the class index of each, in one fixed order."""

    class_names: tuple[str, ...]
    train: tuple[tuple[Path, int], ...]
    test: tuple[tuple[Path, int], ...]


def list_folder(root: Path) -> FolderListing:
    """List a folder data set. Raises ValueError if there are no images, a class is empty or only the test split has
    it."""
    train_root = root / "train"
    test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if not train_root.is_dir() and test_root is not None and class_folders(test_root):
        raise ValueError(f"root {str(root)!r} has {test_root.name}/ but no train/")
    if train_root.is_dir() and test_root is not None:
        train = images_by_class(train_root, root.resolve().name)
        test = images_by_class(test_root, root.resolve().name)
    else:
        base = train_root if train_root.is_dir() and class_folders(train_root) else root
        train, test = split_by_hash(images_by_class(base, root.resolve().name), base)

    class_names = tuple(sorted(train))
    empty = [name for name in class_names if not train[name]]
    if empty:
        raise ValueError(f"root {str(root)!r}: no {', '.join(SUFFIXES)} files for class {', '.join(empty)}")
    unknown = sorted(name for name in test if name not in train)
    if unknown:
        raise ValueError(f"root {str(root)!r}: class {', '.join(unknown)} is in the test split but not in train/")
    return FolderListing(class_names, with_labels(train, class_names), with_labels(test, class_names))


def images_by_class(folder: Path, flat_name: str) -> ImagesByClass:
    """Class name -> its image files, sorted. Without class folders, the images of the folder are one class,
    ``flat_name``."""
    classes = class_folders(folder)
    if classes:
        return {path.name: find_images(path) for path in classes}
    images = find_images(folder)
    if not images:
        raise ValueError(
            f"folder {str(folder)!r} holds no images; expected CLASS/ folders of {', '.join(SUFFIXES)} files in it"
        )
    return {flat_name: images}


def class_folders(folder: Path) -> list[Path]:
    """The folders in ``folder`` that are not hidden, by name."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def find_images(folder: Path) -> list[Path]:
    """The image files below folder, ordered by relative path, the same on every machine."""
    images = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images += [Path(parent, name) for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(images, key=lambda path: path.relative_to(folder).as_posix())


def split_by_hash(images: ImagesByClass, base: Path) -> tuple[ImagesByClass, ImagesByClass]:
    """(train, test) by each file's path relative to base. Of a class with two images or more, each side gets at least
    one."""
    train: ImagesByClass = {}
    test: ImagesByClass = {}
    for name, paths in images.items():
        position = {path: hash_position(path.relative_to(base).as_posix()) for path in paths}
        ranked = sorted(paths, key=position.__getitem__)
        in_test = {path for path in ranked[:-1] if position[path] < TEST_FRACTION} | set(ranked[: len(ranked) > 1])
        train[name] = [path for path in paths if path not in in_test]
        test[name] = [path for path in paths if path in in_test]
    return train, test


def hash_position(relative_path: str) -> float:
    """A number in [0, 1) that depends on the path and on nothing else: neither the machine nor the other files."""
    digest = hashlib.blake2b(relative_path.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def with_labels(images: ImagesByClass, class_names: tuple[str, ...]) -> tuple[tuple[Path, int], ...]:
    """Every image with its class's number, class by class."""
    return tuple((path, label) for label, name in enumerate(class_names) for path in images.get(name, []))
