"""Kernels compiled in threads on a GPU are those that run, and none is launched before it is measured."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton

from ganvas.ops.backends.gpu.compilation import compile_ahead
from ganvas.ops.backends.triton import convolution
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hasattr(triton, "AsyncCompileMode"), reason="Triton compiles in threads from 3.5 on"),
]


def test_every_kernel_is_there_when_its_way_is_called(accuracy, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device, geometry = torch.device("cuda", 0), Geometry(padding=(1, 1))
    weight = torch.randn(24, 40, 3, 3, device=device, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    x = torch.randn(8, 40, 16, 16, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    found = convolution.configurations(geometry, weight.shape, x.shape, x.dtype, "forward")
    compiled: list[str] = []

    def way(configuration):
        return lambda: (convolution.forward(geometry, Pending(x), weight, None, configuration=configuration),)

    def note(*, repr, **_):
        compiled.append(repr)

    convolution.gather_convolution.__globals__["_kernel"].device_caches.clear()
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    ways = [way(configuration) for configuration in found]
    compile_ahead(ways, device)
    assert len(compiled) == len(found)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    torchs = torch.nn.functional.conv2d(x, weight, padding=1)
    for one in ways:
        accuracy.check("output", one()[0], exact, torchs, exact, factor=2.0)
    assert len(compiled) == len(found)
