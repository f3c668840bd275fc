"""FusedSequential: an ``nn.Sequential`` that executes runs of its children as one operation each."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ganvas.nn.line import Line
from ganvas.nn.plan import plan
from ganvas.nn.run import call


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` with the same children, keys and state_dict that runs neighbouring layers fused.

    What is fused, in training and evaluation, where the children are of exactly these types and carry no hooks:

    - BatchNorm1d/2d, then LeakyReLU or ReLU, or the other way round, or BatchNorm alone: one
      :func:`ganvas.ops.batch_norm_leaky_relu`;
    - Conv2d, ConvTranspose2d or Linear, then LeakyReLU or ReLU: the activation is written over the fresh output;
    - neighbouring convolutions with what follows them, 2×2 max-pooling included, also one that nothing follows:
      one :func:`ganvas.ops.chain.conv_bn_leaky_relu_chain`, where native kernels take part.

    Everything else is called as it stands. Where native kernels run, 4-D inputs of such runs are converted to
    channels_last, and outputs are channels_last. (Dropout then draws another mask from the same seed than on contiguous
    tensors, since torch draws in memory order.) Where none does (float64, a device without kernels), all of it is plain
    torch. Inputs that are not tensors (a ``torch.fx`` proxy, a tuple) pass through the children one by one.
    """

    statistics_groups: int = 1
    """Equal consecutive parts of the batch, each with BatchNorm statistics of its own; see ``statistics_groups()``."""

    # (children, their types, plan): a parametrization or a lazy module's first call changes a child's type.
    _planned: tuple[tuple[Any, ...], tuple[type, ...], tuple[Line | nn.Module, ...]] | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return super().forward(input)
        groups = self.statistics_groups
        for step in self._steps():
            input = step(input, statistics_groups=groups) if isinstance(step, Line) else call(step, input, groups)
        return input

    def forward_one_by_one(self, input: Tensor) -> Tensor:
        """``forward`` with every child called as a module, in the memory layout that ``forward`` uses."""
        if not isinstance(input, Tensor):
            return super().forward(input)
        groups = self.statistics_groups
        for step in self._steps():
            if isinstance(step, Line):
                for run in step.runs:
                    input = run.one_by_one(input, groups)
            else:
                input = call(step, input, groups)
        return input

    def _steps(self) -> tuple[Line | nn.Module, ...]:
        children = tuple(self._modules.values())
        types = tuple(map(type, children))
        planned = self._planned
        if planned is None or planned[0] != children or planned[1] != types:
            planned = (children, types, plan(self._modules))
            if not torch.compiler.is_compiling():  # what a graph was made without would have it made again
                self._planned = planned
        return planned[2]

    def __getitem__(self, index: slice | int) -> Any:
        # nn.Sequential slices into type(self), whose constructor may want something else than children.
        if isinstance(index, slice):
            return FusedSequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_planned", None)
        return state


def runs_fused(module: nn.Module) -> bool:
    """Whether ``module``'s forward is FusedSequential's: not a subclass' own, nor one set on the instance."""
    return type(module).forward is FusedSequential.forward and "forward" not in module.__dict__
