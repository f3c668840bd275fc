"""How exactly a convolution multiplies."""

from __future__ import annotations

import torch


def rounds_float32() -> bool:
    """Whether products of float32 values may be as coarse as bfloat16's are.

    As torch has it of matrix products: after ``torch.set_float32_matmul_precision("medium")``.
    """
    try:
        return torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # set for each backend by itself, in torch's newer way
        return torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]


def multiplied_as(dtype: torch.dtype) -> str:
    """The name that choices by measurement know it by: ``dtype``'s, or ``rounded``, of float32."""
    return "rounded" if dtype is torch.float32 and rounds_float32() else str(dtype).removeprefix("torch.")
