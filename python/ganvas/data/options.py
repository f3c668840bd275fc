"""What a caller of ``load`` may ask for, checked before any file is opened."""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "test")
CHANNELS = (1, 3)
SIZE_RANGE = (4, 2048)
DEFAULT_MEMORY_LIMIT = 2 * 1024**3
"""Bytes of decoded uint8 pixels (N*C*H*W) that a data set may take to stay in memory: 2 GiB, 170,000 images of
3x64x64."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The arguments of ``ganvas.data.load`` besides the name; see there. Raises ValueError or TypeError on nonsense."""

    root: str | os.PathLike[str] | None = None
    split: str = "train"
    size: int | None = None
    channels: int | None = None
    skip_unreadable: bool = False
    memory_limit: int = DEFAULT_MEMORY_LIMIT
    min_classes: int = 2

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {self.split!r}")
        if self.size is not None:
            size = require_integer("size", self.size)
            if not SIZE_RANGE[0] <= size <= SIZE_RANGE[1]:
                raise ValueError(f"size must be {SIZE_RANGE[0]} to {SIZE_RANGE[1]} pixels; got {size}")
        if self.channels is not None and require_integer("channels", self.channels) not in CHANNELS:
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB); got {self.channels}")
        if require_integer("memory_limit", self.memory_limit) < 1:
            raise ValueError(f"memory_limit must be a positive number of bytes; got {self.memory_limit}")
        if require_integer("min_classes", self.min_classes) < 1:
            raise ValueError(f"min_classes must be at least 1; got {self.min_classes}")

    def require_root(self, name: str, content: str) -> Path:
        """The root folder as a path. Raises ValueError if none was given, FileNotFoundError if there is none there.

        content: what the folder must hold, for the message.
        """
        if self.root is None:
            raise ValueError(f"data set {name!r} needs root: the folder that holds {content}")
        root = Path(self.root).expanduser()
        if not root.exists():
            raise FileNotFoundError(f"root {str(root)!r} does not exist; give the folder that holds {content}")
        if not root.is_dir():
            raise ValueError(f"root {str(root)!r} is a file; give the folder that holds {content}")
        return root


def require_integer(argument: str, value: object) -> int:
    """``value`` as an int; TypeError naming ``argument`` for anything that is not an integer (a bool is not)."""
    if isinstance(value, bool):
        raise TypeError(f"{argument} must be an integer; got {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{argument} must be an integer; got {value!r}") from None
