"""TF32 has 10 bits of mantissa, to which the nearest is taken."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ganvas.ops.backends.triton import tf32


def test_the_nearest_is_taken_and_halves_go_away_from_zero():
    step = 2.0**-10
    values = torch.tensor([1 + 0.49 * step, 1 + 0.5 * step, 1 + 0.51 * step, -1 - 0.5 * step, 2 - 0.4 * step, 0.0])
    assert tf32.rounded(values).tolist() == [1.0, 1 + step, 1 + step, -1 - step, 2.0, 0.0]


def test_what_is_not_a_number_or_not_finite_stays_so():
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert tf32.rounded(nan).isnan().all()
    infinite = torch.tensor([float("inf"), -float("inf")])
    assert torch.equal(tf32.rounded(infinite), infinite)
