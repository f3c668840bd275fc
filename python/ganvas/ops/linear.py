"""Linear layers whose matrix products are native where that is the faster way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ganvas.ops.backends import cpu
from ganvas.ops.direct import holds, runs_as_operator, runs_directly
from ganvas.ops.schemas import library, ops
from ganvas.ops.selection import choose


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input·weightᵀ + bias, as :func:`torch.nn.functional.linear`, which runs wherever no kernel applies.

    Args:
        input: (N, in_features) float32 on the CPU for the native products; anything torch takes otherwise.
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        (N, out_features); gradients of every order.
    """
    if runs_as_operator(input) and _takes(input, weight, bias):
        return ops.linear(input, weight, bias)
    if not runs_directly(input) or not _takes(input, weight, bias):
        return F.linear(input, weight, bias)
    if not cpu.linear.is_faster(input.shape[0], weight, "forward"):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias)):
        return _Linear.apply(input, weight, bias)
    return cpu.linear.forward(input, weight, bias)


def _takes(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether there are native products for these tensors, and it is not known that torch's are as fast."""
    if input.dim() != 2 or not input.is_cpu or torch.is_autocast_enabled("cpu"):
        return False
    if input.dtype is not torch.float32 or weight.dtype is not torch.float32 or weight.dim() != 2:
        return False
    if bias is not None and bias.dtype is not torch.float32:
        return False
    (rows, in_features), out_features = input.shape, weight.shape[0]
    if not holds(weight, (out_features, in_features), input.device) or not holds(bias, (out_features,), input.device):
        return False  # torch has the message
    return choose("linear", input, None) == "cpu" and cpu.linear.are_many(rows, out_features, in_features)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias):  # type: ignore[override]
        ctx.save_for_backward(input, weight)
        return cpu.linear.forward(input, weight, bias)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[override]
        input, weight = ctx.saved_tensors
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad
        natively = not torch.is_grad_enabled() and runs_directly(grad_output)
        gradients = _gradients if natively else _differentiable_gradients
        of_input, of_weight = gradients(grad_output, input, weight, wants_input, wants_weight)
        return of_input, of_weight, grad_output.sum(0) if wants_bias else None


Gradients = tuple[Tensor | None, Tensor | None]  # of input and weight


def _gradients(grad_output: Tensor, input: Tensor, weight: Tensor, wants_input: bool, wants_weight: bool) -> Gradients:
    if not cpu.linear.is_faster(input.shape[0], weight, "backward"):
        return _differentiable_gradients(grad_output, input, weight, wants_input, wants_weight)
    return (
        cpu.linear.backward_input(grad_output, weight) if wants_input else None,
        cpu.linear.backward_weight(grad_output, input) if wants_weight else None,
    )


def _differentiable_gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor, wants_input: bool, wants_weight: bool
) -> Gradients:
    return (grad_output @ weight if wants_input else None, grad_output.t() @ input if wants_weight else None)


# In graphs that torch.compile and torch.export make it is the operator that measures, when it runs.
def _forward_operator(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    natively = cpu.linear.is_faster(input.shape[0], weight, "forward")
    return cpu.linear.forward(input, weight, bias) if natively else F.linear(input, weight, bias)


def _backward_operator(
    grad_output: Tensor, input: Tensor, weight: Tensor, wants_input: bool, wants_weight: bool
) -> list[Tensor]:
    gradients = _gradients(grad_output, input, weight, wants_input, wants_weight)
    return [gradient for gradient in gradients if gradient is not None]


def _setup_context(ctx, inputs, output) -> None:
    input, weight, _ = inputs
    ctx.save_for_backward(input, weight)


def _operators_gradients(ctx, grad_output):
    input, weight = ctx.saved_tensors
    wants_input, wants_weight, wants_bias = ctx.needs_input_grad
    if torch.is_grad_enabled():
        of_input, of_weight = _differentiable_gradients(grad_output, input, weight, wants_input, wants_weight)
    else:
        found = iter(ops.linear_backward(grad_output, input, weight, wants_input, wants_weight))
        of_input, of_weight = (next(found) if wants else None for wants in (wants_input, wants_weight))
    return of_input, of_weight, grad_output.sum(0) if wants_bias else None


library.impl("linear", _forward_operator, "CPU")
library.impl("linear_backward", _backward_operator, "CPU")
torch.library.register_autograd("ganvas::linear", _operators_gradients, setup_context=_setup_context, lib=library)
