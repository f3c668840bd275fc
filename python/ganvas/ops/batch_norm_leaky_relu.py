"""BatchNorm and LeakyReLU as one operation, in either order, with statistics groups and gradients of every order.

A residual can be added between the two: what ends the block of a residual network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ganvas.ops import checks
from ganvas.ops.backends import reference
from ganvas.ops.direct import is_float32, runs_directly
from ganvas.ops.kernels import kernels_of
from ganvas.ops.schemas import ops
from ganvas.ops.selection import choose

ORDERS = ("conv_bn_act", "conv_act_bn")


def batch_norm_leaky_relu(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
    order: str = "conv_bn_act",
    statistics_groups: int = 1,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """lrelu(γ·x̂ + β + residual) (``conv_bn_act``) or γ·x̂(lrelu(input)) + β (``conv_act_bn``), x̂ = (x − μ)/√(σ² + eps).

    Args:
        input: (N, C), (N, C, L) or (N, C, H, W); float32 or bfloat16 in the native kernels, any float in plain torch.
            The kernels' layout is channels_last; a contiguous (N, C, H, W) input is copied into it first, and the
            output is channels_last.
        weight, bias: γ and β, (C,) or None (1 and 0).
        running_mean, running_var: (C,) or None. Training: updated in place, the variance with Bessel's correction.
            Evaluation: used instead of the batch's statistics, so required.
        momentum: share of the new statistics in the running ones, as in torch.
        negative_slope: of the LeakyReLU; 0 is ReLU, 1 the identity.
        statistics_groups: in training the batch is split into this many equal consecutive parts, each with statistics
            of its own, as if they had been passed in one call after the other.
        residual: like ``input`` (shape, dtype, device), added before the activation; ``conv_bn_act`` only.
        backend: forces one of :func:`ganvas.ops.available_backends`.

    Returns:
        The same shape and dtype as ``input``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or value; one value per channel in training.

    Source: Ioffe & Szegedy 2015, algorithm 1; Maas et al. 2013 (LeakyReLU); He et al. 2015, figure 2 (residual).
    """
    checks.normalisation(
        input,
        weight,
        bias,
        running_mean,
        running_var,
        training=training,
        eps=eps,
        order=order,
        groups=statistics_groups,
    )
    checks.residual(residual, input, order)
    chosen = choose("batch_norm_leaky_relu", input, backend)
    # An empty batch has no work and no statistics worth a kernel: torch defines what happens.
    if chosen == "reference" or input.numel() == 0:
        return reference.batch_norm_leaky_relu(
            input, weight, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps,
            negative_slope=negative_slope, order=order, statistics_groups=statistics_groups, residual=residual,
        )  # fmt: skip
    if residual is not None and negative_slope < 0:
        # Such a slope leaves no trace of the kink's side in the output's sign, from which backward tells it.
        sums = batch_norm_leaky_relu(
            input, weight, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps,
            negative_slope=1.0, statistics_groups=statistics_groups, residual=residual, backend=backend,
        )  # fmt: skip
        return F.leaky_relu(sums, negative_slope)
    input = checks.native_layout(input)  # here, where autograd sees the copy: backward differentiates through it
    activation_first = order == "conv_act_bn"
    if not training:
        fixed: tuple[Any, ...] = (running_mean, running_var, eps, negative_slope)
        graph = _needs_graph(input, weight, bias, residual)
        if residual is not None:
            evaluate_add = _EvaluateAdd.apply if graph else _kernels(input).add_evaluate
            return evaluate_add(input, weight, bias, residual, *fixed)
        evaluate: Callable[..., Tensor] = _Evaluate.apply if graph else _kernels(input).evaluate
        return evaluate(input, weight, bias, *fixed, activation_first)
    options = (eps, negative_slope, activation_first, statistics_groups)
    if momentum and running_mean is not None and running_var is not None:
        return _train_and_update(input, weight, bias, residual, running_mean, running_var, momentum, *options)
    return _train(input, weight, bias, residual, None, *options)[0]


def _train_and_update(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, running_mean: Tensor,
    running_var: Tensor, momentum: float, eps: float, negative_slope: float, activation_first: bool, groups: int,
) -> Tensor:  # fmt: skip
    """Training with running statistics: the kernel moves them where it can reach them, torch does otherwise."""
    in_kernel = runs_directly(input) and is_float32(running_mean) and is_float32(running_var)
    running = (running_mean, running_var, momentum) if in_kernel else None
    options = (eps, negative_slope, activation_first, groups)
    output, mean, var = _train(input, weight, bias, residual, running, *options)
    if in_kernel:
        torch.autograd.graph.increment_version((running_mean, running_var))
    else:
        move_running_statistics(running_mean, running_var, mean, var, momentum, input.numel() // mean.numel())
    return output


def move_running_statistics(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int
) -> None:
    """Towards each group's (G, C) statistics of ``count`` values, in order, the variance with Bessel's correction."""
    # Not under no_grad, of which torch.export makes a graph of its own that cannot be loaded again.
    unbiased, means, variances = var * (count / (count - 1)), running_mean.detach(), running_var.detach()
    for group in range(mean.shape[0]):
        means.lerp_(mean[group].to(means.dtype), momentum)
        variances.lerp_(unbiased[group].to(variances.dtype), momentum)


def _kernels(tensor: Tensor) -> Any:
    return kernels_of(tensor).batch_norm_leaky_relu


def _needs_graph(input: Tensor, *others: Tensor | None) -> bool:
    """Whether autograd, or somebody else, has to see the operation: otherwise the kernel is called straight."""
    if not runs_directly(input):
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, *others))


def _train(input, weight, bias, residual, running, eps, negative_slope, activation_first, groups):
    if not _needs_graph(input, weight, bias, residual):
        kernels, moved = _kernels(input), running or ()
        if residual is not None:
            return kernels.add_train(input, weight, bias, residual, eps, negative_slope, groups, *moved)
        return kernels.train(input, weight, bias, eps, negative_slope, activation_first, groups, *moved)
    if residual is not None:
        return _TrainAdd.apply(input, weight, bias, residual, running, eps, negative_slope, groups)
    return _Train.apply(input, weight, bias, running, eps, negative_slope, activation_first, groups)


class _Train(torch.autograd.Function):
    """Batch statistics. ``running``: (running_mean, running_var, momentum) for the kernel to update, or None."""

    @staticmethod
    def forward(ctx, input, weight, bias, running, eps, negative_slope, activation_first, groups):  # type: ignore[override]
        options = (eps, negative_slope, activation_first, groups)
        if runs_directly(input):
            output, mean, var = _kernels(input).train(input, weight, bias, *options, *(running or ()))
        else:
            output, mean, var = ops.batch_norm_leaky_relu_train(input, weight, bias, *options)
        ctx.save_for_backward(input, weight, bias, mean, var)
        ctx.options = options
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # no zeros for the gradients that mean and var do not have
        return output, mean, var

    @staticmethod
    def backward(ctx, grad_output, _grad_mean, _grad_var):  # type: ignore[override]
        input, weight, bias, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _differentiable_backward(grad_output, input, weight, bias, None, None, True, *ctx.options)
        else:
            grads = _native_backward(grad_output, input, weight, bias, mean, var, True, *ctx.options)
        return (*grads, None, None, None, None, None)


class _Evaluate(torch.autograd.Function):
    """Fixed statistics: an affine map per channel and the kink."""

    @staticmethod
    def forward(ctx, input, weight, bias, mean, var, eps, negative_slope, activation_first):  # type: ignore[override]
        ctx.save_for_backward(input, weight, bias, mean, var)
        ctx.options = (eps, negative_slope, activation_first, 1)
        run = _kernels(input).evaluate if runs_directly(input) else ops.batch_norm_leaky_relu_eval
        return run(input, weight, bias, mean, var, eps, negative_slope, activation_first)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[override]
        input, weight, bias, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _differentiable_backward(grad_output, input, weight, bias, mean, var, False, *ctx.options)
        else:
            grads = _native_backward(grad_output, input, weight, bias, mean, var, False, *ctx.options)
        return (*grads, None, None, None, None, None)


class _TrainAdd(torch.autograd.Function):
    """Batch statistics and a residual. ``running`` as in ``_Train``."""

    @staticmethod
    def forward(ctx, input, weight, bias, residual, running, eps, negative_slope, groups):  # type: ignore[override]
        options = (eps, negative_slope, groups)
        if runs_directly(input):
            run = _kernels(input).add_train
            output, mean, var = run(input, weight, bias, residual, *options, *(running or ()))
        else:
            output, mean, var = ops.batch_norm_add_leaky_relu_train(input, weight, bias, residual, *options)
        _save_for_add_backward(ctx, output, input, weight, bias, mean, var, True, options)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return output, mean, var

    @staticmethod
    def backward(ctx, grad_output, _grad_mean, _grad_var):  # type: ignore[override]
        return (*_add_backward(ctx, grad_output), None, None, None, None)


class _EvaluateAdd(torch.autograd.Function):
    """Fixed statistics and a residual."""

    @staticmethod
    def forward(ctx, input, weight, bias, residual, mean, var, eps, negative_slope):  # type: ignore[override]
        direct = runs_directly(input)
        run = _kernels(input).add_evaluate if direct else ops.batch_norm_add_leaky_relu_eval
        output = run(input, weight, bias, residual, mean, var, eps, negative_slope)
        _save_for_add_backward(ctx, output, input, weight, bias, mean, var, False, (eps, negative_slope, 1))
        return output

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[override]
        return (*_add_backward(ctx, grad_output), None, None, None, None)


def _save_for_add_backward(ctx, output, input, weight, bias, mean, var, training, options):
    """The output tells the side of the kink, and costs no memory where the next layer keeps it too."""
    _, negative_slope, _ = options
    ctx.save_for_backward(None if negative_slope == 1.0 else output, input, weight, bias, mean, var)
    ctx.training, ctx.options = training, options


def _add_backward(ctx, grad_output):
    """Gradients of input, weight, bias and residual."""
    output, input, weight, bias, mean, var = ctx.saved_tensors
    eps, negative_slope, groups = ctx.options
    norm = (input, weight, bias, mean, var, ctx.training, eps)
    if output is not None and not torch.is_grad_enabled():
        direct = runs_directly(grad_output)
        run = _kernels(grad_output).add_backward if direct else ops.batch_norm_add_leaky_relu_backward
        *grads, grad_residual = run(grad_output, output, *norm, negative_slope, groups)
        return *_of_parameters(grads, weight, bias), grad_residual
    if output is not None:
        grad_output = torch.where(output > 0, grad_output, grad_output * negative_slope)
    if not torch.is_grad_enabled():
        return *_native_backward(grad_output, *norm, 1.0, False, groups), grad_output
    if ctx.training:
        norm = (input, weight, bias, None, None, True, eps)
    return *_differentiable_backward(grad_output, *norm, 1.0, False, groups), grad_output


def _native_backward(
    grad_output, input, weight, bias, mean, var, training, eps, negative_slope, activation_first, groups
):
    direct = runs_directly(grad_output)
    kernel = _kernels(grad_output).backward if direct else ops.batch_norm_leaky_relu_backward
    grads = kernel(grad_output, input, weight, bias, mean, var, training, eps, negative_slope, activation_first, groups)
    return _of_parameters(grads, weight, bias)


def _of_parameters(grads, weight, bias):
    """Gradients of input, weight and bias, the latter two of the parameters' dtypes, or None."""
    grad_input, grad_weight, grad_bias = grads
    return (
        grad_input,
        None if weight is None else _of_dtype(grad_weight, weight.dtype),
        None if bias is None else _of_dtype(grad_bias, bias.dtype),
    )


def _of_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if values.dtype is dtype else values.to(dtype)


def _differentiable_backward(
    grad_output, input, weight, bias, mean, var, training, eps, negative_slope, activation_first, groups
):
    """The same gradients through the reference formula, which can be differentiated again (create_graph=True)."""
    with torch.enable_grad():
        output = reference.batch_norm_leaky_relu(
            input, weight, bias, mean, var, training=training, momentum=0.0, eps=eps, negative_slope=negative_slope,
            order="conv_act_bn" if activation_first else "conv_bn_act", statistics_groups=groups,
        )  # fmt: skip
        return reference_gradients(output, (input, weight, bias), grad_output)


def reference_gradients(
    output: Tensor, inputs: tuple[Tensor | None, ...], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """d output/d input for each input that takes part in the graph, ``None`` for the others; differentiable."""
    taking_part = {i: tensor for i, tensor in enumerate(inputs) if tensor is not None and tensor.requires_grad}
    found = torch.autograd.grad(output, list(taking_part.values()), grad_output, create_graph=True, allow_unused=True)
    grads = dict(zip(taking_part, found))
    return tuple(grads.get(i) for i in range(len(inputs)))
