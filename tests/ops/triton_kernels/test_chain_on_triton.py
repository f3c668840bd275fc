"""Chains whose convolutions are Triton's, in the interpreter, between the processor's own kernels of the norm."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from chains import Chain, compare_with_torch, layer, with_grad
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("ganvas._native")

from ganvas.ops import chain, chain_passes, tuning
from ganvas.ops.backends import cpu
from ganvas.ops.backends.gpu import convolution, measure, raw_gradient
from ganvas.ops.backends.gpu.convolution import TritonConvolution
from ganvas.ops.backends.trial import Way, trial
from ganvas.ops.layers import Layer, Tensors
from ganvas.ops.pending import Pending, with_statistics

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")


def finish_statistics(
    output: Tensor, counts: Tensor, means: Tensor, deviations: Tensor, bn_weight, bn_bias, running_mean, running_var,
    momentum: float, eps: float, negative_slope: float, activation_first: bool,
) -> Pending:  # fmt: skip
    """What :func:`ganvas.ops.backends.cuda.pending.finish_statistics` does, in float64."""
    counts, means, deviations = (tensor.double() for tensor in (counts.unsqueeze(2), means, deviations))
    count = counts.sum(1)
    used = torch.where(counts > 0, means, torch.zeros_like(means))
    mean = (counts * used).sum(1) / count
    var = (deviations + counts * (used - mean.unsqueeze(1)).square()).sum(1) / count
    if running_mean is not None:
        for of_group, of_group_var in zip(mean, var * count / (count - 1)):
            running_mean.lerp_(of_group.float(), momentum)
            running_var.lerp_(of_group_var.float(), momentum)
    return with_statistics(
        output, bn_weight, bn_bias, mean.float(), var.float(), eps, negative_slope, activation_first, True
    )


@dataclass
class Choice:
    """How a chain's Triton kernels are to run, and what came of it."""

    pending: bool = True
    """A raw gradient stays so where it can."""
    activates: bool = False
    used: set[str] = field(default_factory=set)  # directions in which a Triton kernel ran
    raw_gradients: list[bool] = field(default_factory=list)  # pending, of each layer whose convolutions can read that
    asked_for: set[tuple[str, str | None]] = field(default_factory=set)  # direction, backend

    def convolution(self, geometry, weight, shape, dtype, direction, backend=None) -> TritonConvolution | None:
        self.asked_for.add((direction, backend))
        native = convolution.native_convolution(geometry, weight, shape, dtype)
        if native is None:
            return None
        self.used.add(direction)
        return replace(native, activates=self.activates)

    def stays_pending(self, geometry, weight, input_shape, dtype, readers, backend=None) -> bool:
        assert all(isinstance(reader, TritonConvolution) for reader in readers.values())
        assert set(readers) <= {"backward_input", "backward_weight"}
        self.raw_gradients.append(self.pending)
        return self.pending


@pytest.fixture
def kernels(monkeypatch) -> SimpleNamespace:
    """The chain's kernels are a GPU's, but those of the norm."""
    kernels = SimpleNamespace(**{name: getattr(cpu, name) for name in cpu.__all__})
    kernels.chosen_convolution, kernels.stays_pending = convolution.chosen_convolution, raw_gradient.stays_pending
    kernels.pending_gradient = raw_gradient.pending_gradient
    kernels.batch_normalised = lambda *arguments: (cpu.batch_normalised(*arguments)[0], None)
    for module in (chain, chain_passes):
        monkeypatch.setattr(module, "kernels_of", lambda tensor: kernels)
    monkeypatch.setattr(convolution, "finish_statistics", finish_statistics)
    monkeypatch.setattr(convolution, "activate", cpu.activate)
    return kernels


@pytest.fixture
def choice(kernels) -> Choice:
    """... taken as this says."""
    choice = Choice()
    kernels.chosen_convolution, kernels.stays_pending = choice.convolution, choice.stays_pending
    return choice


CHAINS = {
    "DCGAN's": lambda: [
        layer(6, 9, "4x4 stride 2 transposed"),
        layer(9, 5, "4x4 stride 2", bias=True),
        layer(5, 4, "1x1", None, slope=0.0),
    ],
    "upsampled, pooled": lambda: [layer(5, 8, "upsampled", max_pool=True), layer(8, 6, "5x5", max_pool=True)],
    "fixed statistics": lambda: [layer(3, 8, norm=False), layer(8, 8, "stride 2", False, activation_first=True)],
    "torch's convolution between": lambda: [layer(5, 8), layer(8, 8, "grouped"), layer(8, 5, "dilated", bias=True)],
    "torch's convolution pooled": lambda: [layer(5, 8), layer(8, 8, "grouped", max_pool=True), layer(8, 5)],
    "no norm": lambda: [layer(5, 8, norm=None, bias=True), layer(8, 5, norm=None, slope=0.0), layer(5, 6)],
}


@pytest.mark.parametrize("groups", [2, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", CHAINS)
def test_a_step_is_as_accurate_as_torchs(choice, accuracy, name, groups):
    torch.manual_seed(3)
    layers = CHAINS[name]()
    channels = layers[0].geometry.in_channels(layers[0].weight.shape)
    compare_with_torch(accuracy, Chain(torch.randn(2 * groups, channels, 5, 4), tuple(layers), groups))
    assert {"backward_input", "backward_weight"} < choice.used


BOTH_ORDERS = {
    "conv_bn_act": lambda dtype: [
        layer(5, 6, dtype=dtype), layer(6, 17, "1x1", dtype=dtype), layer(17, 4, "4x4 stride 2", dtype=dtype),
    ],
    "conv_act_bn": lambda dtype: [
        layer(5, 6, activation_first=True, dtype=dtype), layer(6, 9, "1x1", activation_first=True, dtype=dtype),
        layer(9, 4, activation_first=True, slope=0.0, dtype=dtype),
    ],
}  # fmt: skip


EVERY_CHOICE = [
    pytest.param(
        dtype, groups, pending, activates,
        marks=[] if pending != activates and dtype is torch.float32 and groups == 2 else pytest.mark.exhaustive,
    )
    for dtype in (torch.float32, torch.bfloat16) for groups in (1, 2) for pending in (False, True)
    for activates in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "groups", "pending", "activates"), EVERY_CHOICE)
@pytest.mark.parametrize("order", BOTH_ORDERS)
def test_every_choice_is_as_accurate_as_torch(choice, accuracy, order, dtype, groups, pending, activates):
    torch.manual_seed(6)
    choice.pending, choice.activates = pending, activates
    layers = tuple(BOTH_ORDERS[order](dtype))
    compare_with_torch(accuracy, Chain(torch.randn(2 * groups, 5, 4, 5).to(dtype), layers, groups))
    assert choice.raw_gradients == [pending] * 2  # the last one comes from the activation's


def step(layers: list[Layer], wanted: tuple[str, ...]) -> list[Tensor]:
    """Gradients of the input and of the first layer's tensors, those that are ``wanted``, and of the layers after."""
    torch.manual_seed(7)
    input = torch.randn(2, 5, 5, 4, requires_grad="input" in wanted)
    first, *others = with_grad(layers)
    for name, tensor in zip(Tensors._fields, first.tensors):
        if tensor is not None:
            tensor.requires_grad_(name in wanted)
    tensors = (input, *first.tensors, *(tensor for one in others for tensor in one.tensors))
    leaves = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    return list(torch.autograd.grad(chain.conv_bn_leaky_relu_chain(input, (first, *others)).square().sum(), leaves))


@pytest.mark.parametrize(
    ("first", "wanted", "raw_gradients"),
    [
        ({"activation_first": True, "bias": True}, ("weight", "bias"), []),  # the bias' is a sum of it
        ({"activation_first": True, "bias": True}, ("weight",), [True]),
        ({"bias": True}, ("input", "weight", "bias"), [True]),  # which is 0 in front of a norm
        ({"norm": False}, ("input", "weight"), []),  # fixed statistics
        ({"norm": None}, ("input", "weight"), []),
        ({"convolution": "1x1", "max_pool": True}, ("input", "weight"), []),
        ({}, ("input", "bn_weight", "bn_bias"), [True]),
        ({}, ("bn_weight", "bn_bias"), []),  # nobody reads it
    ],
)
def test_where_a_gradient_stays_pending(choice, first, wanted, raw_gradients):
    torch.manual_seed(8)
    layers = [layer(5, 6, **first), layer(6, 4)]
    pending = step(layers, wanted)
    assert choice.raw_gradients == raw_gradients
    choice.pending = False
    for ours, settled in zip(pending, step(layers, wanted), strict=True):
        torch.testing.assert_close(ours, settled)


def test_what_torchs_convolution_reads_is_settled(choice):
    step([layer(5, 8), layer(8, 8, "grouped"), layer(8, 4)], ("input", "weight"))
    assert choice.raw_gradients == []


def test_measured_choices_are_as_accurate_and_remembered(kernels, accuracy, monkeypatch, caplog, tmp_path):
    """Each configuration and each way is run and compared with torch's; the times are imagined."""
    monkeypatch.setenv("GANVAS_AUTOTUNE", "1")
    monkeypatch.setenv("GANVAS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "decisions", {})
    monkeypatch.setattr(tuning, "_remembered", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(convolution, "device_name", lambda index: "imagined")
    monkeypatch.setattr(raw_gradient, "settle", cpu.settle)
    for module in (convolution, raw_gradient):
        monkeypatch.setattr(module, "trial", lambda _, *shape: trial(kernels, *shape))

    def time_in_turns(ways: dict[str, Way]) -> dict[str, float]:
        favourites = ("pending", "on the written activation")
        return {name: 1.0 if name.startswith(favourites) else 2.0 if name else 3.0 for name in ways}

    monkeypatch.setattr(measure, "_time_in_turns", time_in_turns)
    torch.manual_seed(9)
    layers = (layer(4, 5), layer(5, 6, "4x4 stride 2"), layer(6, 3, "1x1"))
    compare_with_torch(accuracy, Chain(torch.randn(2, 4, 4, 5), layers))
    assert caplog.text == ""  # nothing was left out
    chosen = {
        (entry.case.direction, entry.case.convolution): entry.configuration.split(",")[0] for entry in tuning.entries()
    }
    assert {way for way in chosen if way[0].startswith("settle")} == {
        ("settle_backward", "conv3x3_padding1"), ("settle_backward", "conv4x4_stride2_padding1"),
    }  # fmt: skip
    for (direction, name), configuration in chosen.items():
        if direction == "settle_backward":
            assert configuration == "pending"
        else:
            several = direction != "backward_input" and name != "conv1x1"
            assert (configuration == "on the written activation") is several


def test_a_backend_that_is_asked_for_is_so_in_every_direction(choice):
    step([layer(5, 8), replace(layer(8, 4), backend="triton")], ("input",))
    directions = ("forward_with_statistics", "backward_input", "backward_weight")
    assert choice.asked_for == {(direction, backend) for direction in directions for backend in (None, "triton")} - {
        ("backward_weight", None)
    }


def test_a_residual_behind_torchs_convolution(choice, accuracy):
    torch.manual_seed(4)
    layers = (layer(6, 8), replace(layer(8, 8, "grouped"), negative_slope=0.2))
    chain = Chain(torch.randn(4, 6, 4, 5), layers, 2)
    shape = layers[1].output_shape(layers[0].output_shape(chain.input.shape))
    compare_with_torch(accuracy, replace(chain, residual=torch.randn(shape)))


def test_a_residual_block(choice, accuracy):
    torch.manual_seed(4)
    layers = (layer(6, 8), replace(layer(8, 6), negative_slope=0.0))
    compare_with_torch(accuracy, Chain(torch.randn(4, 6, 4, 5), layers, 2, torch.randn(4, 6, 4, 5)))


def test_in_bfloat16(choice, accuracy):
    torch.manual_seed(5)
    layers = (layer(16, 24, dtype=torch.bfloat16), layer(24, 16, "4x4 stride 2", dtype=torch.bfloat16))
    compare_with_torch(accuracy, Chain(torch.randn(4, 16, 8, 7).bfloat16(), layers))
