"""The kernels run on the GPU where there is one, otherwise in Triton's interpreter (tests/conftest.py turns it on)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the files beside it that are no tests

from interpreter_repairs import repair

repair()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    """Torch's error is that of float32; a test of TF32 turns it on for itself."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
