"""From a PNG, JPEG or WebP file to a square uint8 image, by Pillow.

The picture is turned upright by its EXIF orientation, transparent pixels become black, its shorter side is resized to
the wanted size (bicubic, antialiased) and the middle is kept. A file counts as unreadable if Pillow cannot decode it in
full, or if it has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``: Pillow only warns about such a decompression bomb.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
"""What Pillow may open, whatever the file's name says: its other decoders (EPS runs Ghostscript) are not offered
strangers' files."""
DRAFT_MARGIN = 2
"""A JPEG may be decoded at 1/2, 1/4 or 1/8 as long as it stays this many times larger than the wanted size."""
CHUNK = 64
"""Files decoded per task of a pool."""
CHUNKS_AHEAD = 4
"""Chunks per process that are decoded or under way before they are copied."""
SMALL_FILE_BYTES = 16 * 1024
"""Below this mean size the interpreter, not the decoder, is the bottleneck, and threads only fight for its lock."""
MANY_FILES = 2000
"""Small files from which on processes are worth being started."""
MODES = {1: "L", 3: "RGB"}


def read_image(path: str | os.PathLike[str], size: int, channels: int) -> Tensor:
    """One image file as a (channels, size, size) uint8 tensor. channels: 1 or 3.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"image file {os.fspath(path)!r} does not exist")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return torch.from_numpy(decode(path, size, channels))
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            raise ValueError(f"{os.fspath(path)}: unreadable image: {reason(error)}") from error


def decode_files(paths: Sequence[Path], size: int, channels: int, images: np.ndarray | None) -> dict[int, str]:
    """Decode many files into ``images`` (N, channels, size, size) uint8, or with None only try whether they can be.

    On all cores: in threads, or, where there are many small files, in forked processes.

    Returns index -> reason for the files that are unreadable; their places in ``images`` are left as they were.
    """
    chunks = [range(start, min(start + CHUNK, len(paths))) for start in range(0, len(paths), CHUNK)]
    small = are_small(paths)
    with warnings.catch_warnings():  # around the pools: the filters belong to the process, not to a thread
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        if small and len(paths) >= MANY_FILES and available_cores() > 1 and can_fork():
            return decode_in_processes(chunks, paths, size, channels, images)
        failures: dict[int, str] = {}
        with ThreadPoolExecutor(1 if small else available_cores()) as pool:
            for failed in pool.map(lambda chunk: decode_chunk(chunk, paths, size, channels, images), chunks):
                failures |= failed
        return failures


def decode_in_processes(
    chunks: Sequence[range], paths: Sequence[Path], size: int, channels: int, images: np.ndarray | None
) -> dict[int, str]:
    """:func:`decode_files` by a process per core, a few chunks ahead of what has been copied into ``images``."""
    failures: dict[int, str] = {}
    cores = available_cores()
    with warnings.catch_warnings():
        # Of threads at a fork: the children run Pillow and NumPy, whose locks no thread of this process holds.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        pool = ProcessPoolExecutor(cores, multiprocessing.get_context("fork"), initializer=ignore_interrupts)
        with pool:
            results: deque[Future[tuple[dict[int, str], np.ndarray | None]]] = deque()
            started = iter(chunks)
            for chunk in chunks:
                for ahead in itertools.islice(started, CHUNKS_AHEAD * cores - len(results)):
                    files = [os.fspath(paths[index]) for index in ahead]  # faster sent than Paths
                    results.append(pool.submit(decode_apart, files, size, channels, keep=images is not None))
                failed, pixels = results.popleft().result()
                failures |= {chunk[index]: text for index, text in failed.items()}
                if images is not None and pixels is not None:
                    readable = [index for index in range(len(chunk)) if index not in failed]
                    images[chunk.start : chunk.stop][readable] = pixels.transpose(0, 3, 1, 2)[readable]
    return failures


def decode_apart(
    paths: Sequence[str], size: int, channels: int, *, keep: bool
) -> tuple[dict[int, str], np.ndarray | None]:
    """What another process sends back: index -> reason of unreadable files, and (N, size, size, channels) pixels."""
    pixels = np.empty((len(paths), size, size, channels), dtype=np.uint8) if keep else None
    images = None if pixels is None else pixels.transpose(0, 3, 1, 2)
    return decode_chunk(range(len(paths)), paths, size, channels, images), pixels


def decode_chunk(
    chunk: range, paths: Sequence[str | os.PathLike[str]], size: int, channels: int, images: np.ndarray | None
) -> dict[int, str]:
    """:func:`decode_files` for the files of the indices in ``chunk``."""
    failures: dict[int, str] = {}
    for index in chunk:
        try:
            pixels = decode(paths[index], size, channels)
        except Exception as error:  # see read_image
            failures[index] = reason(error)
            continue
        if images is not None:
            images[index] = pixels
    return failures


def decode(path: str | os.PathLike[str], size: int, channels: int) -> np.ndarray:
    """(channels, size, size) uint8, contiguous and writable. Raises whatever Pillow raises."""
    with Image.open(path, formats=FORMATS) as image:
        refuse_bomb(image)
        image.draft(None, (DRAFT_MARGIN * size, DRAFT_MARGIN * size))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        converted = convert_mode(image, MODES[channels])
        fitted = converted if converted.size == (size, size) else fit(converted, size)
        pixels = np.asarray(fitted).reshape(size, size, channels)
    return np.array(pixels.transpose(2, 0, 1), order="C")  # a copy in any case: Pillow's own memory is read-only


def refuse_bomb(image: Image.Image) -> None:
    """Raise DecompressionBombError above Pillow's limit, where ``Image.open`` itself raises only above twice the
    limit."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels exceed the limit of {limit:,}")


def convert_mode(image: Image.Image, mode: str) -> Image.Image:
    """Any mode a PNG, JPEG or WebP can have to "L" or "RGB"; transparency is laid over black."""
    if image.mode.startswith("I"):  # 16-bit grey, which convert() clips to 255 instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image if image.mode == mode else image.convert(mode)


def fit(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to ``size``, then the middle ``size`` x ``size``."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def reason(error: Exception) -> str:
    """One line for a person: what is wrong with the file, without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG or WebP image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def are_small(paths: Sequence[Path]) -> bool:
    """Whether the files are so small that threads would do nothing but wait for the interpreter's lock."""
    sample = [os.path.getsize(path) for path in paths[:: max(1, len(paths) // 100)] if path.is_file()]
    return not sample or sum(sample) / len(sample) < SMALL_FILE_BYTES


def can_fork() -> bool:
    """Whether this process may have forked ones; a DataLoader's worker may have none."""
    return "fork" in multiprocessing.get_all_start_methods() and not multiprocessing.current_process().daemon


def ignore_interrupts() -> None:
    """Ctrl-C reaches every process of the terminal: the one that decodes for another leaves it to that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def available_cores() -> int:
    """Cores that this process may run on, which in a container are often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
