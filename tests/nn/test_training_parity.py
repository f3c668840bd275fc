"""Some steps of training in ganvas and in plain torch, from one seed, go the same way."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ganvas.nn import FusedSequential, convert


def _classifier() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.1),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def _train(model: nn.Module, dtype: torch.dtype, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        labels = torch.randint(0, 3, (24,), generator=generator)
        images = torch.randn(24, 1, 8, 8, generator=generator).to(dtype)
        images += 2 * labels[:, None, None, None].to(dtype)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 0.0), (torch.float32, 1e-3)])
def test_losses_and_parameters_agree_after_training(dtype, tolerance):
    plain = _classifier().to(dtype)
    fused = copy.deepcopy(plain)
    convert(fused)
    assert type(fused) is FusedSequential
    losses, expected = _train(fused, dtype, 20), _train(plain, dtype, 20)
    assert expected[-1] < 0.7 * expected[0], "a net that learns nothing compares nothing"
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    for (name, tensor), twin in zip(fused.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(tensor, twin, rtol=tolerance, atol=tolerance, msg=name)
