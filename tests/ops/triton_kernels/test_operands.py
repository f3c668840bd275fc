"""Numbers that kernels take apart, and divide by."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from ganvas.ops.backends.triton.operands import divided, divider, packed, slope_kind, unpacked

_LARGEST = 2**31 - 1


@triton.jit(do_not_specialize=["number"])
def _divide(values_ptr, quotients_ptr, number, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(quotients_ptr + at, divided(tl.load(values_ptr + at), number))


@triton.jit(do_not_specialize=["numbers"])
def _unpack(numbers, values_ptr):
    for i in range(4):
        tl.store(values_ptr + i, unpacked(numbers, i))


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 10, 64, 641, 6700417, 2**16 + 1, 2**30, 2**30 + 1, _LARGEST])
def test_division_is_exact(device, divisor):
    torch.manual_seed(divisor)
    near_multiples = torch.arange(0, _LARGEST // divisor, max(_LARGEST // divisor // 100, 1)) * divisor
    values = torch.cat([near_multiples - 1, near_multiples, torch.randint(0, _LARGEST, (700,)), torch.arange(50)])
    values = torch.cat([values, torch.full((1024,), _LARGEST)])[:1024].clamp_min(0).to(device, torch.int32)
    quotients = torch.empty_like(values)
    _divide[(1,)](values, quotients, divider(divisor), BLOCK=1024)
    assert torch.equal(quotients, values // divisor)


def test_division_by_zero_is_by_one(device):
    values = torch.tensor([0, 1, 7, _LARGEST], dtype=torch.int32, device=device)
    quotients = torch.empty_like(values)
    _divide[(1,)](values, quotients, divider(0), BLOCK=4)
    assert torch.equal(quotients, values)


@pytest.mark.parametrize("numbers", [(0, 0, 0, 0), (1, -1, 2**15 - 1, -(2**15)), (-3, 5, -7, 9), (-1, -1, -1, -1)])
def test_numbers_come_out_as_they_went_in(device, numbers):
    values = torch.empty(4, dtype=torch.int32, device=device)
    _unpack[(1,)](packed(numbers), values)
    assert tuple(values.tolist()) == numbers


def test_kinds_of_slopes():
    assert [slope_kind(slope) for slope in (0.0, -0.0, 0.01, 1.0)] == ["relu", "relu", "leaky", "identity"]
    assert {slope_kind(slope) for slope in (-0.1, 1.01, float("nan"), float("inf"))} == {"any"}
