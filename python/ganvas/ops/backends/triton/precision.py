"""How exactly float32 values are multiplied."""

from __future__ import annotations

import torch


def uses_tf32() -> bool:
    """Whether torch's own convolutions of float32 tensors may multiply in TF32, which is then allowed here as well.

    Torch's default is yes; ``torch.backends.cudnn.allow_tf32 = False``, or ``torch.backends.cudnn.conv.fp32_precision =
    "ieee"`` where torch has it, says no.
    """
    precision = getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", None)
    return torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"
