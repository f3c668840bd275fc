"""Writing files so that a crash, a kill or a full disk leaves the old one or the new one, never half of either."""

from __future__ import annotations

import os
from pathlib import Path


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to a new or existing file and wait until it is on the disk.

    Raises:
        OSError: also when the disk is full; the file may then be incomplete.
    """
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder (created, renamed, removed) are on the disk; fsync of a file leaves them out."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` in one step: a reader, or a crash at any moment, sees all of the old or all of the new.

    Raises:
        OSError: the file at ``path`` is then as it was, and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_bytes(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
