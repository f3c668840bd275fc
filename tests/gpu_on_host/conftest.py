"""Tests of tests/gpu on the processor: Triton in its interpreter, CUDA kernels as the host's compiler makes them.

The files here say which tests those are. What needs streams, CUDA graphs or the GPU's memory is left to the GPU.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.overrides import TorchFunctionMode

HERE = Path(__file__).parent
# For the tests of tests/gpu, and for the files beside the tests of operations.
sys.path.extend(str(HERE.parent / folder) for folder in ("gpu", "ops", "ops/triton_kernels"))

from kernels_on_host import FencedMemory, HostNative, compiled, needs_compiler, stand_in  # noqa: E402

LARGE = 200_000
"""Values from which on a tensor takes the processor too long for every day."""


class Library(NamedTuple):
    """CUDA kernels that tests/ops runs on the processor by themselves."""

    kernels: tuple[str, ...]
    test: str  # has the table of their functions
    callers: tuple[str, ...]  # in ganvas.ops.backends.cuda


LIBRARIES = {
    "batch_norm_leaky_relu": Library(
        ("batch_norm_forward", "batch_norm_backward", "statistics"),
        "test_batch_norm_cuda_on_host",
        ("batch_norm_leaky_relu", "pending", "statistics"),
    ),
    "max_pool": Library(("max_pool", "statistics"), "test_max_pool_cuda_on_host", ("max_pool",)),
    "gan_loss": Library(("gan_loss",), "test_gan_loss_cuda_on_host", ("gan_loss",)),
}


def pytest_itemcollected(item: pytest.Item) -> None:
    if not item.path.is_relative_to(HERE):
        return
    for mark in needs_compiler:
        item.add_marker(mark)
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    of_shape = torch.Size(parameters.get("shape", ())).numel()
    of_tiles = parameters.get("tiles", 0) * parameters.get("channels", 0)
    counts = [value for name, value in parameters.items() if name.endswith("count")]
    if max(of_shape, of_tiles, *counts) > LARGE:
        item.add_marker(pytest.mark.exhaustive)


class MadeHere(TorchFunctionMode):
    """What is to be made on a GPU is made in the processor's memory."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        if options.get("device") == "cuda":
            options["device"] = "cpu"
        return function(*arguments, **options)


@pytest.fixture(scope="session")
def natives(tmp_path_factory) -> dict[str, HostNative]:
    """By library."""
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, it runs tests/gpu")
    cuda = import_module("ganvas.ops.backends.cuda")
    if cuda.MISSING:
        pytest.skip(cuda.MISSING)
    natives = {
        name: HostNative(
            compiled(tmp_path_factory.mktemp("cuda_on_host"), name, *library.kernels),
            import_module(library.test).FUNCTIONS,
        )
        for name, library in LIBRARIES.items()
    }
    natives["gan_loss"].GAN_LOSS_WORKSPACE_BYTES = natives["gan_loss"].library.workspace_bytes()
    return natives


@pytest.fixture(autouse=True)
def imagined_gpu(natives, monkeypatch):
    """Every tensor says that it lies on a GPU. What kernels fill ends where memory does."""
    memory = FencedMemory()
    for name, library in LIBRARIES.items():
        for caller in library.callers:
            stand_in(monkeypatch, import_module(f"ganvas.ops.backends.cuda.{caller}"), natives[name], memory)
    monkeypatch.setattr("ganvas.ops.backends.cuda._device_refusal", lambda index: None)
    monkeypatch.setitem(import_module("ganvas.ops.selection")._CAN_RUN, "cpu", lambda op, tensor: "not on a GPU")
    monkeypatch.delenv("GANVAS_BACKEND", raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    with MadeHere():
        yield
    memory.check()
