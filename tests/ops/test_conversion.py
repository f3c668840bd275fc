"""Numbers of many tensors in another dtype, beside torch's."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import passes, with_lesser_instruction_sets

pytest.importorskip("ganvas._native")

from ganvas import _native as native
from ganvas.ops.backends.cpu.arguments import convert, in_dtypes

# Ties, the largest, the smallest normal one, infinities and NaN.
ODD = [0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, -3.4028235e38, 1.1754944e-38, *map(float, ("inf", "-inf", "nan"))]


@pytest.mark.parametrize("count", [1, 7, 16, 33, 5000, 400_000])
@pytest.mark.parametrize("threads_used", [1, 3])
def test_numbers_are_torchs(threads, count, threads_used):
    threads(threads_used)
    numbers = torch.randn(count)
    (narrow,) = in_dtypes([numbers], [torch.bfloat16])
    assert torch.equal(narrow, numbers.bfloat16())
    (wide,) = in_dtypes([narrow], [torch.float32])
    assert torch.equal(wide, narrow.float())


def test_odd_numbers_are_torchs():
    numbers = torch.tensor(ODD)
    (narrow,) = in_dtypes([numbers], [torch.bfloat16])
    torch.testing.assert_close(narrow, numbers.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_what_needs_no_copy_is_itself():
    tensors = [torch.ones(3), None, torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.bfloat16)]
    found = in_dtypes(tensors, [torch.float32] * 4)
    assert all(a is b for a, b in zip(found[:3], tensors[:3]))
    assert found[3].dtype is torch.float32


def test_copies_lie_as_the_tensors_do():
    channels_last = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    tensors = [channels_last, torch.randn(4, 6)[:, ::2], torch.randn(7, dtype=torch.float64)]
    found = in_dtypes(tensors, [torch.bfloat16] * 3)
    for tensor, copy in zip(tensors, found):
        assert torch.equal(copy, tensor.bfloat16())
    assert found[0].stride() == channels_last.stride()


def test_into_tensors_that_there_are():
    wide, narrow = torch.randn(20), torch.zeros(20, dtype=torch.bfloat16)
    convert([(wide, narrow)])
    assert torch.equal(narrow, wide.bfloat16())


def test_bad_arguments():
    with pytest.raises(ValueError, match="as many"):
        native.convert([8], [8, 8], [1], native.Dtype.float32, 1)
    with pytest.raises(ValueError, match="counts must be positive"):
        native.convert([8], [8], [0], native.Dtype.float32, 1)
    with pytest.raises(ValueError, match="source"):
        native.convert([0], [8], [1], native.Dtype.float32, 1)


@with_lesser_instruction_sets
def test_lesser_instruction_sets_pass_the_same_tests(isa):
    passes(__file__, isa, "-k", "not instruction_set")
