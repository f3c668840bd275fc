"""Which precision suits a device."""

from __future__ import annotations

import torch

from ganvas.ops.backends import cpu


def prefers_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies in bfloat16 so much faster than in float32 that training does by default.

    GPUs that have it do, and processors with AMX, whose tiles are products of bfloat16 numbers.
    """
    if device.type == "cpu":
        return cpu.native is not None and cpu.native.has_bfloat16_tiles()
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
