# ruff: noqa: F401, F811
"""Chains of a GPU on the processor: Triton's convolutions in the interpreter, CUDA kernels between them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

import test_chain_cuda
from chains import Chain
from interpreter_repairs import repair
from test_chain_cuda import (
    CHOICES,
    DTYPES,
    NAMES,
    chosen,
    kernels_run_here,
    test_pooled,
    test_slices_that_begin_anywhere,
)

repair()


@pytest.fixture(autouse=True)
def few_pixels(monkeypatch):
    """What takes a GPU microseconds takes the interpreter minutes."""

    def cropped(chain: Chain) -> Chain:
        input, residual = (x if x is None else x[: 2 * chain.groups, :, :4, :5] for x in (chain.input, chain.residual))
        return replace(chain, input=input, residual=residual)

    monkeypatch.setattr(test_chain_cuda, "on_gpu", cropped)


QUICK = {
    ("torch's convolution between", 2, torch.float32),
    ("fixed statistics, no norm", 1, torch.float16),
}
SLOW = {
    ("both orders", 1, torch.bfloat16),
    ("activation first", 2, torch.float32),
    ("from three channels", 1, torch.float16),
}


def marks(*case: str | int | torch.dtype) -> list[pytest.MarkDecorator]:
    return [] if case in QUICK else [pytest.mark.slow if case in SLOW else pytest.mark.exhaustive]


STEPS = [pytest.param(*case, marks=marks(*case)) for case in product(NAMES, [1, 2], DTYPES)]


@pytest.mark.parametrize(("name", "groups", "dtype"), STEPS, ids=str)
def test_a_step_is_as_accurate_as_torchs(accuracy, name, groups, dtype):
    test_chain_cuda.test_a_step_is_as_accurate_as_torchs(accuracy, name, groups, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES, indirect=True)
def test_every_choice_is_as_accurate_as_torch(accuracy, chosen):
    test_chain_cuda.test_every_choice_is_as_accurate_as_torch(accuracy, chosen, "both orders", 2, torch.float32)


@pytest.mark.parametrize("slope", [0.0, pytest.param(0.2, marks=pytest.mark.exhaustive)])
def test_a_residual_block(accuracy, slope):
    test_chain_cuda.test_a_residual_block(accuracy, slope)
