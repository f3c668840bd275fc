"""Runs a model once, forward and backward, and leaves no trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ganvas.nn.fused import FusedSequential, runs_fused
from ganvas.nn.tracing import is_converted
from ganvas.ops.backends.cpu.precision import rounds_float32
from ganvas.ops.backends.triton.precision import uses_tf32

_TF32_EPSILON = 2.0**-10


@dataclass(frozen=True)
class Observation:
    """What training depends on: floating-point outputs, buffers after the forward, gradients by name (or None)."""

    outputs: list[Tensor]
    statistics: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    epsilon: float
    """Machine epsilon of the coarsest dtype among parameters, outputs and an enclosing autocast; TF32's where
    convolutions multiply in it."""


def observe(model: nn.Module, arguments: tuple[Any, ...], *, training: bool, perturbed: bool = False) -> Observation:
    """One forward and backward in the given mode, from a fixed seed; model and random state are put back afterwards.

    The loss is a fixed random projection of the outputs: the sum of a BatchNorm's outputs is a constant, whose gradient
    says nothing. ``perturbed`` moves every parameter and every input by about one rounding error.

    Raises:
        ValueError: no output is a floating-point tensor.
    """
    with _undisturbed(model), torch.inference_mode(False), torch.enable_grad():
        model.train(training)
        torch.manual_seed(0)
        inputs = {
            f"input {i}": argument.detach().clone().requires_grad_()
            for i, argument in enumerate(arguments)
            if isinstance(argument, Tensor) and argument.is_floating_point()
        }
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        variables = {**inputs, **parameters}
        if perturbed:
            _perturb(list(variables.values()))
        # Clones: a layer that works in place may not write to a leaf.
        passed = [inputs[f"input {i}"].clone() if f"input {i}" in inputs else a for i, a in enumerate(arguments)]
        outputs = [x for x in tree_leaves(model(*passed)) if isinstance(x, Tensor) and x.is_floating_point()]
        if not outputs:
            raise ValueError("its output holds no floating-point tensor, so there is nothing to compare")
        return Observation(
            outputs=[output.detach() for output in outputs],
            statistics={name: b.detach().clone() for name, b in model.named_buffers() if b.is_floating_point()},
            gradients=dict(zip(variables, _gradients(outputs, list(variables.values())))),
            epsilon=_coarsest_epsilon([*variables.values(), *outputs]),
        )


def _gradients(outputs: list[Tensor], variables: list[Tensor]) -> tuple[Tensor | None, ...]:
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    taking_part = [(output, direction) for output, direction in zip(outputs, directions) if output.requires_grad]
    if not taking_part or not variables:
        return (None,) * len(variables)
    # autograd.grad and not backward(): .grad stays what it was.
    return torch.autograd.grad(
        [output for output, _ in taking_part], variables, [direction for _, direction in taking_part], allow_unused=True
    )


@torch.no_grad()
def _perturb(tensors: list[Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    for tensor in tensors:
        signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
        tensor.add_(tensor * signs, alpha=torch.finfo(tensor.dtype).eps)


def _coarsest_epsilon(tensors: list[Tensor]) -> float:
    dtypes = {tensor.dtype for tensor in tensors}
    for device_type in {tensor.device.type for tensor in tensors}:
        if torch.is_autocast_enabled(device_type):
            dtypes.add(torch.get_autocast_dtype(device_type))
    of_float32 = {tensor.device.type for tensor in tensors if tensor.dtype is torch.float32}
    coarsest = [torch.finfo(dtype).eps for dtype in dtypes]
    if "cuda" in of_float32 and uses_tf32():
        coarsest.append(_TF32_EPSILON)
    if "cpu" in of_float32 and rounds_float32():
        coarsest.append(torch.finfo(torch.bfloat16).eps)
    return max(coarsest)


@contextmanager
def run_plain(model: nn.Module) -> Iterator[None]:
    """Within the block everything that runs fused in ``model`` is plain torch, in the same memory layout."""
    fused = [module for module in model.modules() if isinstance(module, FusedSequential) and runs_fused(module)]
    bound = [(module, module.forward) for module in model.modules() if is_converted(module)]
    for module in fused:
        module.forward = module.forward_one_by_one  # type: ignore[method-assign]
    for converted, forward in bound:
        converted.forward = forward.plain  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in fused:
            del module.__dict__["forward"]
        for converted, forward in bound:
            converted.forward = forward


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts back random state, training flags, and parameters and buffers with their values."""
    flags = [(module, module.training) for module in model.modules()]
    slots: list[tuple[dict[str, Any], str, Tensor, Tensor]] = [
        (slot, name, tensor, tensor.detach().clone())
        for module in model.modules()
        for slot in (cast(dict[str, Any], module._parameters), module._buffers)
        for name, tensor in slot.items()
        if tensor is not None
    ]
    gpus = {tensor.device.index for *_, tensor in slots if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=gpus):
        try:
            yield
        finally:
            for module, training in flags:
                module.training = training
            with torch.no_grad():
                for slot, name, tensor, value in slots:
                    slot[name] = tensor  # a forward may have put another tensor in its place
                    tensor.copy_(value)
