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
        from ganvas.ops.backends.cuda import batch_norm_leaky_relu, gan_loss
    else:
        MISSING = "ganvas was built without CUDA kernels (no nvcc found, or GANVAS_CUDA=OFF)"

_OPS = frozenset({"batch_norm_leaky_relu", "conv_bn_leaky_relu", "discriminator_loss", "generator_loss"})
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
        return f"{op} has no CUDA kernel"
    if tensor.dtype not in _DTYPES:
        return f"the CUDA kernels take float32, bfloat16 and float16; got {tensor.dtype}"
    if op == "batch_norm_leaky_relu" and tensor.dim() == 3:
        return "a (N, C, L) tensor has no channels-last layout in torch"
    return _device_refusal(tensor.device.index)


def unusable(device: torch.device) -> str | None:
    """Why none of the kernels runs on this GPU: the build, the GPU or its driver; None if they do."""
    return MISSING or _device_refusal(device.index)


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


__all__ = ["MISSING", "batch_norm_leaky_relu", "can_run", "gan_loss", "unusable"]
