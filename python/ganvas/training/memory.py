"""Whether memory that a step frees stays with the process until the next step asks for it.

The C library of most Linux systems (glibc) maps blocks of 32 MiB and more anew each time and gives them back to the
system when they are freed. The system then zeroes and maps every page once more in the next step, which asks for the
same sizes again. Feature maps are of that size, and such faults take up to a third of a training step on a CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Of glibc's <malloc.h>: see mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = -1
_LARGEST_MMAP_THRESHOLD = 32 << 20
_DEFAULT_MMAP_MAX = 65536


@contextmanager
def kept_memory(enabled: bool = True) -> Iterator[None]:
    """Within the block freed memory stays with the process, for all of its threads; at the end it goes back.

    Where the C library is another than glibc, or with ``enabled`` False, nothing happens. The peak of memory in use
    may grow, since freed blocks that lie between used ones serve only what fits into them.
    """
    mallopt = _mallopt() if enabled else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        # glibc would move the thresholds by itself, but not after they have been set once. So they are left where they
        # get to in a process that has freed a large block.
        mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's function of that name, None where the process runs on another C library."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - the symbol tells glibc from the others
        mallopt = library.mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of that name
        return None
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return mallopt
