"""Where there is no memory for measuring, nothing is lost: plain torch runs, and the next shape is measured again."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from ganvas.nn import FusedSequential
from ganvas.ops import batch_norm_leaky_relu, generator_loss, steps_on_gpu, tuning
from ganvas.ops.backends import cuda, triton

if not cuda.MISSING:
    from ganvas.ops.backends.gpu import convolution

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
MORE_THAN_THERE_IS = 2**50


@pytest.fixture(autouse=True)
def measuring(monkeypatch, tmp_path):
    reason = triton.can_run("conv_bn_leaky_relu", torch.empty(1, device=DEVICE))
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.delenv("GANVAS_BACKEND", raising=False)
    monkeypatch.setenv("GANVAS_AUTOTUNE", "1")
    monkeypatch.setenv("GANVAS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_remembered", {})
    monkeypatch.setattr(tuning, "decisions", {})
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def take_all(*_, **__) -> Tensor:
    return torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8, device=DEVICE)


def fused() -> FusedSequential:
    torch.manual_seed(0)
    return FusedSequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.LeakyReLU(0.2)).to(
        DEVICE, memory_format=torch.channels_last
    )


def step(network: nn.Module, x: Tensor) -> list[Tensor]:
    output = network(x)
    return [output.detach(), *torch.autograd.grad(output.square().mean(), list(network.parameters()))]


def test_a_network_goes_on_in_plain_torch(monkeypatch):
    x = torch.randn(8, 16, 12, 12, device=DEVICE)
    with monkeypatch.context() as patch:
        patch.setenv("GANVAS_BACKEND", "reference")
        expected = step(fused(), x)
    monkeypatch.setattr(convolution, "trial", take_all)
    for result, torchs in zip(step(fused(), x), expected):
        torch.testing.assert_close(result, torchs, rtol=1e-3, atol=1e-4)
    assert not [entry for entry in tuning.entries() if entry.case.direction != "step"]


@pytest.mark.parametrize("op", [batch_norm_leaky_relu, generator_loss], ids=lambda op: op.__name__)
def test_an_operation_goes_on_in_plain_torch_and_says_why(monkeypatch, caplog, op):
    x = torch.randn(64, 8, device=DEVICE)
    arguments = (x, None, None, None, None) if op is batch_norm_leaky_relu else (x,)
    options = {"training": True} if op is batch_norm_leaky_relu else {}
    expected = op(*arguments, **options, backend="reference")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="ganvas"):
        patch.setattr(steps_on_gpu, "_step", take_all)
        for _ in range(2):
            torch.testing.assert_close(op(*arguments, **options), expected)
    assert [record.message.startswith("there is no memory for measuring") for record in caplog.records] == [True]
    assert tuning.entries() == []
    # Another process, or this one when it has forgotten, measures again.
    tuning.decisions.clear()
    torch.testing.assert_close(op(*arguments, **options), expected)
    assert [entry.case.convolution for entry in tuning.entries()] == [op.__name__]


def test_memory_that_a_process_may_not_have_is_not_waited_for():
    """Enough for the operation, too little for the values it would be measured on."""
    x = torch.randn(2**13, 2**11, device=DEVICE)  # 64 MiB
    expected = batch_norm_leaky_relu(x, None, None, None, None, training=True, backend="cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 3 * x.nbytes) / total)
    try:
        with torch.no_grad():
            output = batch_norm_leaky_relu(x, None, None, None, None, training=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
