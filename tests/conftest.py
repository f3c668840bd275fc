"""How results are trusted: by their distance to a float64 reference, beside the distance of torch's own kernels."""

from __future__ import annotations

import os
from collections.abc import Sequence

if "PYTEST_XDIST_WORKER" in os.environ:  # beside others: threads that wait must sleep, which is said before they start
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.pop("PYTEST_ADDOPTS", None)  # what a test starts runs its own tests one by one

import pytest
import torch
from torch import Tensor

# Results do not depend on what happens to be fast while the tests run; those of the choice turn it on for themselves.
os.environ.setdefault("GANVAS_AUTOTUNE", "0")
# Before anything imports triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


class Accuracy:
    """The tolerance rule: ``factor`` times torch's own error, plus one rounding of the terms that were added."""

    @staticmethod
    def check(
        name: str, ours: Tensor, exact: Tensor, torchs: Tensor, torchs_exact: Tensor, factor: float,
        terms: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Norms of the whole tensor. ``terms``: how large a result's summands are (default: as the result)."""
        assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)} is not {tuple(exact.shape)}"
        error, torchs_error = (ours.double() - exact).norm(), (torchs.double() - torchs_exact).norm()
        floor = torch.finfo(ours.dtype).eps * (exact if terms is None else terms).norm()
        allowed = factor * torchs_error + floor
        assert error <= allowed, f"{name}: error {error:.2e}, torch's {torchs_error:.2e}, one rounding {floor:.2e}"

    def check_running(
        self, before: Sequence[Tensor], ours: Sequence[Tensor], torchs: Sequence[Tensor], exact: Sequence[Tensor],
        groups: int,
    ) -> None:  # fmt: skip
        """Of running mean and variance, moved once for each group.

        Each move is rounded, and a sum that may cancel: of the old value and what is added to it.
        """
        for i, name in enumerate(("running_mean", "running_var")):
            updates = (exact[i].abs() + before[i].abs()) * groups
            self.check(name, ours[i], exact[i], torchs[i], exact[i], 2.0, updates)


@pytest.fixture
def accuracy() -> Accuracy:
    return Accuracy()
