"""What several tests of ganvas.nn use: a plain twin, and everything a training step computes."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parents[1] / "benchmarks")]  # for networks.py and cifar_resnet.py


@dataclass
class Step:
    """Output, gradients of input and parameters, and buffers after one forward and backward."""

    output: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {"output": self.output, **self.gradients, **self.buffers}


def _step(model: nn.Module, x: Tensor) -> Step:
    leaf = x.detach().clone().requires_grad_()
    model.zero_grad()
    output = model(leaf.clone())
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype))
    gradients = {"grad of input": leaf.grad}
    gradients |= {f"grad of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(output.detach(), gradients, {name: b.clone() for name, b in model.named_buffers()})


def _plain_twin(sequential: nn.Sequential) -> nn.Sequential:
    """An ``nn.Sequential`` of copies of the same children under the same names."""
    return nn.Sequential(OrderedDict((name, copy.deepcopy(child)) for name, child in sequential.named_children()))


def _error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact.double()).norm().item()


def _assert_as_accurate(fused: Step, plain: Step, exact: Step) -> None:
    """Each of ``fused``'s tensors lies about as close to the float64 result as torch's own does (3×, and a floor)."""
    for name, tensor in fused.tensors().items():
        expected = exact.tensors()[name]
        floor = 8 * torch.finfo(fused.output.dtype).eps * expected.double().norm().item()
        # A gradient that is nothing but rounding noise (of a bias before a norm) is measured against its neighbours.
        noise = 1e-6 * max(g.norm().item() for g in exact.gradients.values())
        allowed = 3 * _error(plain.tensors()[name], expected) + floor + noise
        assert _error(tensor, expected) <= allowed, name


@pytest.fixture
def step():
    return _step


@pytest.fixture
def plain_twin():
    return _plain_twin


@pytest.fixture
def assert_as_accurate():
    return _assert_as_accurate


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """More threads only wait for one another on tensors this small, all the more beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
