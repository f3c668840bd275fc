"""The Triton convolutions on a GPU: all configurations as accurate as torch, on any stream, in CUDA graphs."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "ops" / "triton_kernels"))  # for its files that are no tests

from convolution_cases import LARGER, Arguments, Case, check_against_torch, covering
from gathers import CONVOLUTIONS

from ganvas.ops.backends.triton import convolution, gather_convolution
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending

pytestmark = pytest.mark.gpu
WHOLE_BLOCKS = Case("3x3", torch.bfloat16, 64, 128, 8, 2, (32, 32), "affine_kink", "affine_kink")
CASES = [
    *LARGER,
    *(replace(WHOLE_BLOCKS, convolution=name) for name in CONVOLUTIONS),
    replace(WHOLE_BLOCKS, dtype=torch.float16, in_channels=128, out_channels=64, input_kind="kink_affine"),
    replace(WHOLE_BLOCKS, dtype=torch.float16, in_channels=32, out_channels=16, gradient_kind="kink_affine"),
    replace(WHOLE_BLOCKS, dtype=torch.float32),
    replace(WHOLE_BLOCKS, dtype=torch.float32, in_channels=16, out_channels=48),
    replace(WHOLE_BLOCKS, in_channels=3, input_kind="stored", gradient_kind="stored", groups=1),
    replace(WHOLE_BLOCKS, channels_last_weight=True, size=(33, 31)),
    *(
        replace(WHOLE_BLOCKS, dtype=dtype, in_channels=n, out_channels=m, size=(15, 17))
        for dtype in (torch.bfloat16, torch.float32)
        for n, m in ((24, 40), (100, 36), (34, 130), (33, 64))
    ),
]


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


@pytest.mark.parametrize("case", covering(1), ids=str)
def test_as_accurate_as_torch(accuracy, device, case):
    check_against_torch(accuracy, case, device, None)


@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_configuration_is_as_accurate_as_torch(accuracy, device, monkeypatch, case, tf32):
    if tf32 and case.dtype is not torch.float32:
        pytest.skip("TF32 is for float32")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    for configuration in dict.fromkeys(chain.from_iterable(case.configurations())):
        check_against_torch(accuracy, case, device, configuration)


@pytest.mark.parametrize("channels", [24, 36, 34])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slices_that_are_less_aligned_have_the_same_results(device, dtype, channels):
    def sliced(values: torch.Tensor) -> torch.Tensor:
        memory = values.new_empty(values.numel() + 1)
        return memory[1:].as_strided(values.shape, values.stride(), 1).copy_(values)

    of = Arguments(replace(WHOLE_BLOCKS, dtype=dtype, in_channels=channels, out_channels=48, size=(9, 8)), device)
    names = ("stored", "weight", "scale", "shift", "grad", "grad_stored", "alpha", "beta", "delta")
    others = of.changed(**{name: sliced(getattr(of, name)) for name in names})
    assert all(torch.equal(a, b) for a, b in zip(everything(of), everything(others)))


@pytest.mark.parametrize("images", [8, 512])
def test_offsets_beyond_31_bits_find_the_same_pixels(device, monkeypatch, images):
    of = Arguments(replace(WHOLE_BLOCKS, images=images, size=(5, 4)), device)
    narrow = everything(of)
    monkeypatch.setattr(gather_convolution, "LEAST_WIDE_SPAN", 0)
    assert all(torch.equal(a, b) for a, b in zip(narrow, everything(of)))


def everything(of: Arguments) -> list[torch.Tensor]:
    case = of.case
    return [
        *convolution.forward_with_statistics(case.geometry, of.input, of.weight, of.bias, False, 0.2, case.groups),
        *convolution.backward_input(case.geometry, of.gradient, of.weight, of.input),
    ]


def test_the_same_bits_on_another_stream_and_in_a_graph(device):
    of = Arguments(WHOLE_BLOCKS, device)
    expected = everything(of)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        streamed = everything(of)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(of)
    graph.replay()
    for results in (streamed, captured):
        assert all(torch.equal(a, b) for a, b in zip(results, expected))


def test_more_values_than_32_bits_count():
    images, channels, side = 2050, 16, 256  # 2^31 + 2^21 of them
    free, _ = torch.cuda.mem_get_info()
    if free < 14 * 2**30:
        pytest.skip(f"needs 14 GiB of free GPU memory; {free / 2**30:.0f} GiB are free")
    stored = torch.ones((images, channels, side, side), device="cuda", dtype=torch.bfloat16)
    stored = stored.contiguous(memory_format=torch.channels_last)
    stored[-1, :, -1, -1] = 3.0
    weight = torch.eye(channels, device="cuda")[:, :, None, None].bfloat16()
    output = convolution.forward(Geometry(), Pending(stored), weight, None)
    assert torch.equal(output[-1], stored[-1])
    assert torch.equal(output[0], stored[0])
    assert torch.equal(convolution.backward_input(Geometry(), stored, weight, Pending(stored))[0][-1], stored[-1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_the_tensors_are():
    of = Arguments(WHOLE_BLOCKS, torch.device("cuda:1"))
    with torch.cuda.device(0):
        results = everything(of)
    assert all(result.device.index == 1 for result in results)
    expected = everything(Arguments(WHOLE_BLOCKS, torch.device("cuda:0")))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(results, expected))
