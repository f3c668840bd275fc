"""Residual blocks that follow each other, of a converted network, as chains that add what is their own."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_resnet import CifarBlock, CifarResNet

pytest.importorskip("ganvas._native")

from ganvas.nn import convert
from ganvas.nn.run import Run
from ganvas.ops.chain import Chain
from ganvas.ops.layers import GIVEN, Adds


@pytest.fixture
def chains(monkeypatch) -> list[Adds]:
    """What the chains that were executed add of their own."""
    executed: list[Adds] = []

    def record(chain, *arguments):
        executed.append(chain.adds)
        return run(chain, *arguments)

    run = Chain.run
    monkeypatch.setattr(Chain, "run", record)
    return executed


def blocks(count: int = 2, width: int = 16) -> nn.Sequential:
    """Smooth: a value next to a kink falls on different sides of it in any two libraries."""
    torch.manual_seed(0)
    model = nn.Sequential(*(CifarBlock(width, width, 1) for _ in range(count)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 6.0)
    return model


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (4, 16, 8, 8), generator=torch.Generator().manual_seed(2))


TWO, FOUR = (None, 0, None, 2), (None, 0, None, 2, None, 4, None, 6)  # blocks


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_as_accurate_as_torchs(chains, step, assert_as_accurate, dtype, training):
    model = blocks().to(dtype).train(training)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    convert(model)
    x = image().to(dtype)
    for _ in range(2):
        assert_as_accurate(step(model, x), step(plain, x), step(exact, x.double()))
    assert chains == [TWO, TWO]


def test_a_resnet_is_a_chain_to_each_change_of_size(chains):
    model = CifarResNet(3, 16).eval()
    plain = copy.deepcopy(model)
    convert(model)
    with torch.no_grad():
        torch.testing.assert_close(model(image(4, 3, 32, 32)), plain(image(4, 3, 32, 32)), rtol=1e-4, atol=1e-4)
    adding = [adds for adds in chains if any(added is not None for added in adds)]
    assert [sum(added is not None for added in adds) for adds in adding] == [3, 3, 3]


def _group(model: nn.Sequential) -> None:
    model[1].conv1 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)


def _reflect(model: nn.Sequential) -> None:
    model[1].conv2.padding_mode = "reflect"


def _hook(model: nn.Sequential) -> None:
    model[1].bn1.register_forward_hook(lambda *_: None)


def _cumulative(model: nn.Sequential) -> None:
    for block in model:
        block.bn2.momentum = None


CHANGES: dict[str, tuple[Callable[[nn.Sequential], object], list[Adds]]] = {
    "a convolution of torch's in the second": (_group, [(None, None), (None, None), TWO]),
    "a padding that no kernel knows": (_reflect, [(None, None), (None,), TWO]),
    "a hook": (_hook, [(None, None), (None,), TWO]),
    "cumulative averages": (_cumulative, [FOUR]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_be_in_one_chain_runs_in_parts(chains, step, assert_as_accurate, name):
    change, expected = CHANGES[name]
    model = blocks(4)
    change(model)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    convert(model)
    assert_as_accurate(step(model, image()), step(plain, image()), step(exact, image().double()))
    assert chains == expected


class _Given(nn.Module):
    """Two residuals from outside, and a block between them."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(4):
            setattr(self, f"conv{i}", nn.Conv2d(16, 16, 3, padding=1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(16))

    def forward(self, x: Tensor, first: Tensor, last: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.conv0(x)) + first)
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)
        return torch.relu(self.bn3(self.conv3(x)) + last)


def test_one_residual_from_outside_is_in_a_chain(chains):
    torch.manual_seed(0)
    model = _Given()
    plain = copy.deepcopy(model)
    convert(model)
    results = []
    for one in (model, plain):
        given = [image().mul_(scale).requires_grad_() for scale in (1, -1, 2)]
        output = one(*given)
        output.square().sum().backward()
        results.append([output, *(tensor.grad for tensor in given), one.conv0.weight.grad])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert chains == [(GIVEN, None, 1), (None,)]


class _Nine(nn.Module):
    """Of the form of DAVIDnet, with attributes: pooling after activations, residuals added to activations."""

    def __init__(self, channels: int = 16, outputs: int = 16) -> None:
        super().__init__()
        widths = [(channels, 16), (16, 16), (16, 16), (16, 24), (24, 24), (24, 24), (24, outputs)]
        for i, (inputs, outputs) in enumerate(widths):
            setattr(self, f"conv{i}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(outputs))
        self.pool = nn.MaxPool2d(2)

    def layer(self, i: int, x: Tensor) -> Tensor:
        return F.leaky_relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)), 0.9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.layer(0, x))
        x = self.layer(2, self.layer(1, x)) + x
        x = F.max_pool2d(self.layer(3, x), 2)
        x = x + self.layer(5, self.layer(4, x))
        return self.conv6(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_and_residuals_added_to_activations_are_in_one_chain(chains, step, assert_as_accurate, dtype, training):
    torch.manual_seed(0)
    model = _Nine().to(dtype).train(training)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    convert(model)
    x = image(4, 16, 16, 16).to(dtype)
    assert_as_accurate(step(model, x), step(plain, x), step(exact, x.double()))
    assert chains == [(None, None, 1, None, None, 4, None)]


def test_a_chain_ends_before_a_convolution_that_is_torchs(chains):
    model = _Nine(3, 8)
    plain = copy.deepcopy(model)
    convert(model)
    x = image(4, 3, 16, 16)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    assert chains == [(None,), (None, 0, None, None, 3)]


def test_a_hook_on_a_pooling_fires():
    model = _Nine()
    convert(model)
    seen = []
    model.pool.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(image(4, 16, 16, 16))
    assert seen == [(4, 16, 8, 8)]


def test_what_was_added_is_let_go(monkeypatch):
    """Of blocks one by one, in evaluation, only what is still to be added is held."""
    model = blocks(4).eval().double()
    convert(model)
    inputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    run = Run.__call__

    def record(one, input, *arguments):
        inputs.append(weakref.ref(input))
        alive.append(sum(tensor() is not None for tensor in inputs))
        return run(one, input, *arguments)

    monkeypatch.setattr(Run, "__call__", record)
    with torch.no_grad():
        model(image().double())
    assert len(alive) == 8
    assert max(alive) <= 3, "the model's own input, a block's and a layer's"
