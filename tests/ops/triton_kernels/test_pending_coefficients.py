"""The gradient that stays pending is that of the norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ahead_of_time import CAPABILITIES, compiled
from fences import fenced
from torch import Tensor

from ganvas.ops.backends.gpu.pending_coefficients import pending_gradient
from ganvas.ops.pending import Pending, with_statistics

EPS, SLOPE, SIDES = 1e-3, 0.2, (5, 3)


def kinked(stored: Tensor, activation_first: bool) -> Tensor:
    """What the norm reads."""
    return F.leaky_relu(stored, SLOPE) if activation_first else stored


def by_torch(grad: Tensor, stored: Tensor, weight: Tensor | None, groups: int, activation_first: bool) -> list[Tensor]:
    """The gradients of stored, γ and β."""
    affine = torch.ones(stored.shape[1]).to(stored) if weight is None else weight.to(stored)
    leaves = [stored.requires_grad_(), affine.requires_grad_(), torch.zeros_like(affine).requires_grad_()]
    parts = kinked(stored, activation_first).chunk(groups)
    output = torch.cat([F.batch_norm(part, None, None, *leaves[1:], True, 0.0, EPS) for part in parts])
    return list(torch.autograd.grad(output, leaves, grad))


def written(raw) -> Tensor:
    """The gradient that is pending in ``raw``."""
    alpha, beta, delta = (t.repeat_interleave(len(raw.grad) // len(t), 0)[:, :, None, None] for t in raw[2:5])
    result = alpha * raw.grad + beta * kinked(raw.stored, raw.activation_first) + delta
    return torch.where(raw.stored > 0, result, SLOPE * result) if raw.activation_first else result


@pytest.mark.parametrize(("groups", "channels"), [(1, 5), (3, 7), (2, 130)])
@pytest.mark.parametrize("activation_first", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_it_is_that_of_the_norm(device, accuracy, groups, channels, activation_first, affine):
    torch.manual_seed(groups)
    stored, grad = torch.randn(2, 2 * groups, channels, *SIDES).double() + torch.tensor([3.0, 0.5]).view(2, 1, 1, 1, 1)
    weight = torch.randn(channels).index_fill(0, torch.tensor([2]), 0.0) if affine else None
    x = kinked(stored, activation_first).view(groups, 2, channels, -1)
    mean, var = x.mean((1, 3)), x.var((1, 3), unbiased=False)
    of_group = grad.view(groups, 2, channels, -1)
    sums = torch.stack([of_group.sum((1, 3)), (of_group * (x - mean[:, None, :, None])).sum((1, 3))])
    moments = (mean.float(), var.float())
    pending = with_statistics(stored.float(), weight, None, *moments, EPS, SLOPE, activation_first, True)
    on_device = pending._replace(
        **{
            name: (fenced(value) if device.type == "cpu" else value.to(device))
            for name, value in pending._asdict().items()
            if isinstance(value, Tensor)
        }
    )
    ours = pending_gradient(grad.float().to(device), sums.float().to(device), on_device)
    arguments = (weight, groups, activation_first)
    exact, torchs = by_torch(grad, stored, *arguments), by_torch(grad.float(), stored.float(), *arguments)
    largest = grad.abs().double() * pending.scale.abs().max().double()  # before the norm's part is taken off
    terms = {"stored": largest, "weight": None, "bias": None}
    for name, result, theirs, precise in zip(terms, (written(ours[0]), *ours[1:]), torchs, exact):
        accuracy.check(name, result.cpu(), precise, theirs, precise, 3.0, terms[name])


def test_fixed_statistics_are_refused(device):
    stored, zeros = torch.randn(2, 3, 4, 4, device=device), torch.zeros(1, 3, device=device)
    given = Pending(stored, zeros, zeros, zeros, zeros, batch_statistics=False)
    with pytest.raises(ValueError, match="pending must have batch statistics; got fixed ones"):
        pending_gradient(stored, torch.zeros(2, 1, 3, device=device), given)


def launches() -> None:
    """Called in another process (ahead_of_time.py)."""
    stored, per_channel = torch.empty(8, 24, 4, 4, device="meta"), torch.empty(2, 24, device="meta")
    pending_gradient(stored, torch.empty(2, 2, 24, device="meta"), Pending(stored, *[per_channel] * 4, eps=1e-5,
                     batch_statistics=True))  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiled_ahead_nothing_spills(capability):
    (kernel,) = compiled(__file__, "launches", capability)
    assert kernel.spilled == 0
