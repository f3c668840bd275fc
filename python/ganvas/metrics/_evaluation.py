"""What every metric needs before it may run somebody's module: evaluation mode, and the mode it was in put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put ``module`` in evaluation mode without gradients; restore the mode of each submodule afterwards.

    Each submodule, because a caller may have frozen single layers with ``.eval()`` inside a model that trains, and
    ``module.train()`` would wake them up.
    """
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, training in modes:
            child.training = training


def device_of(module: nn.Module) -> torch.device:
    """Device of the module's first parameter or buffer; the CPU for a module without either."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
