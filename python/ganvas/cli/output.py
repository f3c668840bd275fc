"""What a command prints: styled on a terminal, plain everywhere else and where NO_COLOR is set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text


def say(text: str) -> None:
    """Print ``text`` as it is."""
    _console().print(Text(text), soft_wrap=True)


def say_pairs(pairs: Mapping[str, object]) -> None:
    """Print names in bold and what belongs to them, one a line, in two columns."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        _console().print(Text.assemble((name.ljust(width), "bold"), "  ", str(value)), soft_wrap=True)


def say_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells under a head in bold, in columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for cells, style in ((head, "bold"), *((row, "") for row in rows)):
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()
        _console().print(Text(line, style=style), soft_wrap=True)


def say_error(text: str) -> None:
    """Print ``text`` in one line on stderr."""
    _console(stderr=True).print(Text(" ".join(text.split()), style="red"), soft_wrap=True)


def _console(*, stderr: bool = False) -> Console:
    # Made anew each time: a Console keeps the stream it was made with. No colour system means no bold either.
    return Console(stderr=stderr, color_system=None if os.environ.get("NO_COLOR") else "auto")
