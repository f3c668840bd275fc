"""Linear layers whose matrix products are native where that is the faster way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ganvas.ops.backends import cpu
from ganvas.ops.direct import holds, runs_directly
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
    if not _can_run(input, weight, bias):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias)):
        return _Linear.apply(input, weight, bias)
    return cpu.linear.forward(input, weight, bias)


def _can_run(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not runs_directly(input) or input.dim() != 2 or not input.is_cpu or torch.is_autocast_enabled("cpu"):
        return False
    if input.dtype is not torch.float32 or weight.dtype is not torch.float32 or weight.dim() != 2:
        return False
    if bias is not None and bias.dtype is not torch.float32:
        return False
    out_features = weight.shape[0]
    if not holds(weight, (out_features, input.shape[1]), input.device) or not holds(
        bias, (out_features,), input.device
    ):
        return False  # torch has the message
    if choose("linear", input, None) != "cpu":
        return False
    return cpu.linear.is_faster(input.shape[0], weight, "forward")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias):  # type: ignore[override]
        ctx.save_for_backward(input, weight)
        return cpu.linear.forward(input, weight, bias)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[override]
        input, weight = ctx.saved_tensors
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad
        natively = (
            not torch.is_grad_enabled()
            and runs_directly(grad_output)
            and cpu.linear.is_faster(input.shape[0], weight, "backward")
        )
        if natively:
            of_input = cpu.linear.backward_input(grad_output, weight) if wants_input else None
            of_weight = cpu.linear.backward_weight(grad_output, input) if wants_weight else None
        else:  # can be differentiated again
            of_input = grad_output @ weight if wants_input else None
            of_weight = grad_output.t() @ input if wants_weight else None
        return of_input, of_weight, grad_output.sum(0) if wants_bias else None
