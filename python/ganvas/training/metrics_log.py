"""``metrics.jsonl``: one JSON object a line, appended and flushed, cut back to a checkpoint on resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends lines to a file. Open it as a context manager.

    Each line has ``step`` and ``epoch`` (both counted from 1; the epoch is the one under way) and any of:

    * names such as ``train/loss`` or ``test/accuracy`` with numbers. What is no finite number is written as the string
      "nan", "inf" or "-inf", since JSON has no such numbers;
    * ``event`` with a name such as ``fault``, and ``message``.
    """

    def __init__(self, path: Path, *, length: int = 0) -> None:
        """``length``: bytes of the existing file to keep; what a killed run wrote after its checkpoint is dropped."""
        self._path = path
        self._length = length

    def __enter__(self) -> MetricsLog:
        self._file = open(self._path, "ab")
        self._file.truncate(min(self._length, os.path.getsize(self._path)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    @property
    def length(self) -> int:
        """Bytes in the file, for the checkpoint."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        line = {"step": step, "epoch": epoch, **{name: _json_value(value) for name, value in values.items()}}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until the lines are on the disk; a checkpoint counts on them."""
        os.fsync(self._file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file. A last line that a killed process had not finished is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


def _json_value(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
