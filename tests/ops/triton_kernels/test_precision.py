"""Float32 products are reduced where torch's own convolutions may reduce theirs."""

from __future__ import annotations

import pytest
import torch

from ganvas.ops.backends.triton.precision import uses_tf32


@pytest.fixture(autouse=True)
def torchs_default():
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("allowed", [True, False])
def test_as_the_flag_says(allowed):
    torch.backends.cudnn.allow_tf32 = allowed
    assert uses_tf32() is allowed


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="needs a torch with precisions by name")
def test_as_the_precision_says():
    torch.backends.cudnn.allow_tf32 = True  # as it is by default
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert not uses_tf32()
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert uses_tf32()
