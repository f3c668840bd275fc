"""Chains on a GPU: as accurate as torch, the same bits each time, on any stream, in CUDA graphs, in half the memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chains import Chain, compare_with_torch, layer, plain, with_grad
from torch import Tensor, nn

from ganvas.nn import FusedSequential
from ganvas.ops import conv_bn_leaky_relu, tuning
from ganvas.ops.backends import gpu, triton
from ganvas.ops.backends.gpu.convolution import TritonConvolution
from ganvas.ops.chain import can_chain, conv_bn_leaky_relu_chain
from ganvas.ops.convolution import Geometry
from ganvas.ops.layers import Layer

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch):
    reason = triton.can_run("conv_bn_leaky_relu", torch.empty(1, device="cuda"))
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # what torch's error is measured by


def on_gpu(chain: Chain) -> Chain:
    def moved(one: Layer) -> Layer:
        tensors = {name: getattr(one, name) for name in Layer.__slots__ if isinstance(getattr(one, name), Tensor)}
        return replace(one, **{name: tensor.cuda() for name, tensor in tensors.items()})

    residual = None if chain.residual is None else chain.residual.cuda()
    return Chain(chain.input.cuda(), tuple(moved(one) for one in chain.layers), chain.groups, residual)


def made(name: str, dtype: torch.dtype, groups: int = 1) -> Chain:
    torch.manual_seed(0)
    options = {"dtype": dtype}
    layers = {
        "both orders": lambda: [layer(16, 48, **options), layer(48, 33, activation_first=True, bias=True, **options)],
        "activation first": lambda: [
            layer(16, 24, activation_first=True, **options),
            layer(24, 40, "1x1", activation_first=True, **options),
            layer(40, 16, slope=0.0, **options),
        ],
        "a DCGAN's": lambda: [
            layer(100, 64, "4x4 stride 2 transposed", **options),
            layer(64, 32, "4x4 stride 2 transposed", **options),
            layer(32, 3, "4x4 stride 2", None, bias=True, **options),
        ],
        "upsampled, 5x5, 1x1": lambda: [
            layer(24, 32, "upsampled", **options),
            layer(32, 16, "5x5", slope=0.0, **options),
            layer(16, 40, "1x1", **options),
        ],
        "from three channels": lambda: [layer(3, 64, **options), layer(64, 64, "stride 2", **options)],
        "torch's convolution between": lambda: [
            layer(16, 16, **options),
            layer(16, 16, "grouped", **options),
            layer(16, 16, "dilated", **options),
        ],
        "fixed statistics, no norm": lambda: [layer(16, 16, norm=False, **options), layer(16, 8, norm=None, **options)],
    }[name]()
    channels = layers[0].geometry.in_channels(layers[0].weight.shape)
    return on_gpu(Chain(torch.randn(4 * groups, channels, 19, 14).to(dtype), tuple(layers), groups))


NAMES = [
    "both orders", "activation first", "a DCGAN's", "upsampled, 5x5, 1x1", "from three channels",
    "torch's convolution between", "fixed statistics, no norm",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_as_accurate_as_torchs(accuracy, name, groups, dtype):
    compare_with_torch(accuracy, made(name, dtype, groups))


@pytest.fixture
def chosen(monkeypatch, request) -> tuple[bool, bool]:
    """Whether raw gradients stay pending, and activations are written first, in every layer that can."""
    pending, activates = request.param
    choose = gpu.chosen_convolution

    def convolution(*arguments) -> TritonConvolution | None:
        native = choose(*arguments)
        return native and replace(native, activates=activates)

    monkeypatch.setattr(gpu, "chosen_convolution", convolution)
    monkeypatch.setattr(gpu, "stays_pending", lambda *_: pending)
    return request.param


CHOICES = {
    "settled": (False, False), "pending, activated": (True, True), "settled, activated": (False, True),
    "pending": (True, False),
}  # fmt: skip


@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", NAMES[:5])
def test_every_choice_is_as_accurate_as_torch(accuracy, chosen, name, groups, dtype):
    compare_with_torch(accuracy, made(name, dtype, groups))


def test_pooled(accuracy):
    torch.manual_seed(1)
    layers = (layer(16, 32, max_pool=True), layer(32, 16, activation_first=True, max_pool=True))
    compare_with_torch(accuracy, on_gpu(Chain(torch.randn(4, 16, 18, 23), layers, 2)))


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_a_residual_block(accuracy, slope):
    torch.manual_seed(2)
    layers = (layer(32, 32), replace(layer(32, 32), negative_slope=slope))
    chain = Chain(torch.randn(6, 32, 15, 17), layers, 2, torch.randn(6, 32, 15, 17))
    compare_with_torch(accuracy, on_gpu(chain))


def test_measured_choices_are_as_accurate_and_remembered(accuracy, monkeypatch, tmp_path):
    monkeypatch.setenv("GANVAS_AUTOTUNE", "1")
    monkeypatch.setenv("GANVAS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_remembered", {})
    monkeypatch.setattr(tuning, "decisions", {})
    chain = made("both orders", torch.bfloat16)
    if not can_chain(chain.input, chain.layers):
        pytest.skip("cuDNN is faster in every direction here")
    compare_with_torch(accuracy, chain)
    entries = tuning.entries()
    assert {entry.case.direction for entry in entries} >= {"forward_with_statistics", "backward_weight"}
    assert all(entry.native_ms is not None for entry in entries)  # no configuration was wrong


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "directions", [("backward_weight", "backward_input"), ("backward_weight",), ("backward_input",)]
)
def test_a_pending_gradient_is_right_and_its_choice_is_remembered(
    monkeypatch, caplog, tmp_path, directions, size, dtype
):
    monkeypatch.setenv("GANVAS_AUTOTUNE", "1")
    monkeypatch.setenv("GANVAS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_remembered", {})
    monkeypatch.setattr(tuning, "decisions", {})
    geometry, weight = Geometry(padding=(size // 2,) * 2), torch.empty(64, 48, size, size, device="cuda", dtype=dtype)
    readers = dict.fromkeys(directions, TritonConvolution(geometry))
    chosen = gpu.stays_pending(geometry, weight, torch.Size((32, 48, 16, 16)), dtype, readers)
    (entry,) = tuning.entries()
    assert entry.case.direction == ("settle_backward" if len(directions) == 2 else f"settle_{directions[0]}")
    assert entry.configuration == ("pending" if chosen else "settled")
    assert caplog.text == ""  # no way was left out


def step(chain: Chain) -> list[Tensor]:
    input, layers = chain.input.detach().requires_grad_(), with_grad(chain.layers)
    leaves = [input, *(tensor for one in layers for tensor in one.tensors if tensor is not None)]
    output = conv_bn_leaky_relu_chain(input, layers, chain.groups)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.mark.parametrize("chosen", list(CHOICES.values())[:2], ids=list(CHOICES)[:2], indirect=True)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_each_time_and_on_another_stream(chosen, name):
    chain = made(name, torch.bfloat16)
    first, second = step(chain), step(chain)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        third = step(chain)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b, c in zip(first, second, third):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("chosen", list(CHOICES.values())[:2], ids=list(CHOICES)[:2], indirect=True)
@pytest.mark.parametrize("name", NAMES)
def test_in_a_cuda_graph(chosen, name):
    chain = made(name, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(chain)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(chain)
    chain.input.copy_(torch.randn_like(chain.input))
    graph.replay()
    for ours, eager in zip(captured, step(chain)):
        assert torch.equal(ours, eager)


def test_what_is_kept_for_backward_is_half_of_torchs():
    layers = [layer(64, 64, dtype=torch.bfloat16) for _ in range(4)]
    chain = on_gpu(Chain(torch.randn(64, 64, 32, 32).bfloat16(), tuple(layers)))

    def kept(function) -> int:
        own = with_grad(chain.layers)
        before = torch.cuda.memory_allocated()
        output = function(chain.input, own)
        kept = torch.cuda.memory_allocated() - before
        del output
        return kept

    kept(conv_bn_leaky_relu_chain)  # whatever is made once
    assert kept(conv_bn_leaky_relu_chain) <= 0.55 * kept(plain)


def test_autocast_and_float32_parameters():
    model = FusedSequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.LeakyReLU(0.2)).cuda()
    x = torch.randn(8, 16, 12, 12, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        output = model(x)
    output.float().square().mean().backward()
    assert output.dtype is torch.bfloat16
    assert all(p.grad.dtype is torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_another_device_than_the_weights_is_torchs_own_error():
    with pytest.raises(ValueError, match="weight must be on the input's device"):
        conv_bn_leaky_relu(
            torch.randn(2, 16, 8, 8, device="cuda"), torch.randn(16, 16, 3, 3), *[None] * 5, training=True
        )


def test_slices_that_begin_anywhere():
    chain = made("both orders", torch.bfloat16)
    n, c, h, w = chain.input.shape
    memory = torch.empty(chain.input.numel() + 1, dtype=torch.bfloat16, device="cuda")
    moved = memory[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    moved.copy_(chain.input)
    expected = conv_bn_leaky_relu_chain(chain.input, chain.layers)
    assert torch.equal(conv_bn_leaky_relu_chain(moved, chain.layers), expected)
