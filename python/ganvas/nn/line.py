"""Runs that follow each other: a stretch of them whose convolutions native kernels take executes as one operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from ganvas.nn.run import (
    CONVOLUTIONS,
    Run,
    count_batches,
    negative_slope_of,
    norm_arguments,
    uses_batch_statistics,
    why_not_plain,
)
from ganvas.ops.chain import Chain, Layer
from ganvas.ops.convolution import Geometry, symmetric_padding
from ganvas.ops.layers import GIVEN, Adds


class Stretch(NamedTuple):
    """Neighbouring runs that can be a chain, up to one that adds a residual; or a single run that cannot."""

    positions: range
    chain: Chain | None
    ends: tuple[int, ...]
    """Where longer chains from the same run on may end, the longest first.

    Those go over runs that add what is the chain's own, and one that adds what is given.
    """


class Line:
    """Runs that follow each other. What they were as layers of a chain is remembered until one of them changes.

    Args:
        adds: of each run the one whose input it adds; None: none, or what the line is called with.
    """

    __name__ = "fused"  # under which it appears in generated code

    def __init__(self, runs: Sequence[Run], adds: Adds | None = None) -> None:
        self.runs = tuple(runs)
        self.adds = adds or (None,) * len(self.runs)
        self._watches = [_Watch(run) for run in self.runs]
        self._known: _Known | None = None

    def __call__(self, input: Tensor, *residuals: Tensor | None, statistics_groups: int = 1) -> Tensor:
        """The runs one after the other, each with the residual that it adds, or None; without residuals none does."""
        runs = self.runs
        residuals = residuals or (None,) * len(runs)
        apart = _has_any_global_hook()
        inputs: dict[int, Tensor] = {}  # of runs, until they are added
        done = 0
        known = self._look(residuals, statistics_groups)
        for positions, chain, ends in known.stretches:
            start, last = positions[0], positions[-1]
            if start < done:
                continue
            for end in () if apart else ends:  # in a longer one torch's convolution may be the faster somewhere
                onward = known.onward(start, end, self.adds)
                given = residuals[start + onward.residual_layer]
                chained = self._chained(onward, start, input, statistics_groups, given)
                if chained is not None:
                    input, done = chained, end
                    break
            if start < done:
                continue
            if start in self.adds:  # what is added begins a stretch, and ends one where it is
                inputs[start] = input
            position = self.adds[last]
            added = residuals[last] if position is None else inputs.pop(position)
            if chain is not None and not apart:
                chained = self._chained(chain, start, input, statistics_groups, added)
                if chained is not None:
                    input = chained
                    continue
            for i in positions:
                input = runs[i](input, statistics_groups, added if i == last else None)
        return input

    def _chained(
        self, chain: Chain, start: int, input: Tensor, statistics_groups: int, residual: Tensor | None
    ) -> Tensor | None:
        """None where a chain would gain nothing."""
        prepared = chain.prepare(input, statistics_groups, residual)
        if prepared is None:
            return None
        for i, layer in enumerate(chain.layers, start):
            norm = self.runs[i].norm
            if norm is not None and norm.momentum is None:  # a cumulative average: of as many as there were before
                *_, layer.momentum = norm_arguments(norm)
                count_batches(norm, statistics_groups)
        return chain.run(prepared, input, statistics_groups, residual)

    def _look(self, residuals: Sequence[Tensor | None], statistics_groups: int) -> _Known:
        given = [residual is not None for residual in residuals]
        if torch.compiler.is_compiling():  # a graph would be made again for what is remembered after it
            return self._cut_up([_layer(run, statistics_groups) for run in self.runs], given)
        layers = [watch.layer(statistics_groups) for watch in self._watches]
        known = self._known
        if known is None or known.given != given or not all(map(is_, known.layers, layers)):
            known = self._known = self._cut_up(layers, given)
        return known

    def _cut_up(self, layers: list[Layer | None], given: list[bool]) -> _Known:
        stretches = list(_cut(layers, self.runs, given, self.adds))
        further = [
            Stretch(positions, chain, _ends(stretches[k:], given, self.adds))
            for k, (positions, chain, _) in enumerate(stretches)
        ]
        return _Known(layers, given, further)


class _Known:
    """What the runs are as layers and which of them are chains."""

    def __init__(self, layers: list[Layer | None], given: list[bool], stretches: list[Stretch]) -> None:
        self.layers = layers
        self.given = given
        self.stretches = stretches
        self._onward: dict[tuple[int, int], Chain] = {}

    def onward(self, start: int, end: int, adds: Adds) -> Chain:
        """A longer chain: see :attr:`Stretch.ends`."""
        chain = self._onward.get((start, end))
        if chain is None:
            own = [None if added is None else added - start for added in adds[start:end]]
            adding = (GIVEN if given else added for given, added in zip(self.given[start:end], own))
            chain = self._onward[start, end] = Chain(self.layers[start:end], tuple(adding))  # type: ignore[arg-type]
        return chain


def _cut(layers: Sequence[Layer | None], runs: Sequence[Run], given: Sequence[bool], adds: Adds) -> Iterator[Stretch]:
    start = 0  # of the stretch that is not cut yet
    for i, (run, layer) in enumerate(zip(runs, layers)):
        adding = given[i] or adds[i] is not None
        chains = layer is not None and (run.norm is not None or not adding)
        if start < i and (i in adds or not chains):  # what is added is a chain's input
            yield _chain(layers, start, i)
            start = i
        if not chains:
            yield Stretch(range(i, i + 1), None, ())
        elif adding:  # to a chain's last layer
            yield _chain(layers, start, i + 1)
        if adding or not chains:
            start = i + 1
    if start < len(runs):
        yield _chain(layers, start, len(runs))


def _chain(layers: Sequence[Layer | None], start: int, end: int) -> Stretch:
    return Stretch(range(start, end), Chain(layers[start:end]), ())  # type: ignore[arg-type]


def _ends(stretches: Sequence[Stretch], given: Sequence[bool], adds: Adds) -> tuple[int, ...]:
    """Where chains from the first stretch on, and longer than that, may end."""
    start, ends = stretches[0].positions[0], []
    for positions, chain, _ in stretches:
        if chain is None or any((added := adds[i]) is not None and added < start for i in positions):
            break
        if any(given[start : positions[-1]]) and given[positions[-1]]:  # a chain adds one
            break
        end = positions[-1] + 1
        if not any(added is not None and start < added < end for added in adds[end:]):
            ends.append(end)
    return tuple(end for end in reversed(ends) if end > stretches[0].positions[-1] + 1)


# What makes a layer of a run, beside tensors and hooks.
_SETTINGS = {
    nn.Conv2d: itemgetter(
        "kernel_size", "stride", "padding", "dilation", "output_padding", "groups", "padding_mode", "out_channels"
    ),
    nn.BatchNorm2d: itemgetter("num_features", "eps", "momentum", "training", "track_running_stats"),
    nn.LeakyReLU: itemgetter("negative_slope"),
}
_SETTINGS[nn.ConvTranspose2d] = _SETTINGS[nn.Conv2d]


class _Watch:
    """A run as a layer: the same object for as long as nothing of what makes it changes."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._layer: Layer | None = None
        self._tensors: list[tuple[dict[str, Any], str, Tensor | None]] = []
        self._settings: list[tuple[itemgetter, dict[str, Any], Any]] = []

    def layer(self, statistics_groups: int) -> Layer | None:
        """None where the run's modules have to be called."""
        if self._layer is None or not self._holds():
            self._look(statistics_groups)
        return self._layer

    def _holds(self) -> bool:
        # Plain loops: this is asked at every call.
        for holder, name, tensor in self._tensors:
            if holder.get(name) is not tensor:
                return False
        for values, state, known in self._settings:
            if values(state) != known:
                return False
        return not any(map(why_not_plain, self._run.modules))

    def _look(self, statistics_groups: int) -> None:
        run = self._run
        self._layer = _layer(run, statistics_groups)
        self._tensors, self._settings = [], []
        for module in run.modules if self._layer is not None else ():
            state = module.__dict__
            for holder in (state["_parameters"], state["_buffers"]):
                self._tensors += [(holder, name, tensor) for name, tensor in holder.items()]
            if (values := _SETTINGS.get(type(module))) is not None:
                self._settings.append((values, state, values(state)))


def _layer(run: Run, statistics_groups: int) -> Layer | None:
    """The run as a layer of a chain; None where its modules have to be called."""
    producer, norm = run.producer, run.norm
    if type(producer) not in CONVOLUTIONS:
        return None
    assert isinstance(producer, (nn.Conv2d, nn.ConvTranspose2d))
    padding = symmetric_padding(producer.padding, producer.kernel_size, producer.stride, producer.dilation)  # type: ignore[arg-type]
    if padding is None or producer.padding_mode != "zeros":
        return None
    for module in run.modules:
        if why_not_plain(module) is not None:
            return None
    geometry = Geometry(  # torch makes pairs of them
        producer.stride, padding, producer.dilation,  # type: ignore[arg-type]
        producer.transposed, producer.output_padding, producer.groups, run.upsample is not None,  # type: ignore[arg-type]
    )  # fmt: skip
    slope, max_pool = negative_slope_of(run.activation), run.pool is not None
    if norm is None:
        return Layer(geometry, producer.weight, producer.bias, negative_slope=slope, max_pool=max_pool)
    if type(norm) is not nn.BatchNorm2d or norm.num_features != producer.out_channels:
        return None
    if norm.momentum is None and statistics_groups > 1 and uses_batch_statistics(norm):
        return None  # a cumulative average's share changes from group to group
    batch_statistics, running_mean, running_var, momentum = norm_arguments(norm)
    return Layer(
        geometry, producer.weight, producer.bias, batch_statistics, norm.weight, norm.bias, running_mean, running_var,
        momentum, norm.eps, slope, run.order == "conv_act_bn", max_pool,
        batches=_counted(norm), adds_last=run.adds_last,
    )  # fmt: skip


def _counted(norm: _BatchNorm) -> Tensor | None:
    """What a chain counts its batches in. Those of a cumulative average are counted before its share is known."""
    counts = norm.training and norm.track_running_stats and norm.momentum is not None
    return norm.num_batches_tracked if counts else None
