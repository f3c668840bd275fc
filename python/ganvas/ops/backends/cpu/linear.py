"""Native float32 matrix products (csrc/cpu/matrix_product.h): what a linear layer needs, forward and backward.

They run where they measure faster than torch's (:mod:`ganvas.ops.tuning`): twice as fast on processors whose BLAS
leaves half of the arithmetic unused, no faster on others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ganvas import _native as native
from ganvas.ops import tuning
from ganvas.ops.backends.arguments import address, float32
from ganvas.ops.backends.cpu.arguments import empty

LEAST_MULTIPLICATIONS = 2**22  # below, a call costs as much as it saves

Direction = Literal["forward", "backward"]


def are_many(rows: int, out_features: int, in_features: int) -> bool:
    """Whether the products are worth a call."""
    return rows * out_features * in_features >= LEAST_MULTIPLICATIONS


def is_faster(rows: int, weight: Tensor, direction: Direction) -> bool:
    """Whether the products of (rows, in) and a weight (out, in) run natively; ``backward``: both gradients."""
    out_features, in_features = weight.shape
    if not are_many(rows, out_features, in_features):
        return False
    key = ("linear", rows, weight.shape, torch.get_num_threads(), direction)
    try:
        return tuning.decisions[key]
    except KeyError:
        return tuning.decided(key, _measure(rows, out_features, in_features, direction))


def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input·weightᵀ + bias, (N, out)."""
    return product(input, weight.t(), bias)


def backward_input(grad_output: Tensor, weight: Tensor) -> Tensor:
    """(N, in)."""
    return product(grad_output, weight)


def backward_weight(grad_output: Tensor, input: Tensor) -> Tensor:
    """(out, in)."""
    return product(grad_output.t(), input)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a·b, (rows, columns), contiguous; a matrix with no stride of 1 is copied."""
    a, b, bias = _with_unit_stride(a), _with_unit_stride(b), float32(bias)
    (rows, depth), columns = a.shape, b.shape[1]
    result = empty(rows, columns)
    native.matrix_product(
        rows, columns, depth, a.data_ptr(), a.stride(), b.data_ptr(), b.stride(), address(bias), result.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return result


def _with_unit_stride(matrix: Tensor) -> Tensor:
    return matrix if 1 in matrix.stride() else matrix.clone(memory_format=torch.contiguous_format)


def _measure(rows: int, out_features: int, in_features: int, direction: Direction) -> bool:
    threads = torch.get_num_threads()
    if not tuning.applies(threads):
        return True
    rows = tuning.power_of_two(rows)  # so that the last batch of an epoch need not be measured too
    case = tuning.Case(direction, "linear", "float32", "cpu", threads, rows, in_features, out_features, 1, 1)
    return tuning.measured(case, lambda: _candidates(rows, out_features, in_features, direction)).native


def _candidates(
    rows: int, out_features: int, in_features: int, direction: Direction
) -> tuple[dict[str, Callable[[], object]], Callable[[], object]]:
    generator = torch.Generator("cpu").manual_seed(0)  # the default one belongs to the user
    shapes = ((rows, in_features), (out_features, in_features), (rows, out_features))
    x, w, g = (empty(*shape).uniform_(-1, 1, generator=generator) for shape in shapes)
    if direction == "forward":
        return {"product": lambda: forward(x, w, None)}, lambda: torch.nn.functional.linear(x, w)
    return {"product": lambda: (backward_input(g, w), backward_weight(g, x))}, lambda: (g @ w, g.t() @ x)
