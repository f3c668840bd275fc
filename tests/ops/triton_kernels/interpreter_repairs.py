"""What Triton's interpreter gets wrong, put right.

- It calls int() on arrays of one element, which NumPy 2.4 refuses: a loop has no bounds.
- It holds a bfloat16 as the 16-bit integer of its bits, and multiplies those.
- It cuts off what does not fit into a bfloat16, where GPUs round to the nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_convert_float = interpreter._convert_float
_create_dot = interpreter.InterpreterBuilder.create_dot


def _patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
    _patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


def _converted(input: Any, from_dtype: Any, to_dtype: Any, rounding: Any) -> Any:
    if (from_dtype, to_dtype) == (tl.bfloat16, tl.float32):
        return input.astype(np.uint32) << 16
    if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(input)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return _convert_float(input, from_dtype, to_dtype, rounding)


def _dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
    wide = [
        interpreter.TensorHandle(_converted(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)
        if x.dtype.scalar == tl.bfloat16
        else x
        for x in (a, b)
    ]
    return _create_dot(builder, *wide, *others)


def repair() -> None:
    """For the rest of the process."""
    interpreter._patch_lang_tensor = _patch_tensor_and_index
    interpreter._convert_float = _converted
    interpreter.InterpreterBuilder.create_dot = _dot
