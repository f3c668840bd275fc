"""torch's optimisers with the settings this project uses, their state for checkpoints, and what a recovery changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ganvas.training.recordable import Recordable, RecordableAdam, RecordableAdamW, RecordableSGD

_OPTIMIZERS: dict[str, tuple[type[Optimizer], type[Recordable], dict[str, Any]]] = {
    "adam": (Adam, RecordableAdam, {}),
    "adamw": (AdamW, RecordableAdamW, {}),
    "sgd": (SGD, RecordableSGD, {"nesterov": True}),
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
    cycled_momentum: bool = False,
) -> Optimizer:
    """An optimiser of all parameters of ``module``; ``beta1`` is the momentum of SGD.

    Weight decay acts on matrices and filters only: biases and the scales of batch normalisation are not what it is
    meant to keep small (as in airbench and timm).

    ``capturable``: a CUDA graph can hold the step, and :meth:`Recordable.publish` comes before each; with
    ``cycled_momentum`` whatever a schedule makes of the momentum.

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
    plain, recordable, options = _OPTIMIZERS[name]
    options = dict(options, lr=learning_rate, **_fastest(parameters))
    options |= {"momentum": beta1} if plain is SGD else {"betas": (beta1, beta2)}
    groups = [group for group in groups if group["params"]]
    if not capturable:
        return plain(groups, **options)
    options |= {} if plain is SGD else {"capturable": True}
    return recordable(groups, cycled_momentum=cycled_momentum, **options)


def descend(loss: torch.Tensor, module: nn.Module, optimizer: Optimizer, gradient_clip: float | None = None) -> None:
    """A step of ``module``'s optimiser along the gradients of ``loss``, of a norm of at most ``gradient_clip``."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if gradient_clip is not None:
        nn.utils.clip_grad_norm_(module.parameters(), gradient_clip)
    optimizer.step()


def _fastest(parameters: Iterable[torch.Tensor]) -> dict[str, Any]:
    """One fused kernel for all parameters where torch has one, otherwise its multi-tensor form."""
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return {"fused": True} if fused else {"foreach": True}


def learning_rate(optimizer: Optimizer) -> float:
    """The first group's; all groups have the same."""
    return float(optimizer.param_groups[0]["lr"])


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the ``state_dict()`` of this optimiser or of one made for another device. Its tensors are new ones.

    Raises:
        ValueError: the state is of an optimiser with other groups.
    """
    own = [{key: group[key] for key in _WAYS_TO_RUN if key in group} for group in optimizer.param_groups]
    merged = [{**loaded, **kept} for loaded, kept in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": merged})


def scale_learning_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Multiply every learning rate, those that a schedule goes by included (it keeps them in the parameter groups)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key in ("lr", "initial_lr", "max_lr", "min_lr"):
                if key in group:
                    group[key] *= factor
