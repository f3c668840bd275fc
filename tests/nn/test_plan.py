"""Which neighbours form a run, and in which order."""

from __future__ import annotations

import pytest
from torch import nn

from ganvas.nn.line import Line
from ganvas.nn.plan import find_runs, plan


def _runs(*modules: nn.Module) -> list[tuple[str, str]]:
    return [("".join(run.names), run.order) for run in find_runs(nn.Sequential(*modules)._modules)]


CONV, LINEAR, NORM, ACT = nn.Conv2d(2, 2, 1), nn.Linear(2, 2), nn.BatchNorm2d(2), nn.LeakyReLU()
IN_PLACE = nn.ReLU(inplace=True)


@pytest.mark.parametrize("producer", [CONV, LINEAR, nn.ConvTranspose2d(2, 2, 1)])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(2), NORM])
@pytest.mark.parametrize("activation", [ACT, nn.ReLU(), IN_PLACE])
def test_every_supported_triple_is_one_run(producer, norm, activation):
    assert _runs(producer, norm, activation) == [("012", "conv_bn_act")]
    assert _runs(producer, activation, norm) == [("012", "conv_act_bn")]


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ((CONV, ACT), [("01", "conv_bn_act")]),
        ((CONV, NORM), [("01", "conv_bn_act")]),
        ((NORM, ACT), [("01", "conv_bn_act")]),
        ((NORM,), [("0", "conv_bn_act")]),
        ((ACT, NORM), [("01", "conv_act_bn")]),
        ((CONV,), []),
        ((ACT,), []),
        ((), []),
    ],
)
def test_shorter_runs(modules, expected):
    assert _runs(*modules) == expected


def test_an_activation_between_two_claims_goes_with_the_norm_before_it():
    assert _runs(CONV, ACT, NORM, ACT) == [("01", "conv_bn_act"), ("23", "conv_bn_act")]


def test_a_leading_in_place_activation_keeps_writing_to_its_input():
    assert _runs(IN_PLACE, NORM) == [("1", "conv_bn_act")]


def test_anything_else_separates_runs():
    modules = (CONV, NORM, nn.Dropout(), ACT, CONV, ACT, nn.MaxPool2d(3))
    assert _runs(*modules) == [("01", "conv_bn_act"), ("45", "conv_bn_act")]


@pytest.mark.parametrize("upsampling", [nn.Upsample(scale_factor=2), nn.UpsamplingNearest2d(scale_factor=2)])
def test_nearest_upsampling_before_and_2x2_pooling_after_a_convolution_belong_to_its_run(upsampling):
    (run,) = find_runs(nn.Sequential(upsampling, CONV, ACT, NORM, nn.MaxPool2d(2))._modules)
    assert run.names == tuple("01234")
    assert run.order == "conv_act_bn"
    assert run.upsample is upsampling
    assert type(run.pool) is nn.MaxPool2d


@pytest.mark.parametrize(
    "other",
    [
        nn.MaxPool2d(2, padding=1), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2),
        nn.MaxPool2d(2, return_indices=True), nn.MaxPool2d(2, dilation=2),
    ],
)  # fmt: skip
def test_other_poolings_are_called(other):
    assert _runs(CONV, NORM, other) == [("01", "conv_bn_act")]


@pytest.mark.parametrize(
    "other", [nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(8), nn.Upsample(scale_factor=3)]
)
def test_other_upsamplings_are_called(other):
    assert _runs(other, CONV, NORM) == [("12", "conv_bn_act")]


class _OwnBatchNorm(nn.BatchNorm2d):
    pass


class _OwnConv(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    "module", [_OwnBatchNorm(2), nn.SyncBatchNorm(2), nn.LazyBatchNorm2d(), nn.BatchNorm3d(2), nn.InstanceNorm2d(2)]
)
def test_only_exact_norm_types_are_fused(module):
    assert _runs(CONV, module, ACT) == []


def test_a_subclassed_convolution_is_called_and_the_rest_fused():
    assert _runs(_OwnConv(2, 2, 1), NORM, ACT) == [("12", "conv_bn_act")]


def test_a_plan_holds_every_child_once_in_order():
    children = nn.Sequential(nn.Flatten(), LINEAR, nn.BatchNorm1d(2), ACT, nn.Dropout(), LINEAR)._modules
    steps = plan(children)
    runs_of = lambda step: [module for run in step.runs for module in run.modules]  # noqa: E731
    flat = [module for step in steps for module in (runs_of(step) if isinstance(step, Line) else (step,))]
    assert flat == list(children.values())


def test_neighbouring_runs_are_one_step():
    children = nn.Sequential(CONV, NORM, ACT, CONV, NORM, ACT, nn.Dropout(), CONV, NORM)._modules
    assert [len(step.runs) if isinstance(step, Line) else 0 for step in plan(children)] == [2, 0, 1]
