"""A stand-in for CUDA graphs on the CPU: a step is recorded as the torch operators that it calls.

As with a CUDA graph, Python runs once, during the recording; a replay executes the same operators on the same tensors,
so whatever Python worked out (numbers, branches, how many) is fixed, and the recording itself leaves no trace in any
tensor or generator. Reading a value back is refused. Kernels that torch's dispatcher does not see are not recorded: the
networks have to run as plain torch (GANVAS_BACKEND=reference).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_READS_BACK = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)


class OperatorTape:
    """A recorder for :class:`ganvas.training.step_graph.StepGraph`; counts what it is asked to do."""

    def __init__(self, device: torch.device | None = None, *generators: torch.Generator) -> None:
        self.generators: Sequence[torch.Generator] = generators
        self.steps, self.recordings, self.replays = 0, 0, 0

    def run(self, step: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], str | None]:
        self.steps += 1
        return step(), None

    def record(self, step: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        self.recordings += 1
        generators = (torch.default_generator, *self.generators)
        states = [generator.get_state() for generator in generators]
        tape = _Tape()
        try:
            with tape:
                outputs = step()
        finally:
            tape.undo()
            for generator, state in zip(generators, states):
                generator.set_state(state)

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return outputs, replay


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple, dict, Any]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS_BACK:
            raise RuntimeError(f"{func} reads a value back, which a recording cannot hold")
        for tensor in _tensors((args, kwargs)):
            # An expanded tensor cannot be written to; what it was expanded from was met before it.
            if id(tensor) not in self._before and 0 not in tensor.stride():
                self._before[id(tensor)] = (tensor, tensor.detach().clone())
        result = func(*args, **kwargs)
        if not _is_view(func):
            self._calls.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def undo(self) -> None:
        """Latest first: what was met later may be a view of what was met earlier, and already changed."""
        for tensor, value in reversed(self._before.values()):
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, recorded in self._calls:
            for ours, new in zip(_tensors(recorded), _tensors(func(*args, **kwargs))):
                if new is not ours:
                    ours.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_view(func: Any) -> bool:
    """Its result is the same memory under another shape: nothing to execute."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)
