"""Convolutions between pending activations for the Triton kernels' tests: arguments, and what torch makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from gathers import CONVOLUTIONS, weight_shape
from torch import Tensor

from ganvas.ops.backends.triton import convolution, tf32
from ganvas.ops.backends.triton.configurations import Configuration
from ganvas.ops.backends.triton.precision import uses_tf32
from ganvas.ops.convolution import Geometry, convolve, convolve_backward
from ganvas.ops.pending import Pending, PendingGradient


@dataclass(frozen=True)
class Case:
    """The kind of input is "stored", "affine_kink" or "kink_affine"; that of the gradient likewise."""

    convolution: str = "3x3"
    dtype: torch.dtype = torch.float32
    in_channels: int = 5
    out_channels: int = 17
    images: int = 2  # of a statistics group
    groups: int = 1
    size: tuple[int, int] = (7, 6)
    input_kind: str = "affine_kink"
    gradient_kind: str = "stored"
    statistics_of_activation: bool = False
    slope: float = 0.2
    has_bias: bool = True
    channels_last_weight: bool = False
    seed: int = 0

    @property
    def geometry(self) -> Geometry:
        return CONVOLUTIONS[self.convolution][0]

    @property
    def weight_shape(self) -> torch.Size:
        return weight_shape(*CONVOLUTIONS[self.convolution], self.in_channels, self.out_channels)

    def configurations(self) -> tuple[list[Configuration], list[Configuration]]:
        """Those worth measuring, forward and to the input."""
        input = torch.Size((self.images * self.groups, self.in_channels, *self.size))
        arguments = (self.geometry, self.weight_shape, input, self.dtype)
        return convolution.configurations(*arguments, "forward"), convolution.configurations(
            *arguments, "backward_input"
        )


class Arguments:
    """Random tensors for a case: a pending input, weight and bias, the (pending) gradient of the output."""

    def __init__(self, case: Case, device: torch.device | None = None) -> None:
        self.case, generator = case, torch.Generator().manual_seed(case.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        def pixels(*shape: int) -> Tensor:
            return normal(*shape).to(case.dtype).contiguous(memory_format=torch.channels_last)

        shape = case.weight_shape
        self.stored = pixels(case.images * case.groups, case.in_channels, *case.size)
        weight = (normal(*shape) / shape[2:].numel() ** 0.5).to(case.dtype)
        self.weight = weight.contiguous(memory_format=torch.channels_last) if case.channels_last_weight else weight
        self.bias = normal(case.out_channels).to(case.dtype) if case.has_bias else None
        self.scale, self.shift, self.mean = (normal(case.groups, case.in_channels) for _ in range(3))
        output = case.geometry.output_shape(self.stored.shape, shape)
        self.grad, self.grad_stored = pixels(*output), pixels(*output)
        self.alpha, self.beta, self.delta = (normal(case.groups, case.out_channels) for _ in range(3))

    @property
    def input(self) -> Pending:
        if self.case.input_kind == "stored":
            return Pending(self.stored)
        return Pending(
            self.stored, self.scale, self.shift, self.mean, negative_slope=self.case.slope,
            activation_first=self.case.input_kind == "kink_affine",
        )  # fmt: skip

    @property
    def gradient(self) -> Tensor | PendingGradient:
        if self.case.gradient_kind == "stored":
            return self.grad
        return PendingGradient(
            self.grad, self.grad_stored, self.alpha, self.beta, self.delta, self.case.slope,
            self.case.gradient_kind == "kink_affine",
        )  # fmt: skip

    def leaky(self, x: Tensor) -> Tensor:
        """With slope 0 it is ReLU, also at -inf, where -inf*0 would be NaN."""
        return torch.where(x > 0, x, self.case.slope * x) if self.case.slope else torch.relu(x)

    def per_image(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(G, C) to (N, C, 1, 1)."""
        return values.to(dtype).repeat_interleave(self.case.images, 0)[:, :, None, None]

    def by_group(self, values: Tensor) -> Tensor:
        """(N, C, H, W) to (G, C, pixels)."""
        groups, (batch, channels) = self.case.groups, values.shape[:2]
        return values.reshape(groups, batch // groups, channels, -1).transpose(1, 2).flatten(2)

    def activation(self, dtype: torch.dtype) -> Tensor:
        x, scale, shift = self.stored.to(dtype), self.per_image(self.scale, dtype), self.per_image(self.shift, dtype)
        kinds = {
            "stored": lambda: x,
            "affine_kink": lambda: self.leaky(scale * x + shift),
            "kink_affine": lambda: scale * self.leaky(x) + shift,
        }
        return kinds[self.case.input_kind]()

    def raw_gradient(self, dtype: torch.dtype) -> Tensor:
        grad, x = self.grad.to(dtype), self.grad_stored.to(dtype)
        alpha, beta, delta = (self.per_image(values, dtype) for values in (self.alpha, self.beta, self.delta))
        if self.case.gradient_kind == "stored":
            return grad
        if self.case.gradient_kind == "affine_kink":
            return alpha * grad + beta * x + delta
        raw = alpha * grad + beta * self.leaky(x) + delta
        return torch.where(x > 0, raw, self.case.slope * raw)

    def changed(self, **changes: Any) -> Arguments:
        """The same tensors but for ``changes``."""
        other = object.__new__(Arguments)
        other.__dict__.update(self.__dict__ | changes)
        return other


def by_torch(
    of: Arguments, dtype: torch.dtype, multiplied: Callable[[Tensor], Tensor] = lambda values: values
) -> dict[str, Tensor]:
    """Every tensor of pixels stored in ``dtype``; ``multiplied`` gets the operands of every product."""
    case, wide = of.case, torch.promote_types(dtype, torch.float32)
    activation, weight = multiplied(of.activation(wide).to(dtype)), multiplied(of.weight.to(dtype))
    output = convolve(activation, weight, None if of.bias is None else of.bias.to(dtype), case.geometry)
    raw = multiplied(of.raw_gradient(wide).to(dtype))
    grad, _ = convolve_backward(raw, activation, weight, case.geometry, (True, False))
    assert grad is not None
    results = {"output": output, "grad_input": grad}
    if case.input_kind == "stored":
        return results
    normalised, side = of.stored.to(wide), of.stored.double() > 0
    if case.input_kind == "affine_kink":
        exact = of.per_image(of.scale, torch.float64) * of.stored.double() + of.per_image(of.shift, torch.float64)
        grad = results["grad_input"] = torch.where(exact > 0, grad, case.slope * grad)
    else:
        normalised = torch.where(side, normalised, case.slope * normalised)
    deviation = normalised - of.per_image(of.mean, wide)
    results["sum"] = of.by_group(grad.to(wide)).sum(2)
    results["sum_deviation"] = of.by_group(grad.to(wide) * deviation).sum(2)
    return results


def combined(counts: Tensor, means: Tensor, deviations: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (G, C) of tiles' statistics, in float64."""
    counts, means, deviations = counts.double()[:, :, None], means.double(), deviations.double()
    count = counts.sum(1)
    mean = (counts * means).sum(1) / count
    return mean, (deviations + counts * (means - mean[:, None]).square()).sum(1) / count


def check_against_torch(accuracy: Any, case: Case, device: torch.device, configuration: Configuration | None) -> None:
    """All that the kernel computes of a case, by the tolerance rule of tests/conftest.py.

    Where TF32 is allowed, torch's error is that of operands rounded to it: its own kernels need not make use of it.
    """
    of = Arguments(case, device)
    reduced = case.dtype is torch.float32 and uses_tf32()
    exact = by_torch(of, torch.float64)
    torchs = by_torch(of, case.dtype, tf32.rounded) if reduced else by_torch(of, case.dtype)
    arguments = (case.geometry, of.input, of.weight, of.bias)
    plain = convolution.forward(*arguments, configuration=configuration)
    output, *partial = convolution.forward_with_statistics(
        *arguments, case.statistics_of_activation, case.slope, case.groups, configuration=configuration
    )
    ours = {"output": output, "output without statistics": plain}
    groups_fit = case.input_kind != "stored" or case.gradient_kind != "stored" or case.groups == 1
    if groups_fit:
        grad, sums = convolution.backward_input(
            case.geometry, of.gradient, of.weight, of.input, configuration=configuration
        )
        assert grad.is_contiguous(memory_format=torch.channels_last)
        ours |= {"grad_input": grad}
        if case.input_kind == "stored":
            assert not sums.any()
        else:
            ours |= {"sum": sums[0], "sum_deviation": sums[1]}
    for name, result in ours.items():
        assert result.dtype is (torch.float32 if name.startswith("sum") else case.dtype)
        factor, key = (2.0, "output") if name.startswith("output") else (3.0, name)
        accuracy.check(name, result, exact[key], torchs[key], exact[key], factor, terms(of, exact, key))

    values = of.by_group(of.leaky(output.double()) if case.statistics_of_activation else output.double())
    assert torch.equal(partial[0].sum(1), torch.full((case.groups,), values.shape[2], device=device))
    mean, var = combined(*partial)
    torch.testing.assert_close(mean, values.mean(2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var, values.var(2, unbiased=False), rtol=1e-5, atol=1e-6)


def terms(of: Arguments, exact: dict[str, Tensor], name: str) -> Tensor:
    """How large a result's summands are. Those of a sum over pixels, which may cancel, are exact to their dtype."""
    if not name.startswith("sum"):
        return exact[name]
    summands = exact["grad_input"]
    if name == "sum_deviation":
        x = of.leaky(of.stored.double()) if of.case.input_kind == "kink_affine" else of.stored.double()
        summands = summands * (x - of.per_image(of.mean, torch.float64))
    roundings = torch.finfo(of.case.dtype).eps / torch.finfo(torch.float32).eps
    return roundings * of.by_group(summands.abs()).sum(2)


_OPTIONS: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "in_channels": (1, 3, 5, 16, 33),
    "out_channels": (17, 1, 16, 3, 33),
    "groups": (1, 2),
    "size": ((7, 6), (5, 9)),
    "input_kind": ("affine_kink", "kink_affine", "stored"),
    "gradient_kind": ("kink_affine", "stored", "affine_kink"),
    "statistics_of_activation": (False, True),
    "slope": (0.2, 0.0, 1.0, -0.5, 1.5),
    "has_bias": (True, False),
    "channels_last_weight": (False, True, True),
}


def covering(count: int) -> list[Case]:
    """``count`` cases of every convolution, in which all options occur, in changing company."""
    cases = []
    for i in range(count):
        for j, name in enumerate(CONVOLUTIONS):
            generator = torch.Generator().manual_seed(1000 * i + j)
            drawn = {
                option: values[(i + j + int(torch.randint(len(values), (), generator=generator))) % len(values)]
                for option, values in _OPTIONS.items()
            }
            case = Case(name, **drawn, seed=i)
            # Images of a group of their own number, where there is more than one.
            cases.append(replace(case, images=1 if case.groups > 1 else 2))
    return cases


LARGER = [  # several tiles each way, whole blocks and tails; each table of configurations
    Case("3x3", torch.bfloat16, 80, 136, 1, 2, (11, 10), "affine_kink", "affine_kink"),
    Case("4x4_stride2", torch.float16, 16, 64, 2, 1, (16, 18), "kink_affine", "kink_affine"),
    Case("3x3", torch.float32, 40, 72, 1, 1, (12, 11), "affine_kink", "affine_kink"),
]
