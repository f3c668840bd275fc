"""MNIST and its look-alikes (Fashion-MNIST, KMNIST) from IDX files, gzipped or not.

An IDX file is big-endian: magic 0x0000TTDD (type TT, 0x08 for unsigned bytes; DD dimensions), DD sizes of 4 bytes, then
the bytes in C order. Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch

from .dataset import InMemoryDataset, fit_to_options
from .options import LoadOptions

CLASS_NAMES = tuple("0123456789")
PREFIXES = {"train": "train", "test": "t10k"}
SUBFOLDERS = (".", "MNIST/raw", "raw")
GZIP_MAGIC = b"\x1f\x8b"
MAX_DEFLATE_RATIO = 1032
"""A deflate stream cannot expand further than this (zlib's documentation), so a header that promises more is a lie."""


def load(options: LoadOptions) -> InMemoryDataset:
    """Read one split: (N, 1, 28, 28) uint8. Raises FileNotFoundError or ValueError, see ``read_idx``."""
    root = options.require_root(
        "mnist", "train-images-idx3-ubyte, train-labels-idx1-ubyte and the two t10k- files, .gz or not"
    )
    prefix = PREFIXES[options.split]
    images_path = find_file(root, prefix, "images", 3)
    labels_path = find_file(root, prefix, "labels", 1)
    images = read_idx(images_path, 3)
    labels = read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{images_path}: images must be 28x28; the header says {images.shape[1]}x{images.shape[2]}")
    if len(images) != len(labels):
        raise ValueError(f"{images_path} has {len(images)} images but {labels_path} has {len(labels)} labels")
    if not len(images):
        raise ValueError(f"{images_path} holds no images")
    if labels.max() >= len(CLASS_NAMES):
        raise ValueError(f"{labels_path}: labels must be 0 to 9; got {labels.max()}")
    return fit_to_options(
        "mnist", torch.from_numpy(images[:, None]), torch.from_numpy(labels.astype(np.int64)), CLASS_NAMES, options
    )


def find_file(root: Path, prefix: str, kind: str, dimensions: int) -> Path:
    """The file of that kind in root, under either of the usual spellings. Raises FileNotFoundError naming them."""
    names = [f"{prefix}-{kind}{dot}idx{dimensions}-ubyte{suffix}" for dot in "-." for suffix in ("", ".gz")]
    candidates = [root / folder / name for folder in SUBFOLDERS for name in names]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"root {str(root)!r} has none of {', '.join(names)}")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The unsigned bytes of an IDX file as a writable array of ``dimensions`` dimensions.

    Whether the file is gzipped is read from its first bytes: browsers unpack a download and keep the name.
    Raises ValueError if it is no such file, or holds fewer or more bytes than its header says.
    """
    num_file_bytes = path.stat().st_size
    with path.open("rb") as file:
        is_gzip = file.read(2) == GZIP_MAGIC
        file.seek(0)
        try:
            if not is_gzip:
                return read_idx_stream(file, path, dimensions, num_file_bytes)
            with gzip.open(file) as unpacked:
                return read_idx_stream(unpacked, path, dimensions, num_file_bytes * MAX_DEFLATE_RATIO)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged or truncated gzip file ({error})") from error


def read_idx_stream(file: IO[bytes] | gzip.GzipFile, path: Path, dimensions: int, max_bytes: int) -> np.ndarray:
    """Header and bytes of an open IDX stream; max_bytes bounds what is believed of the header before memory is
    taken."""
    header_bytes = 4 + 4 * dimensions
    header = file.read(header_bytes)
    magic = 0x0800 + dimensions
    if len(header) < 4 or struct.unpack(">I", header[:4])[0] != magic:
        raise ValueError(
            f"{path}: not an IDX file of unsigned bytes in {dimensions} dimension(s): "
            f"it starts with {header[:4].hex() or 'nothing'}, expected {magic:08x}"
        )
    if len(header) < header_bytes:
        raise ValueError(f"{path}: truncated in its header after {len(header)} bytes")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    expected = math.prod(shape)
    if header_bytes + expected > max_bytes:
        raise ValueError(
            f"{path}: truncated: the header promises {expected:,} bytes for shape {shape}, more than the file has"
        )
    content = file.read(expected)
    if len(content) < expected:
        raise ValueError(
            f"{path}: truncated: {len(content):,} bytes where the header promises {expected:,} for shape {shape}"
        )
    if file.read(1):
        raise ValueError(
            f"{path}: oversized: more than the {expected:,} bytes that the header promises for shape {shape}"
        )
    return np.frombuffer(bytearray(content), dtype=np.uint8).reshape(shape)
