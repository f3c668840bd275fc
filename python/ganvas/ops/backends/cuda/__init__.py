"""Native CUDA kernels, compiled for sm_80, sm_90 and sm_100 where nvcc was found, and as PTX for what comes after.

Importing this module registers the kernels for the schemas in :mod:`ganvas.ops.schemas`. It starts no CUDA context.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from ganvas import _native as native
except ImportError as error:  # a source tree that was not built
    MISSING = f"the native module is not there ({error}); install ganvas with pip to build it"
else:
    MISSING = ""
    if native.build_info()["cuda"]:
        from ganvas.ops.backends.cuda import gan_loss
    else:
        MISSING = "ganvas was built without CUDA kernels (no nvcc found, or GANVAS_CUDA=OFF)"

_OPS = frozenset({"discriminator_loss", "generator_loss"})
# Compiled and checked, but never timed on a GPU: the automatic choice must not be slower than plain torch.
_NOT_MEASURED = frozenset({"discriminator_loss", "generator_loss"})
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # compute capability
_device_refusals: dict[int, str | None] = {}  # asked once: it loads the kernels and does not change


def can_run(op: str, tensor: Tensor) -> str | None:
    """None if the CUDA kernel of ``op`` takes ``tensor``, otherwise the reason why not."""
    if MISSING:
        return MISSING
    if not tensor.is_cuda:
        here = "" if torch.cuda.is_available() else ", and torch finds no GPU"
        return f"the CUDA kernels take tensors on an NVIDIA GPU; got one on {tensor.device}{here}"
    if op not in _OPS:
        return f"{op} has no CUDA kernel yet"
    if tensor.dtype not in _DTYPES:
        return f"the CUDA kernels take float32, bfloat16 and float16; got {tensor.dtype}"
    return _device_refusal(tensor.device.index)


def on_request_only(op: str) -> str | None:
    """Why the automatic choice leaves ``op``'s kernel alone, which a caller can still ask for; None if it does not."""
    if op in _NOT_MEASURED:
        return "on request only (backend='cuda' or GANVAS_BACKEND=cuda) until its speed on a GPU is measured"
    return None


@torch.compiler.assume_constant_result
def _device_refusal(index: int) -> str | None:
    if index not in _device_refusals:
        _device_refusals[index] = _ask_device(index)
    return _device_refusals[index]


def _ask_device(index: int) -> str | None:
    if torch.version.cuda is None:
        return "the CUDA kernels need an NVIDIA GPU; this torch is built for another maker's"
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST:
        return "the CUDA kernels need compute capability {}.{}; got {}.{}".format(*_OLDEST, *capability)
    with torch.cuda.device(index):
        refusal = native.cuda_refusal(index)
    return f"CUDA refuses the kernels: {refusal}" if refusal else None


__all__ = ["can_run", "gan_loss", "on_request_only"]
