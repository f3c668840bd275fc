"""torch's optimisers with the settings this project uses, and the one change a recovery makes to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

_OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (Adam, {}),
    "adamw": (AdamW, {}),
    "sgd": (SGD, {"nesterov": True}),
}


def make_optimizer(
    name: str,
    module: nn.Module,
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
) -> Optimizer:
    """An optimiser of all parameters of ``module``; ``beta1`` is the momentum of SGD.

    Weight decay acts on matrices and filters only: biases and the scales of batch normalisation are not what it is
    meant to keep small (as in airbench and timm).

    Raises:
        ValueError: an unknown name, or no parameters.
    """
    if name not in _OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(_OPTIMIZERS)}; got {name!r}")
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(f"{type(module).__name__} has no parameters to train")
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    cls, options = _OPTIMIZERS[name]
    options = dict(options, lr=learning_rate)
    options |= {"momentum": beta1} if cls is SGD else {"betas": (beta1, beta2)}
    return cls([group for group in groups if group["params"]], **options, **_fastest(parameters))


def _fastest(parameters: Iterable[torch.Tensor]) -> dict[str, Any]:
    """One fused kernel for all parameters where torch has one, otherwise its multi-tensor form."""
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return {"fused": True} if fused else {"foreach": True}


def scale_learning_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Multiply every learning rate, those that a schedule goes by included (it keeps them in the parameter groups)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key in ("lr", "initial_lr", "max_lr", "min_lr"):
                if key in group:
                    group[key] *= factor
