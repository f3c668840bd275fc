"""The sums over pixels that are a bias' gradient, against float64, beside torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("ganvas._native")

from ganvas import _native as native
from ganvas.ops.backends.cpu import channel_sums

SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(SETTINGS, max_examples=60)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (5, 200, 17, 17))),
    mean=st.sampled_from([0.0, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads_used=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_random_maps_are_as_accurate_as_torch(accuracy, threads, shape, mean, dtype, threads_used, seed):
    threads(threads_used)
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    exact, torchs = x.double().sum((0, 2, 3)), x.sum((0, 2, 3), dtype=torch.float32)
    # Of the terms' sizes: a sum may cancel. Up to 64 of them are added up one after the other, which makes one rounding
    # of the result as a rule, and now and then two; torch's error may by chance be next to none.
    accuracy.check("sums", channel_sums(x), exact, torchs, exact, 2.0, 3 * x.double().abs().sum((0, 2, 3)))


def test_the_same_bits_each_time(threads):
    threads(2)
    x = torch.randn(64, 24, 32, 32).contiguous(memory_format=torch.channels_last)
    first = channel_sums(x)
    assert all(torch.equal(channel_sums(x), first) for _ in range(5))


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_what_is_not_finite_stays_in_its_channel(bad):
    x = torch.randn(3, 20, 5, 7).contiguous(memory_format=torch.channels_last)
    x[1, 4, 2, 3] = float(bad)
    finite = channel_sums(x).isfinite()
    assert not finite[4]
    assert finite.sum() == 19


def test_sizes_and_addresses_are_validated():
    x, sums = torch.zeros(2, 3), torch.zeros(3)
    with pytest.raises(ValueError, match="rows and channels must be at least 1; got 0 and 3"):
        native.channel_sums(native.Dtype.float32, 0, 3, x.data_ptr(), sums.data_ptr(), 1)
    with pytest.raises(ValueError, match="values must not be null"):
        native.channel_sums(native.Dtype.float32, 2, 3, 0, sums.data_ptr(), 1)
