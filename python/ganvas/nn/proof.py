"""Compares a fused model with the same model as plain torch, on an example, in everything that training depends on.

Errors are relative in the Euclidean norm, ‖fused − plain‖ / ‖plain‖, per tensor. Accepted is the larger of two numbers.

One follows from ε, the machine epsilon of the coarsest dtype involved: 32·ε for outputs and running statistics, a few
roundings per layer over some layers; 2·√ε for gradients. Where two runs' pre-activations differ by a relative δ, about
a share δ of them lie so close to 0 that they fall on different sides of the LeakyReLU's kink; such an element's
gradient is off by as much as it is large, hence √δ in the norm.

The other is what this model makes of rounding: 8 times the change of the same tensor in the plain model when every
parameter and input moves by ε. Deep models in bfloat16 and batches of two samples amplify much; where this tolerance
reaches 1 the example shows nothing, and a larger batch is a better one.

A single element on the other side of a kink is an error of 1/√n among n, which may be more than either. Where it lies
is an accident of the example: if nothing but gradients is too far off, two examples a little way from it decide.

A tenth of the norm of all gradients together counts into each gradient's denominator: one that cancels to nothing (that
of a bias before BatchNorm) is rounding noise in both runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ganvas.nn.observation import Observation, observe, run_plain

_EXAMPLES = 3


class ConversionError(RuntimeError):
    """The fused model does not do what the plain one does. The model is plain torch again."""


@dataclass(frozen=True)
class Comparison:
    """One tensor's error (``kind``: output, statistic or gradient) in one mode (training or evaluation)."""

    mode: str
    kind: str
    name: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Proof:
    """Every comparison between the fused and the plain model on the example input. ``str(proof)`` shows the worst."""

    comparisons: tuple[Comparison, ...]

    @property
    def holds(self) -> bool:
        return all(comparison.holds for comparison in self.comparisons)

    def worst(self) -> list[Comparison]:
        """For each mode and kind the comparison closest to its tolerance, or furthest beyond it."""
        worst: dict[tuple[str, str], Comparison] = {}
        for one in self.comparisons:
            known = worst.get((one.mode, one.kind))
            if known is None or one.error / one.tolerance > known.error / known.tolerance:
                worst[one.mode, one.kind] = one
        return list(worst.values())

    def __str__(self) -> str:
        lines = ["fused against plain torch on the example input: relative errors, the worst of each kind"]
        for one in self.worst():
            verdict = "" if one.holds else "  TOO LARGE"
            lines.append(
                f"  {one.mode:<10}  {one.kind:<9}  {one.error:.1e} of {one.tolerance:.1e} accepted  {one.name}{verdict}"
            )
        return "\n".join(lines)


def prove(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> Proof:
    """Compares ``model`` as it is with the same model with every FusedSequential's children called one by one.

    Both run in the memory layout that the fused model uses, since dropout draws its mask in memory order.
    Random number generators, parameters, buffers, ``.grad`` and training flags are afterwards what they were. Forward
    hooks fire as in any forward.

    Raises:
        ValueError: the plain model fails on the example, returns no floating-point tensor, or has parameters that are
            not initialised.
        ConversionError: the fused model fails, or differs by more than the tolerances.
    """
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    lazy = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if nn.parameter.is_lazy(value)]
    if lazy:
        raise ValueError(f"example_input needs an initialised model; {', '.join(lazy)} still waits for its first input")
    for attempt in range(_EXAMPLES):
        proof = Proof(tuple(_compare(model, _near(arguments, attempt) if attempt else arguments)))
        if proof.holds:
            return proof
        if any(not one.holds and one.kind != "gradient" for one in proof.comparisons):
            break
    raise ConversionError(f"the fused model differs from the plain one\n{proof}")


def _near(arguments: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """Floating-point arguments moved by up to a 64th of each value."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor: Tensor) -> Tensor:
        factors = torch.empty_like(tensor, dtype=torch.float32, device="cpu")  # in the same memory layout
        return tensor.detach() * factors.uniform_(1 - 1 / 64, 1 + 1 / 64, generator=generator).to(tensor)

    return tuple(moved(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def _compare(model: nn.Module, arguments: tuple[Any, ...]) -> list[Comparison]:
    comparisons: list[Comparison] = []
    for mode, training in (("training", True), ("evaluation", False)):
        try:
            with run_plain(model):
                plain = observe(model, arguments, training=training)
                perturbed = observe(model, arguments, training=training, perturbed=True)
        except Exception as error:
            raise ValueError(f"the plain model fails on example_input in {mode} mode: {error}") from error
        try:
            fused = observe(model, arguments, training=training)
        except Exception as error:
            raise ConversionError(f"the fused model fails in {mode} mode where the plain one runs: {error}") from error
        errors, sensitivities = _errors(fused, plain), _errors(perturbed, plain)
        least = {"output": 32 * plain.epsilon, "statistic": 32 * plain.epsilon, "gradient": 2 * plain.epsilon**0.5}
        for kind, name in errors:
            tolerance = max(least[kind], 8 * sensitivities[kind, name])
            comparisons.append(Comparison(mode, kind, name, errors[kind, name], tolerance))
    return comparisons


def _errors(got: Observation, expected: Observation) -> dict[tuple[str, str], float]:
    """Relative error by (kind, name)."""
    known = [gradient for gradient in expected.gradients.values() if gradient is not None]
    tenth_of_all = 0.1 * math.sqrt(sum(_norm(gradient) ** 2 for gradient in known))
    errors = {}
    for i, (output, expected_output) in enumerate(zip(got.outputs, expected.outputs)):
        errors["output", f"output {i}"] = _relative_error(output, expected_output)
    for name, statistic in expected.statistics.items():
        errors["statistic", name] = _relative_error(got.statistics[name], statistic)
    for name, gradient in expected.gradients.items():
        errors["gradient", name] = _relative_error(got.gradients[name], gradient, tenth_of_all)
    return errors


def _relative_error(got: Tensor | None, expected: Tensor | None, floor: float = 0.0) -> float:
    """‖got − expected‖ / (‖expected‖ + floor); infinite where one is missing, or NaN and Inf stand elsewhere."""
    if got is None or expected is None:
        return 0.0 if got is expected else math.inf
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return math.inf
    # The same NaN or Inf in both is no difference.
    same = (got == expected) | (got.isnan() & expected.isnan())
    difference = (got.double() - expected.double()).masked_fill(same, 0.0).norm().item()
    if difference == 0.0:
        return 0.0
    error = difference / (_norm(expected) + floor)
    return math.inf if math.isnan(error) else error


def _norm(tensor: Tensor) -> float:
    """Of the finite elements."""
    return tensor.double().nan_to_num(0.0, 0.0, 0.0).norm().item()
