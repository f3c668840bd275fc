"""Networks written with attributes, functions and residual adds convert whole and compute what they did."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from networks import (
    BasicBlock,
    Bottleneck,
    Generator,
    MobileNet,
    PreActivationNet,
    ResNet,
    TimmResNet,
)
from torch import nn

from cifar_resnet import CifarResNet
from ganvas.nn import convert, revert

# the network, its input's shape, and how its runs end: (number of runs, of them with a residual)
NETWORKS = {
    "torchvision, basic": (lambda: ResNet(BasicBlock, (2, 2)), (6, 3, 32, 32), 10, 4),
    "torchvision, bottleneck": (lambda: ResNet(Bottleneck, (1, 2)), (6, 3, 32, 32), 12, 3),
    "cifar": (lambda: CifarResNet(blocks=2, width=8), (6, 3, 16, 16), 15, 6),
    "timm": (lambda: TimmResNet(drop_rate=0.3), (6, 3, 32, 32), 9, 3),
    "mobilenet": (MobileNet, (6, 3, 8, 8), 7, 2),
    "pre-activation": (PreActivationNet, (6, 3, 8, 8), 5, 0),
    "generator": (Generator, (6, 6), 3, 0),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    make, shape, runs, residuals = NETWORKS[request.param]
    return make(), shape, runs, residuals


def test_every_norm_is_part_of_a_run_and_nothing_is_skipped(network):
    model, _, runs, residuals = network
    report = convert(model)
    assert report.skipped == ()
    assert len(report.fused) == runs
    assert sum("add" in run.types for run in report.fused) == residuals
    norms = {name for name, module in model.named_modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))}
    in_runs = [name for run in report.fused for name in run.names]
    assert norms <= set(in_runs)
    assert {run.container for run in report.fused} == {""}, "the outermost forward executes all of it"


def test_it_proves_itself(network):
    model, shape, *_ = network
    proof = convert(model, torch.randn(shape)).proof
    assert proof is not None
    assert {one.mode for one in proof.comparisons} == {"training", "evaluation"}


@pytest.mark.parametrize("training", [True, False])
def test_float64_is_plain_torch_bit_for_bit(step, network, training):
    model, shape, *_ = network
    model = model.double().train(training)
    plain = copy.deepcopy(model)
    convert(model)
    x = torch.randn(shape, dtype=torch.float64)
    for _ in range(2):
        results = []
        for one in (model, plain):
            torch.manual_seed(0)  # dropout
            results.append(step(one, x).tensors())
        got, expected = results
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_is_as_accurate_as_torchs(step, assert_as_accurate, dtype):
    model = CifarResNet(1, 8).to(dtype)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    convert(model)
    x = torch.randn(8, 3, 16, 16).to(dtype)
    # Without kinks: a value next to one falls on different sides of it in any two libraries.
    for one in (model, plain, exact):
        for module in one.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, 6.0)
    assert_as_accurate(step(model, x), step(plain, x), step(exact, x.double()))


def test_class_keys_parameters_and_modules_stay(network):
    model, *_ = network
    modules, classes = list(model.modules()), [type(module) for module in model.modules()]
    parameters, keys = list(model.parameters()), list(model.state_dict())
    representation = repr(model)
    convert(model)
    assert all(a is b for a, b in zip(model.modules(), modules))
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    assert list(model.state_dict()) == keys
    own = [(type(module), cls) for module, cls in zip(model.modules(), classes) if cls is not nn.Sequential]
    assert all(now is before for now, before in own)
    revert(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert repr(model) == representation


def test_what_a_layer_is_made_of_stands_in_the_report():
    text = str(convert(ResNet(BasicBlock, (2, 2))))
    assert re.search(r"layer1.0.conv2, layer1.0.bn2, layer1.0.relu +Conv2d \+ BatchNorm2d \+ add \+ ReLU\n", text)
    assert re.search(r"layer2.0.downsample.0, layer2.0.downsample.1 +Conv2d \+ BatchNorm2d\n", text)
    text = str(convert(CifarResNet(1, 8)))
    assert re.search(r"layer1.0.conv2, layer1.0.bn2 +Conv2d \+ BatchNorm2d \+ add \+ relu\n", text)


def test_a_part_of_the_network_is_converted_too():
    """What is taken out of a converted model, a backbone or one layer, runs fused by itself."""
    model = ResNet(BasicBlock, (2, 2))
    convert(model)
    layer, plain = model.layer2, copy.deepcopy(revert(copy.deepcopy(model)).layer2)
    report = convert(layer)
    assert report.converted == ()
    assert len(report.fused) == 5
    x = torch.randn(4, 8, 8, 8)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)


class _Gated(nn.Module):
    """A network whose outer forward looks at the data."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.block1 = BasicBlock(4, 4)
        self.block2 = BasicBlock(4, 4)

    def forward(self, x):
        x = self.block1(torch.relu(self.bn(self.conv(x))))
        if x.mean() > 0:
            x = self.block2(x)
        return x


def test_a_forward_with_control_flow_on_data_is_left_and_its_blocks_are_converted():
    model = _Gated()
    report = convert(model, torch.randn(4, 3, 8, 8))
    assert report.converted == ("block1", "block2")
    assert [run.container for run in report.fused] == ["block1", "block1", "block2", "block2"]
    reasons = {layer.name: layer.reason for layer in report.skipped}
    assert reasons[""].startswith("it cannot be traced: symbolically traced variables cannot be used as inputs to")
    assert reasons["bn"] == "its parent's forward is its own (_Gated)"


def test_a_block_that_cannot_be_traced_is_called_by_what_surrounds_it():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = ResNetStem()
            self.gated = _Gated()
            self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x):
            return self.head(self.gated(self.stem(x)))

    class ResNetStem(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            return F_leaky_relu(self.bn(self.conv(x)), 0.3)

    F_leaky_relu = nn.functional.leaky_relu
    model = Outer()
    report = convert(model, torch.randn(4, 3, 10, 10))
    assert report.converted == ("", "stem", "gated.block1", "gated.block2", "head")
    assert [(run.container, run.names[0]) for run in report.fused] == [
        ("", "stem.conv"),
        ("", "head.0"),
        ("gated.block1", "gated.block1.conv1"),
        ("gated.block1", "gated.block1.conv2"),
        ("gated.block2", "gated.block2.conv1"),
        ("gated.block2", "gated.block2.conv2"),
    ]
    assert {layer.name for layer in report.skipped} == {"gated", "gated.bn"}


def test_converting_a_part_first_and_then_the_whole():
    model, at_once = CifarResNet(1, 8), CifarResNet(1, 8)
    convert(model.layer1[0])
    convert(model)
    report = convert(at_once)
    assert convert(model).fused == report.fused
    assert (convert(model).converted, convert(model).skipped) == ((), ())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("training", [True, False])
def test_a_copy_that_is_compiled_before_its_first_call_runs_the_same_operators(clone, training, monkeypatch):
    model = CifarResNet(blocks=2, width=16)
    convert(model)
    copied = clone(model).train(training)
    input = torch.randn(6, 3, 16, 16)
    chains = []
    native = pytest.importorskip("ganvas.ops.backends.cpu.chain").NativeChain
    original = native.forward
    monkeypatch.setattr(native, "forward", lambda chain, *a: chains.append(chain) or original(chain, *a))
    torch._dynamo.reset()
    output = torch.compile(copied, backend="aot_eager", fullgraph=True)(input)
    of_copy = len(chains)
    expected = torch.compile(model.train(training), backend="aot_eager", fullgraph=True)(input)
    assert len(chains) == 2 * of_copy > 0
    torch.testing.assert_close(output, expected)
