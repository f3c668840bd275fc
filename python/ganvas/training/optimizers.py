"""torch's optimisers with the settings this project uses, their state for checkpoints, and what a recovery changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

_OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (Adam, {}),
    "adamw": (AdamW, {}),
    "sgd": (SGD, {"nesterov": True}),
}
# How torch runs the step on the optimiser's own device; no part of a state that another device continues from.
_WAYS_TO_RUN = ("capturable", "foreach", "fused")


def make_optimizer(
    name: str,
    module: nn.Module,
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    capturable: bool = False,
) -> Optimizer:
    """An optimiser of all parameters of ``module``; ``beta1`` is the momentum of SGD.

    Weight decay acts on matrices and filters only: biases and the scales of batch normalisation are not what it is
    meant to keep small (as in airbench and timm).

    ``capturable``: a CUDA graph can hold the step. The learning rates are then 0-dim float32 tensors on the parameters'
    device, into which a change of them is written.

    Raises:
        ValueError: an unknown name, or no parameters.
    """
    if name not in _OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(_OPTIMIZERS)}; got {name!r}")
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(f"{type(module).__name__} has no parameters to train")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    cls, options = _OPTIMIZERS[name]
    options = dict(options, lr=learning_rate)
    options |= {"momentum": beta1} if cls is SGD else {"betas": (beta1, beta2)}
    if capturable:
        options |= {} if cls is SGD else {"capturable": True}
        for group in groups:  # one tensor each: a factor on all of them meets none twice
            group["lr"] = torch.tensor(learning_rate, dtype=torch.float32, device=parameters[0].device)
    return cls([group for group in groups if group["params"]], **options, **_fastest(parameters))


def _fastest(parameters: Iterable[torch.Tensor]) -> dict[str, Any]:
    """One fused kernel for all parameters where torch has one, otherwise its multi-tensor form."""
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return {"fused": True} if fused else {"foreach": True}


def learning_rate(optimizer: Optimizer) -> float:
    """The first group's; all groups have the same."""
    return float(optimizer.param_groups[0]["lr"])


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with numbers for learning rates that are tensors: any device can go on from it."""
    state = optimizer.state_dict()
    groups = [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return {**state, "param_groups": groups}


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load what :func:`optimizer_state` returned, of this optimiser or of one made for another device.

    Learning rates that are tensors stay the same tensors; those of the state (moments, counts) are new ones.

    Raises:
        ValueError: the state is of an optimiser with other groups.
    """
    groups = optimizer.param_groups
    own = [{key: group[key] for key in ("lr", *_WAYS_TO_RUN) if key in group} for group in groups]
    merged = [
        {**loaded, **{key: value for key, value in kept.items() if key != "lr"}}
        for loaded, kept in zip(state["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": merged})
    for group, kept in zip(optimizer.param_groups, own):
        if isinstance(kept["lr"], Tensor):
            group["lr"] = kept["lr"].fill_(group["lr"])


def scale_learning_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Multiply every learning rate, those that a schedule goes by included (it keeps them in the parameter groups)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key in ("lr", "initial_lr", "max_lr", "min_lr"):
                if key in group:
                    group[key] *= factor
