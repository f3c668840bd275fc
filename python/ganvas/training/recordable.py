"""Optimisers whose step a CUDA graph can hold although its learning rate, and momentum, change from step to step.

A graph keeps the numbers that it was recorded with; only tensors may change. Torch's fused kernels, which move each
number of a parameter once, take a tensor for the learning rate, but none for the momentum (β₁ of Adam). So a recording
has a momentum b of its own, :data:`RECORDED_MOMENTUM`, and the numbers of the step make of it the momentum β that is
wanted, with t the number of the step, g the gradient, γ the learning rate, m Adam's first moment:

    Adam   m ← β·m + (1 − β)·g   is   m ← k·(b·(β / (b·k))·m + (1 − b)·g)   with k = (1 − β) / (1 − b),
           and m / (1 − βᵗ)      is   the recorded m / (1 − bᵗ) times k·(1 − bᵗ) / (1 − βᵗ), a factor on γ.
           AdamW's decay, which is γ's alone, is then taken before the kernel.
    SGD    v ← β·v + g           is   v ← b·(β / b)·v + g,
           and γ·(g + β·v)       is   γ·(g + b·v) + γ·(β − b)·v.

The parameter groups hold numbers, as with any other optimiser: schedules, checkpoints and logs know of nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

RECORDED_MOMENTUM = 0.9
"""Near what schedules move it in, so that the factors are near 1."""


class Recordable(Optimizer):
    """What the classes below have in common: :meth:`publish`, and a step that reads what it wrote.

    Args:
        groups: parameter groups, all on one device.
        cycled_momentum: a schedule changes the momentum too. The step then takes up to four more kernels a group.
        options: of torch's optimiser; learning rate and momentum are numbers.
    """

    def __init__(self, groups: list[dict[str, Any]], *, cycled_momentum: bool = False, **options: Any) -> None:
        super().__init__(groups, **options)
        self._cycled = cycled_momentum
        self._steps = 0
        self._published: list[tuple[float, ...]] = []
        device = self.param_groups[0]["params"][0].device
        width = len(self._numbers(self.param_groups[0], 1))
        self._values = torch.zeros(len(self.param_groups), width, device=device)

    def publish(self) -> None:
        """Write the groups' numbers where the next step reads them; to be called before each one, recorded or not.

        The host does not wait for the device, and where no number has changed nothing is written.
        """
        self._steps += 1
        numbers = [self._numbers(group, self._steps) for group in self.param_groups]
        if numbers != self._published:
            # Memory that is pinned: torch does not use it again before the copy has been made.
            values = torch.tensor(numbers, dtype=torch.float32, pin_memory=self._values.is_cuda)
            self._values.copy_(values, non_blocking=True)
            self._published = numbers

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step by the numbers that :meth:`publish` has written. There is no closure.

        Raises:
            ValueError: with a closure.
        """
        if closure is not None:
            raise ValueError("closure must be None: a recorded step evaluates nothing again")
        if self._cycled:
            for group, values in zip(self.param_groups, self._values):
                self._before(group, values)
        with self._as_recorded():
            super().step()
        if self._cycled:
            for group, values in zip(self.param_groups, self._values):
                self._after(group, values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._steps = max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)

    @contextmanager
    def _as_recorded(self) -> Iterator[None]:
        """Within the block the groups hold what torch's step is to be recorded with."""
        kept = [dict(group) for group in self.param_groups]
        for group, values in zip(self.param_groups, self._values):
            group.update(self._recorded(group) if self._cycled else {}, lr=values[0])
        try:
            yield
        finally:
            for group, before in zip(self.param_groups, kept):
                group.update(before)

    def _numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """What changes of a group, for a step counted from 1; first the learning rate for torch's step."""
        raise NotImplementedError

    def _recorded(self, group: dict[str, Any]) -> dict[str, Any]:
        """The numbers that are fixed in a recording where the momentum is cycled."""
        raise NotImplementedError

    def _before(self, group: dict[str, Any], values: Tensor) -> None:
        """What is done to parameters and state before torch's step where the momentum is cycled.

        values: (numbers,) of the group, as published.
        """
        raise NotImplementedError

    def _after(self, group: dict[str, Any], values: Tensor) -> None:
        """The same after it."""
        raise NotImplementedError


class _AdamStep(Recordable):
    _decoupled: ClassVar[bool]
    """Whether weight decay acts on the parameters and not on the gradients."""

    def _numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        rate, (beta, _) = group["lr"], group["betas"]
        if not self._cycled:
            return (rate,)
        gain = (1 - beta) / (1 - RECORDED_MOMENTUM)
        correction = (1 - RECORDED_MOMENTUM**step) / (1 - beta**step)
        return rate * gain * correction, beta / (RECORDED_MOMENTUM * gain), gain, 1 - rate * group["weight_decay"]

    def _recorded(self, group: dict[str, Any]) -> dict[str, Any]:
        decay = {"weight_decay": 0.0} if self._decoupled else {}
        return {"betas": (RECORDED_MOMENTUM, group["betas"][1]), **decay}

    def _before(self, group: dict[str, Any], values: Tensor) -> None:
        _, factor, _, decay = values
        _multiply(_state(self, group, "exp_avg"), factor)
        if self._decoupled and group["weight_decay"]:
            _multiply(_updated(group), decay)

    def _after(self, group: dict[str, Any], values: Tensor) -> None:
        _, _, gain, _ = values
        _multiply(_state(self, group, "exp_avg"), gain)


class RecordableAdam(_AdamStep, Adam):
    """See :class:`Recordable`."""

    _decoupled = False


class RecordableAdamW(_AdamStep, AdamW):
    """See :class:`Recordable`."""

    _decoupled = True


class RecordableSGD(Recordable, SGD):
    """With Nesterov's momentum; see :class:`Recordable`."""

    def _numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        rate, beta = group["lr"], group["momentum"]
        if not self._cycled:
            return (rate,)
        return rate, beta / RECORDED_MOMENTUM, rate * (beta - RECORDED_MOMENTUM)

    def _recorded(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"momentum": RECORDED_MOMENTUM}

    def _before(self, group: dict[str, Any], values: Tensor) -> None:
        _, factor, _ = values
        _multiply(_state(self, group, "momentum_buffer"), factor)

    def _after(self, group: dict[str, Any], values: Tensor) -> None:
        _, _, rest = values
        buffers = _state(self, group, "momentum_buffer")
        if buffers:
            torch._foreach_sub_(_updated(group), torch._foreach_mul(buffers, rest))


def _updated(group: dict[str, Any]) -> list[Tensor]:
    """The parameters that a step changes."""
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _state(optimizer: Optimizer, group: dict[str, Any], name: str) -> list[Tensor]:
    """Of the same parameters; empty before the first step, which makes it."""
    states = [optimizer.state[parameter] for parameter in _updated(group)]
    return [state[name] for state in states if name in state]


def _multiply(tensors: list[Tensor], factor: Tensor) -> None:
    """By a 0-dim tensor, in one kernel."""
    if tensors:
        torch._foreach_mul_(tensors, factor)
