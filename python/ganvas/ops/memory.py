"""What the CPU kernels keep from call to call."""

from __future__ import annotations

from ganvas.ops.backends import cpu


def release_memory() -> int:
    """Gives back what the CPU kernels keep for later calls: scratch memory, that of large maps which nobody holds,
    and weights that were evaluated.

    Of the first two there is 1 GiB at most, of weights 256 MiB. Calls that are under way keep what they use. May be
    called from any thread.

    Returns:
        How many bytes that were; 0 where there is no native module.
    """
    return 0 if cpu.native is None else cpu.native.release_workspace()
