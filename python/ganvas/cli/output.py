"""What a command prints: styled on a terminal, plain everywhere else and where NO_COLOR is set."""

from __future__ import annotations

import os
from collections.abc import Mapping

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


def say_error(text: str) -> None:
    """Print ``text`` in one line on stderr."""
    _console(stderr=True).print(Text(" ".join(text.split()), style="red"), soft_wrap=True)


def _console(*, stderr: bool = False) -> Console:
    # Made anew each time: a Console keeps the stream it was made with. No colour system means no bold either.
    return Console(stderr=stderr, color_system=None if os.environ.get("NO_COLOR") else "auto")
