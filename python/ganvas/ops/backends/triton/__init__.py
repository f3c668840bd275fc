"""Triton kernels for NVIDIA GPUs from sm_80 on: convolutions between pending activations.

Triton itself is imported when a tensor on a GPU first asks for them.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

from torch import Tensor

from ganvas.ops.backends import cuda


def can_run(op: str, tensor: Tensor) -> str | None:
    """None if the Triton kernels take ``op`` on ``tensor``, otherwise the reason why not."""
    if op != "conv_bn_leaky_relu":
        return f"the Triton kernels are convolutions, {op} has none"
    if not is_installed():
        return "Triton is not installed"
    return cuda.can_run(op, tensor)  # which run between the convolutions


@lru_cache
def is_installed() -> bool:
    """Whether there is a Triton to import."""
    return importlib.util.find_spec("triton") is not None
