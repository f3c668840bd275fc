"""Optimisers for CUDA graphs: the steps of torch's own, through checkpoints, recoveries and from device to device."""

from __future__ import annotations

import copy
import itertools
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim.lr_scheduler import OneCycleLR

from ganvas.training.checkpoint import Checkpoint, CheckpointStore
from ganvas.training.optimizers import (
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    scale_learning_rates,
)
from ganvas.training.recordable import Recordable

OPTIMIZERS = ("adam", "adamw", "sgd")


KINDS = {
    "plain": {},
    "capturable": {"capturable": True},
    "cycled": {"capturable": True, "cycled_momentum": True},
}


def trained(name, kind, steps=3, **options):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = make_optimizer(name, network, 0.01, weight_decay=0.1, **KINDS[kind], **options)
    train(network, optimizer, steps)
    return network, optimizer


def train(network, optimizer, steps, after_step=lambda: None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(6, 4, generator=generator)).square().sum().backward()
        if isinstance(optimizer, Recordable):
            optimizer.publish()
        optimizer.step()
        after_step()


def through_a_checkpoint(state, folder):
    store = CheckpointStore(folder, "0")
    store.save(Checkpoint(state, 1, 1, True, {}))
    return store.load({})[0].state


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["capturable", "cycled"])
def test_training_is_that_of_the_plain_optimizer(name, kind):
    (network, _), (other, _) = trained(name, kind), trained(name, "plain")
    for ours, theirs in zip(network.parameters(), other.parameters()):
        torch.testing.assert_close(ours, theirs)


def under_one_cycle(name, kind, dtype, steps=40):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)
    optimizer = make_optimizer(name, network, 0.01, weight_decay=0.1, **KINDS[kind])
    schedule = OneCycleLR(optimizer, [0.02] * len(optimizer.param_groups), total_steps=steps)
    with double_inputs() if dtype == torch.float64 else nullcontext():
        train(network, optimizer, steps - 1, schedule.step)
    return network, optimizer


@contextmanager
def double_inputs():
    """The same numbers as in float32."""
    with pytest.MonkeyPatch.context() as patch:
        randn = torch.randn
        patch.setattr(torch, "randn", lambda *sizes, **options: randn(*sizes, **options).double())
        yield


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_and_rate_of_a_schedule_are_followed_as_exactly_as_by_the_plain_optimizer(name):
    (ours, optimizer), (theirs, other), (exact, _) = (
        under_one_cycle(name, kind, dtype)
        for kind, dtype in (("cycled", torch.float32), ("plain", torch.float32), ("plain", torch.float64))
    )
    weights, plain, reference = (parameters_to_vector(n.parameters()).double() for n in (ours, theirs, exact))
    # A rate in float32, and SGD's weights are rounded twice a step.
    assert (weights - reference).norm() <= 3 * (plain - reference).norm()
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in other.param_groups]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("before", "after"), list(itertools.product(KINDS, KINDS)))
def test_state_goes_through_a_checkpoint_to_an_optimizer_of_any_kind(name, before, after, tmp_path):
    network, optimizer = trained(name, before)
    scale_learning_rates([optimizer], 0.3)
    continued, resumed = trained(name, after, steps=0)
    continued.load_state_dict(copy.deepcopy(network.state_dict()))
    load_optimizer_state(resumed, through_a_checkpoint(optimizer.state_dict(), tmp_path))
    assert learning_rate(resumed) == learning_rate(optimizer)
    assert [group.get("capturable") for group in resumed.param_groups] == [
        group.get("capturable") for group in trained(name, after, steps=0)[1].param_groups
    ]
    train(network, optimizer, 2)
    train(continued, resumed, 2)
    for ours, theirs in zip(continued.parameters(), network.parameters()):
        # A rate in float32 differs from one in float64.
        tolerance = 0.0 if before == after else 1e-6
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_parameters_without_a_gradient_stay_as_they_are():
    network, optimizer = trained("adamw", "cycled")
    frozen = network[0].weight
    frozen.grad = None
    before = frozen.clone(), optimizer.state[frozen]["exp_avg"].clone()
    optimizer.publish()
    optimizer.step()
    assert torch.equal(frozen, before[0])
    assert torch.equal(optimizer.state[frozen]["exp_avg"], before[1])


def test_groups_hold_numbers_whatever_a_step_was_recorded_with():
    _, optimizer = trained("adamw", "cycled", beta1=0.8)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.8, 0.999), 0.1)
    with pytest.raises(ValueError, match="closure must be None"):
        optimizer.step(lambda: None)


def test_numbers_are_written_only_when_they_have_changed(monkeypatch):
    _, optimizer = trained("adam", "capturable")
    values, version = optimizer._values, optimizer._values._version
    optimizer.publish()
    assert values._version == version
    scale_learning_rates([optimizer], 0.5)
    optimizer.publish()
    assert values._version == version + 1


def test_state_of_other_groups_is_refused():
    _, optimizer = trained("adam", "capturable")
    state = make_optimizer("adam", nn.Linear(2, 2, bias=False), 0.1).state_dict()
    with pytest.raises(ValueError):
        load_optimizer_state(optimizer, state)


@pytest.mark.parametrize("kind", KINDS)
def test_recovery_scales_each_learning_rate_once(kind):
    _, optimizer = trained("adam", kind)
    scale_learning_rates([optimizer], 0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.005, 0.005])
