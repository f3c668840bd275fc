"""A native convolution between pending activations against float64, beside torch's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("ganvas._native")

from ganvas.ops.backends.cpu.kernels import NativeConvolution
from ganvas.ops.pending import Pending

KINDS = ("stored", "affine_kink", "kink_affine")


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """What to try; which convolution, a subclass says."""

    images: int = 2  # of a statistics group
    in_channels: int = 16
    out_channels: int = 16
    height: int = 8
    width: int = 8
    groups: int = 1
    pending: str = "affine_kink"
    statistics_of_activation: bool = False  # the order convolution, activation, norm
    has_bias: bool = True
    weight_format: torch.memory_format = torch.contiguous_format
    dtype: torch.dtype = torch.float32
    slope: float = 0.2
    seed: int = 0

    @property
    @abstractmethod
    def native(self) -> NativeConvolution:
        """The convolution."""

    @property
    def input_shape(self) -> torch.Size:
        return torch.Size((self.images * self.groups, self.in_channels, self.height, self.width))

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, int, int, int]:
        """As torch has it."""

    @abstractmethod
    def convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution in torch's words."""

    def terms(self, squares: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Sums of the squares of what is added up for each output: ``squares``, the convolution of those two.

        Or of more, where errors come from more than an output's own terms.
        """
        return squares


class Arguments:
    """Random tensors for a case: a pending input, weight and bias, the gradient of the output."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def pixels(*shape: int) -> Tensor:
            return normal(*shape).to(case.dtype).contiguous(memory_format=torch.channels_last)

        taps = case.weight_shape[2] * case.weight_shape[3]
        self.stored = pixels(*case.input_shape)
        weight = normal(*case.weight_shape) / (taps * case.in_channels) ** 0.5
        self.weight = weight.to(case.dtype).contiguous(memory_format=case.weight_format)
        self.bias = normal(case.out_channels).to(case.dtype) if case.has_bias else None
        self.grad_output = pixels(*case.convolve(self.stored.to("meta"), self.weight.to("meta")).shape)
        pending = case.pending != "stored"
        self.scale, self.shift, self.mean = (
            normal(case.groups, case.in_channels) if pending else None for _ in range(3)
        )

    @property
    def pending(self) -> Pending:
        return Pending(
            self.stored, self.scale, self.shift, self.mean, negative_slope=self.case.slope,
            activation_first=self.case.pending == "kink_affine",
        )  # fmt: skip

    def per_image(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(G, C) to (N, C, 1, 1)."""
        return values.to(dtype).repeat_interleave(self.case.images, 0)[:, :, None, None]

    def by_group(self, values: Tensor) -> Tensor:
        """(N, C, H, W) to (G, C, pixels)."""
        groups, (batch, channels) = self.case.groups, values.shape[:2]
        return values.reshape(groups, batch // groups, channels, -1).transpose(1, 2).flatten(2)

    def normalised(self, output: Tensor) -> Tensor:
        """Whose statistics are taken, by group."""
        return self.by_group(F.leaky_relu(output, self.case.slope) if self.case.statistics_of_activation else output)

    def affine(self, values: Tensor) -> Tensor:
        return self.per_image(self.scale, values.dtype) * values + self.per_image(self.shift, values.dtype)

    def kink(self, values: Tensor) -> Tensor:
        """On the side of exact arithmetic: one pixel on the other side would be an error of another kind."""
        exact = self.stored.double()
        inside = self.affine(exact) if self.case.pending == "affine_kink" else exact
        return torch.where(inside > 0, values, self.case.slope * values)

    def activation(self, dtype: torch.dtype) -> Tensor:
        x = self.stored.to(dtype)
        if self.case.pending == "stored":
            return x
        return self.kink(self.affine(x)) if self.case.pending == "affine_kink" else self.affine(self.kink(x))


def kernels(of: Arguments) -> dict[str, Tensor]:
    """Everything that the native kernels compute."""
    case, pending, native = of.case, of.pending, of.case.native
    after = native.forward_with_statistics(
        pending, of.weight, of.bias, None, None, None, None, 0.0, 1e-5, case.slope,
        case.statistics_of_activation, case.groups,
    )  # fmt: skip
    grad_input, sums = native.backward_input(of.grad_output, of.weight, pending)
    results = {
        "output": native.forward(pending, of.weight, of.bias),
        "output beside statistics": after.stored,
        "mean": after.mean,
        "var": after.var,
        "grad_input": grad_input,
        "grad_weight": native.backward_weight(of.grad_output, of.weight, pending),
    }
    if case.pending != "stored":
        results |= {"sum": sums[0], "sum_deviation": sums[1]}
    return results


def layer_by_layer(of: Arguments, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by torch, every tensor of pixels stored in ``dtype``.

    Not by oneDNN: of some shapes it reads and writes past its memory (its issues 5942 and 6035, and with bfloat16
    gradients of the weight of dilated kernels and of maps of width 1), which may end the process. Torch's other kernels
    round each sum of bfloat16 many times; oneDNN rounds it once, and so does this.
    """
    case = of.case
    wide = torch.promote_types(dtype, torch.float32)  # in which torch's own norms do their sums
    input = of.activation(wide).to(dtype).to(wide).requires_grad_()
    weight = of.weight.to(wide).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        output = case.convolve(input, weight, None if of.bias is None else of.bias.to(wide))
        gradients = torch.autograd.grad(output, (input, weight), of.grad_output.to(wide))
    output, grad_input, grad_weight = (t.detach().to(dtype) for t in (output, *gradients))
    if case.pending == "affine_kink":
        grad_input = of.kink(grad_input)
    values = of.normalised(output).to(wide)
    results = {
        "output": output,
        "output beside statistics": output,
        "mean": values.mean(2),
        "var": values.var(2, unbiased=False),
        "grad_input": grad_input,
        "grad_weight": grad_weight,
    }
    if case.pending != "stored":
        results["sum"] = of.by_group(grad_input.to(wide)).sum(2)
        results["sum_deviation"] = of.by_group(grad_input.to(wide) * deviation(of, wide)).sum(2)
    return results


def deviation(of: Arguments, dtype: torch.dtype) -> Tensor:
    """Of what the norm before the pending map took its statistics of, from the mean."""
    stored = of.stored.to(dtype)
    return (of.kink(stored) if of.case.pending == "kink_affine" else stored) - of.per_image(of.mean, dtype)


def sizes(of: Arguments, exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the terms of each result add up to when they do not cancel: roots of the sums of their squares."""
    input = of.activation(torch.float64).square().requires_grad_()
    weight = of.weight.double().square().requires_grad_()
    squares = of.case.convolve(input, weight)
    grad_input, grad_weight = (
        g.sqrt() for g in torch.autograd.grad(squares, (input, weight), of.grad_output.double() ** 2)
    )
    squares = of.case.terms(squares.detach(), input.detach(), weight.detach())
    output = squares.sqrt()
    bias = 0 if of.bias is None else of.bias.double().abs()
    level = of.by_group(output).mean(2) + bias
    first = of.normalised(exact["output"])[:, :, :16].mean(2) - exact["mean"]
    found = {
        "output": output,
        "output beside statistics": output,
        # What is summed are distances from one of the values, while of the others many may be 0.
        "mean": of.by_group(squares).mean(2).sqrt() + bias,
        # Where all values are the same, it is of what rounds them apart: a kink may leave nothing but that.
        # Distances are from the first pixels' mean, which may be far from the others where a dilation leaves 0.
        "var": (
            exact["var"]
            + first.square()
            + (2 * exact["var"].sqrt() + 16 * torch.finfo(torch.float32).eps * level) * level
        ),
        "grad_input": grad_input,
        "grad_weight": grad_weight,
    }
    if of.case.pending != "stored":
        found["sum"] = of.by_group(grad_input).sum(2)
        found["sum_deviation"] = of.by_group(grad_input * deviation(of, torch.float64).abs()).sum(2)
    return found


def compare_with_torch(accuracy, case: Case, growth: float, rounding: float, sharing: int = 4) -> None:
    """Every result within the tolerance.

    Args:
        growth: the floor of the tolerance, in float32 roundings of what a result's terms add up to.
        rounding: of the products' factors where pixels are bfloat16, root mean square.
        sharing: how many values share their errors.
    """
    of = Arguments(case)
    ours, torchs, exact = kernels(of), layer_by_layer(of, case.dtype), layer_by_layer(of, torch.float64)
    terms = sizes(of, exact)
    for name, result in ours.items():
        pixels = name.startswith("output") or name == "grad_input"
        assert result.dtype is (case.dtype if pixels else torch.float32), name
        # The root mean square of so few values may by chance be three standard deviations off.
        by_chance = 1 + 3 / (result.numel() / sharing) ** 0.5
        floor = by_chance * growth * torch.finfo(torch.float32).eps * terms[name]
        if result.dtype is torch.bfloat16:  # the one rounding to what is stored
            floor = floor + torch.finfo(torch.bfloat16).eps / 2 * exact[name].abs()
        if case.dtype is torch.bfloat16:
            floor = floor + by_chance * growth * rounding * terms[name]
        factor = 3.0 if name in ("grad_input", "grad_weight", "sum", "sum_deviation") else 2.0
        floor = floor / torch.finfo(result.dtype).eps
        accuracy.check(name, result, exact[name], torchs[name], exact[name], factor, floor)
