"""Learning rates as tensors, for CUDA graphs: they go through checkpoints, recoveries and from device to device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ganvas.training.checkpoint import Checkpoint, CheckpointStore
from ganvas.training.optimizers import (
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    scale_learning_rates,
)

OPTIMIZERS = ("adam", "adamw", "sgd")


def trained(name, capturable, steps=3, **options):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = make_optimizer(name, network, 0.01, weight_decay=0.1, capturable=capturable, **options)
    train(network, optimizer, steps)
    return network, optimizer


def train(network, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(6, 4, generator=generator)).square().sum().backward()
        optimizer.step()


def through_a_checkpoint(state, folder):
    store = CheckpointStore(folder, "0")
    store.save(Checkpoint(state, 1, 1, True, {}))
    return store.load({})[0].state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tensors_as_learning_rates_train_like_numbers(name):
    (network, _), (other, _) = trained(name, True), trained(name, False)
    for ours, theirs in zip(network.parameters(), other.parameters()):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True), (False, False)])
def test_state_goes_through_a_checkpoint_to_an_optimizer_of_either_kind(name, before, after, tmp_path):
    network, optimizer = trained(name, before)
    scale_learning_rates([optimizer], 0.3)
    continued, resumed = trained(name, after, steps=0)
    continued.load_state_dict(copy.deepcopy(network.state_dict()))
    rates = [group["lr"] for group in resumed.param_groups]
    load_optimizer_state(resumed, through_a_checkpoint(optimizer_state(optimizer), tmp_path))
    assert learning_rate(resumed) == pytest.approx(learning_rate(optimizer), rel=1e-7)
    for group, rate in zip(resumed.param_groups, rates):
        assert isinstance(group["lr"], torch.Tensor) == after
        assert not after or group["lr"] is rate
        assert group.get("capturable", after) == after
    train(network, optimizer, 2)
    train(continued, resumed, 2)
    for ours, theirs in zip(continued.parameters(), network.parameters()):
        # A rate in float32 differs from one in float64.
        tolerance = 0.0 if before == after else 1e-6
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_state_holds_numbers_that_any_device_reads():
    _, optimizer = trained("adam", True)
    assert [type(group["lr"]) for group in optimizer_state(optimizer)["param_groups"]] == [float, float]
    assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)


def test_state_of_other_groups_is_refused():
    _, optimizer = trained("adam", True)
    state = optimizer_state(make_optimizer("adam", nn.Linear(2, 2, bias=False), 0.1))
    with pytest.raises(ValueError):
        load_optimizer_state(optimizer, state)


@pytest.mark.parametrize("capturable", [True, False])
def test_recovery_scales_each_learning_rate_once_and_in_place(capturable):
    _, optimizer = trained("adam", capturable)
    rates = [group["lr"] for group in optimizer.param_groups]
    scale_learning_rates([optimizer], 0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.005, 0.005])
    assert not capturable or all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates))
