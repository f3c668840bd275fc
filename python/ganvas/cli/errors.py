"""Which errors are a person's to mend and become one line, and which are bugs and keep their traceback."""

from __future__ import annotations

import difflib
import dis
from collections.abc import Iterable


class InputError(ValueError):
    """A command line that makes no sense; one line that says what to do."""


class JobFailed(Exception):
    """The command line was fine, the work did not succeed; one line that says why."""


def suggestion(given: str, known: Iterable[str]) -> str:
    """``" (did you mean 'epochs'?)"``, or nothing if nothing known is close."""
    close = difflib.get_close_matches(given, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def exit_code(error: Exception) -> int | None:
    """The exit code for an error that its message explains, None for a bug.

    An OSError is about files, disks and permissions. A ValueError or a TypeError is about input if a ``raise``
    statement of ganvas raised it; ``len(5)`` or a shape that torch refuses deep inside is a bug, whatever its type.
    """
    if isinstance(error, JobFailed):
        return 1
    if isinstance(error, OSError) or (isinstance(error, (ValueError, TypeError)) and _raised_by_ganvas(error)):
        return 2
    return None


def _raised_by_ganvas(error: Exception) -> bool:
    traceback = error.__traceback__
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    instruction = dis.opname[frame.f_code.co_code[traceback.tb_lasti]]
    return package == "ganvas" and instruction == "RAISE_VARARGS"
