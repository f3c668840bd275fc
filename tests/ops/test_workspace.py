"""The pool of scratch memory behind the convolutions."""

from __future__ import annotations

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from chains import layer, with_grad
from torch import Tensor

pytest.importorskip("ganvas._native")

from ganvas import _native as native
from ganvas.ops.backends.cpu import arguments, winograd
from ganvas.ops.chain import conv_bn_leaky_relu_chain
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending

PADDED = Geometry(padding=(1, 1))


def convolve(seed: int, channels: int = 16, size: int = 8) -> list[Tensor]:
    """A forward pass and both backward passes on numbers of their own."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (
        torch.randn(2, channels, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight = torch.randn(channels, channels, 3, 3, generator=generator)
    convolution, pending = winograd.convolution(PADDED, weight.shape, x.shape, x.dtype), Pending(x)
    output = convolution.forward(pending, weight, None)
    grad_input, _ = convolution.backward_input(grad, weight, pending)
    return [output, grad_input, convolution.backward_weight(grad, weight, pending)]


@pytest.fixture(autouse=True)
def _empty_pool():
    native.release_workspace()
    yield
    native.release_workspace()


def test_memory_is_kept_for_the_next_call_and_given_back_on_request():
    assert native.workspace_bytes_held() == 0
    convolve(0)
    held = native.workspace_bytes_held()
    assert held > 0
    convolve(1)
    assert native.workspace_bytes_held() == held, "the same shapes use the same memory"
    native.release_workspace()
    assert native.workspace_bytes_held() == 0


def test_what_an_earlier_call_left_in_the_memory_does_not_matter():
    expected = convolve(0)
    convolve(1, channels=48, size=13)
    bad = torch.full((2, 48, 13, 13), float("nan")).contiguous(memory_format=torch.channels_last)
    weight = torch.full((48, 48, 3, 3), float("inf"))
    winograd.convolution(PADDED, weight.shape, bad.shape, bad.dtype).forward(Pending(bad), weight, None)
    for again, before in zip(convolve(0), expected):
        assert torch.equal(again, before)


def test_memory_does_not_grow_with_the_number_of_calls():
    shapes = [(channels, size) for channels in (16, 40, 100, 160) for size in (3, 11, 24)]
    for channels, size in shapes:
        convolve(0, channels, size)
    held = native.workspace_bytes_held()
    for channels, size in [*shapes, *reversed(shapes)]:
        convolve(1, channels, size)
    assert native.workspace_bytes_held() == held <= 64 << 20


def test_several_threads_at_once_compute_the_same_bits():
    shapes = [(16, 8), (24, 9), (32, 5), (17, 12)]
    expected = [convolve(seed, *shapes[seed % 4]) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for before, again in zip(expected, pool.map(lambda seed: convolve(seed, *shapes[seed % 4]), range(8))):
                assert all(map(torch.equal, again, before))


def test_memory_may_be_given_back_while_others_use_theirs():
    expected = convolve(0)
    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(convolve, 0) for _ in range(60)]
        for _ in range(60):
            native.release_workspace()
        assert all(all(map(torch.equal, result.result(), expected)) for result in results)


def test_large_maps_come_from_the_same_memory_each_time(monkeypatch):
    layers = with_grad([layer(16, 40), layer(40, 24, max_pool=True), layer(24, 16)])
    x = torch.randn(2, 16, 90, 90).contiguous(memory_format=torch.channels_last)

    def step() -> tuple[Tensor, list[Tensor]]:
        output = conv_bn_leaky_relu_chain(x, layers)
        return output.detach(), list(torch.autograd.grad(output.square().sum(), [one.weight for one in layers]))

    output, gradients = step()
    held = native.workspace_bytes_held()
    monkeypatch.setattr(arguments, "_UNMAPPED_BYTES", 1 << 20)
    for _ in range(2):
        again, others = step()
        assert native.workspace_bytes_held() - held >= 2 * (40 + 24) * 90 * 90 * 4
        assert all(map(torch.equal, (again, *others), (output, *gradients)))
    kept = native.workspace_bytes_held()
    step()
    assert native.workspace_bytes_held() == kept


def test_large_maps_behave_as_tensors_do(tmp_path):
    pixels = arguments.empty_pixels((2, 64, 260, 256), torch.float32).fill_(2.0)
    assert pixels.data_ptr() % 64 == 0
    assert torch.equal(copy.deepcopy(pixels), pixels)
    torch.save(pixels[0], tmp_path / "pixels")
    assert torch.equal(torch.load(tmp_path / "pixels"), pixels[0])
    with ThreadPoolExecutor(1) as other:
        shared = other.submit(lambda: pixels.detach().clone()[0].share_memory_()).result()
    pixels.share_memory_().add_(1)
    assert pixels.is_shared()
    assert torch.equal(pixels[1], shared + 1)
    assert native.workspace_bytes_held() > 0, "what was shared lies elsewhere now"


def test_a_large_output_may_be_written_to_in_place():
    layers = with_grad([layer(16, 64), layer(64, 64, norm=None)])
    x = torch.randn(2, 16, 260, 256).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = conv_bn_leaky_relu_chain(x, layers)
    assert output.numel() * 4 >= arguments._UNMAPPED_BYTES
    (expected,) = torch.autograd.grad(output.sum(), x)
    output = conv_bn_leaky_relu_chain(x, layers)
    output.mul_(2)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient, 2 * expected)


def test_a_process_may_end_with_large_maps_and_their_graph_alive():
    script = """
import torch, ganvas
from torch import nn
net = ganvas.nn.FusedSequential(nn.Conv2d(16, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
x = torch.randn(4, 16, 200, 200).contiguous(memory_format=torch.channels_last).requires_grad_()
output = net(x)
loss = output.square().mean()
torch.autograd.grad(loss, x, retain_graph=True)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_tensors_memory_lives_as_long_as_the_tensor():
    pixels = arguments.empty_pixels((2, 64, 260, 256), torch.float32)
    assert pixels.shape == (2, 64, 260, 256)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    view = pixels.fill_(3.0)[1, 5:7]
    del pixels
    assert native.workspace_bytes_held() == 0
    native.release_workspace()
    arguments.empty_pixels((2, 64, 260, 256), torch.float32).fill_(4.0)
    assert (view == 3).all()
    del view
    assert native.workspace_bytes_held() >= 2 * 2 * 64 * 260 * 256 * 4


def test_memory_of_tensors_past_the_limit_drives_out_nothing():
    convolve(0)
    held = native.workspace_bytes_held()
    large = [native.Memory(600 << 20) for _ in range(3)]  # never touched
    large.clear()
    assert native.workspace_bytes_held() == held + (600 << 20)


def test_memory_of_no_byte_is_none():
    with pytest.raises(ValueError, match="memory has at least one byte; got 0"):
        native.Memory(0)
