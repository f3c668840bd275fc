"""Runs that follow each other: a stretch of them whose convolutions native kernels take executes as one operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    for stretch, layers in _stretches(runs, residuals, statistics_groups):
        members, residual = [runs[i] for i in stretch], residuals[stretch[-1]]
        alone = global_hooks or not layers
        chained = None if alone else _execute_as_chain(members, layers, input, statistics_groups, residual)
        if chained is not None:
            input = chained
            continue
        for i, run in zip(stretch, members):
            input = run(input, statistics_groups, residuals[i])
    return input


def _stretches(
    runs: Sequence[Run], residuals: Sequence[Tensor | None], statistics_groups: int
) -> Iterator[tuple[list[int], list[Layer]]]:
    """Positions of neighbouring runs that can be layers of a chain, up to a residual, and the layers.

    Any other run by itself, without a layer.
    """
    stretch: list[int] = []
    layers: list[Layer] = []
    for i, (run, residual) in enumerate(zip(runs, residuals)):
        layer = _layer(run, statistics_groups) if residual is None or run.norm is not None else None
        if layer is not None:
            stretch.append(i)
            layers.append(layer)
        if stretch and (residual is not None or layer is None):
            yield stretch, layers  # a residual is added to a chain's last layer
            stretch, layers = [], []
        if layer is None:
            yield [i], []
    if stretch:
        yield stretch, layers


def _execute_as_chain(
    runs: Sequence[Run], layers: list[Layer], input: Tensor, statistics_groups: int, residual: Tensor | None
) -> Tensor | None:
    """None where a chain would gain nothing."""
    if not can_chain(input, layers, statistics_groups, residual):
        return None
    for run, layer in zip(runs, layers):
        if run.norm is not None:
            if run.norm.momentum is None:  # a cumulative average: of as many as there were before this use
                *_, layer.momentum = norm_arguments(run.norm)
            count_batches(run.norm, statistics_groups)
    return conv_bn_leaky_relu_chain(input, layers, statistics_groups, residual)


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
    )  # fmt: skip
