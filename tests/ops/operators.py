"""torch's own checks of operators."""

from __future__ import annotations

from typing import Any

import torch


def opcheck_without_gradients(operator: Any, arguments: tuple) -> None:
    """Schema, shapes and strides of an operator that has no autograd formula: a backward pass."""
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operator, arguments, test_utils=checks)
