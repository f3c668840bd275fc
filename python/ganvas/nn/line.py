"""Runs that follow each other: a stretch of them whose convolutions native kernels take executes as one operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor, nn
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
from ganvas.ops.chain import Layer, can_chain, conv_bn_leaky_relu_chain
from ganvas.ops.convolution import Geometry, symmetric_padding


def execute(
    runs: Sequence[Run], input: Tensor, statistics_groups: int, residuals: Sequence[Tensor | None] | None = None
) -> Tensor:
    """The runs one after the other, each with the residual that it adds, or None."""
    residuals = residuals or [None] * len(runs)
    global_hooks = _has_any_global_hook()
    for stretch, can_be_layers in _stretches(runs, residuals, statistics_groups):
        members, residual = [runs[i] for i in stretch], residuals[stretch[-1]]
        alone = global_hooks or not can_be_layers
        chained = None if alone else _execute_as_chain(members, input, statistics_groups, residual)
        if chained is not None:
            input = chained
            continue
        for i, run in zip(stretch, members):
            input = run(input, statistics_groups, residuals[i])
    return input


def _stretches(
    runs: Sequence[Run], residuals: Sequence[Tensor | None], statistics_groups: int
) -> Iterator[tuple[list[int], bool]]:
    """Positions of neighbouring runs that can be layers of a chain, up to a residual; any other run by itself.

    With each stretch, which of the two it is.
    """
    stretch: list[int] = []
    for i, (run, residual) in enumerate(zip(runs, residuals)):
        can_be_layer = _can_be_layer(run, statistics_groups) and (residual is None or run.norm is not None)
        if can_be_layer:
            stretch.append(i)
        if stretch and (residual is not None or not can_be_layer):
            yield stretch, True  # a residual is added to a chain's last layer
            stretch = []
        if not can_be_layer:
            yield [i], False
    if stretch:
        yield stretch, True


def _can_be_layer(run: Run, statistics_groups: int) -> bool:
    producer, norm = _convolution_of(run), run.norm
    if producer is None or _padding(producer) is None:
        return False
    if producer.padding_mode != "zeros" or any(why_not_plain(module) is not None for module in run.modules):
        return False
    if norm is None:
        return True
    if type(norm) is not nn.BatchNorm2d or norm.num_features != producer.out_channels:
        return False
    # a cumulative average's share changes from group to group
    return norm.momentum is not None or statistics_groups == 1 or not uses_batch_statistics(norm)


def _execute_as_chain(
    runs: Sequence[Run], input: Tensor, statistics_groups: int, residual: Tensor | None
) -> Tensor | None:
    """None where a chain would gain nothing."""
    layers = [_layer(run) for run in runs]
    if not can_chain(input, layers, statistics_groups, residual):
        return None
    for i, run in enumerate(runs):
        if run.norm is not None:
            if run.norm.momentum is None:  # a cumulative average: of as many as there were before this use
                layers[i] = _layer(run)
            count_batches(run.norm, statistics_groups)
    return conv_bn_leaky_relu_chain(input, layers, statistics_groups, residual)


def _convolution_of(run: Run) -> nn.Conv2d | nn.ConvTranspose2d | None:
    known = type(run.producer) in CONVOLUTIONS
    return cast("nn.Conv2d | nn.ConvTranspose2d", run.producer) if known else None


def _padding(producer: nn.Conv2d | nn.ConvTranspose2d) -> tuple[int, int] | None:
    return symmetric_padding(producer.padding, producer.kernel_size, producer.stride, producer.dilation)  # type: ignore[arg-type]


def _layer(run: Run) -> Layer:
    producer, norm = _convolution_of(run), run.norm
    assert producer is not None
    padding = _padding(producer)
    assert padding is not None
    geometry = Geometry(  # torch makes pairs of them
        producer.stride, padding, producer.dilation,  # type: ignore[arg-type]
        producer.transposed, producer.output_padding, producer.groups, run.upsample is not None,  # type: ignore[arg-type]
    )  # fmt: skip
    slope, max_pool = negative_slope_of(run.activation), run.pool is not None
    if norm is None:
        return Layer(geometry, producer.weight, producer.bias, negative_slope=slope, max_pool=max_pool)
    batch_statistics, running_mean, running_var, momentum = norm_arguments(norm)
    return Layer(
        geometry, producer.weight, producer.bias, batch_statistics, norm.weight, norm.bias, running_mean, running_var,
        momentum, norm.eps, slope, run.order == "conv_act_bn", max_pool,
    )  # fmt: skip
