"""On a GPU a FusedSequential runs with whatever kernels there are, and with plain torch where there are none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ganvas.nn import convert, statistics_groups

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def _model() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Conv2d(8, 4, 3), nn.ReLU()
    )
    return model.cuda()


def test_a_conversion_proves_itself_and_leaves_the_random_state():
    model, x = _model(), torch.randn(8, 3, 12, 12, device="cuda")
    random_state = torch.cuda.get_rng_state()
    assert convert(model, x).proof is not None
    assert torch.equal(torch.cuda.get_rng_state(), random_state)


def test_groups_equal_separate_calls():
    model = _model().double()
    model[3].p = 0.0
    convert(model)
    one_by_one = copy.deepcopy(model)
    groups = [torch.randn(4, 3, 12, 12, device="cuda", dtype=torch.float64) * (i + 1) for i in range(2)]
    with statistics_groups(model, 2):
        output = model(torch.cat(groups))
    torch.testing.assert_close(output, torch.cat([one_by_one(group) for group in groups]))
    for buffer, twin in zip(model.buffers(), one_by_one.buffers()):
        torch.testing.assert_close(buffer, twin)
