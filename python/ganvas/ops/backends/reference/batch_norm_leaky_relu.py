"""BatchNorm and LeakyReLU in either order, in plain torch.

With per-channel mean μ and biased variance σ² of the normalised tensor (batch statistics in training, running ones
otherwise), x̂ = (x − μ)/√(σ² + eps):

- ``conv_bn_act``: output = lrelu(γ·x̂(input) + β)      (Ioffe & Szegedy 2015, algorithm 1, then the activation)
- the same with a residual: output = lrelu(γ·x̂(input) + β + residual)      (He et al. 2015, figure 2)
- ``conv_act_bn``: output = γ·x̂(lrelu(input)) + β
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_norm_leaky_relu(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    negative_slope: float,
    order: str,
    statistics_groups: int = 1,
    residual: Tensor | None = None,
) -> Tensor:
    """Specification of :func:`ganvas.ops.batch_norm_leaky_relu`; the running statistics are updated group by group."""
    if order == "conv_act_bn":
        input = _leaky_relu(input, negative_slope)

    def normalise(group: Tensor) -> Tensor:
        return F.batch_norm(group, running_mean, running_var, weight, bias, training, momentum, eps)

    if training and statistics_groups > 1:
        output = torch.cat([normalise(group) for group in input.chunk(statistics_groups)])
    else:
        output = normalise(input)
    if residual is not None:
        output = output + residual
    return _leaky_relu(output, negative_slope) if order == "conv_bn_act" else output


def _leaky_relu(x: Tensor, negative_slope: float) -> Tensor:
    # At -inf a slope of 0 would give NaN, where ReLU gives 0.
    return F.leaky_relu(x, negative_slope) if negative_slope else F.relu(x)
