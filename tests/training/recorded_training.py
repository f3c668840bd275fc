"""A training small enough to compare step by step, recorded and as it is; on the CPU and on a GPU."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ganvas.training.averages import Averages
from ganvas.training.optimizers import make_optimizer
from ganvas.training.step_graph import StepGraph


class RecordedTraining:
    """A network with dropout and BatchNorm under Adam, and a step of it in a StepGraph.

    recorder: called with the device and a generator that the step draws from; None for steps as they are.
    """

    def __init__(self, recorder=None, device="cpu"):
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
        self.network.to(self.device)
        self.optimizer = make_optimizer("adam", self.network, 0.01, capturable=True)
        self.noise = torch.Generator(self.device).manual_seed(1)
        self.recorder = recorder and recorder(self.device, self.noise)
        self.said: list[str] = []
        self.averages = Averages(self.device)
        self.step = StepGraph(
            self.take,
            self.recorder,
            modules=(self.network,),
            optimizers=(self.optimizer,),
            averages=self.averages,
            say=self.said.append,
        )
        torch.manual_seed(2)

    def take(self, inputs, targets, *, noisy=False):
        if noisy:
            inputs = inputs + torch.randn(inputs.shape, generator=self.noise, device=self.device)
        loss = F.cross_entropy(self.network(inputs), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss}

    def state(self):
        return {
            **{f"network {name}": value.clone() for name, value in self.network.state_dict().items()},
            **{f"gradient {name}": value.grad.clone() for name, value in self.network.named_parameters()},
            **{
                f"optimizer {index} {name}": value.clone()
                for index, state in self.optimizer.state_dict()["state"].items()
                for name, value in state.items()
            },
            "sum of losses": self.averages.state_dict()["sums"]["loss"].clone(),
            "number of losses": torch.tensor(self.averages.state_dict()["counts"]["loss"]),
            "noise": self.noise.get_state(),
            "random": torch.get_rng_state(),
            **({"random, GPU": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}),
        }


def assert_same_training(
    recorder, calls, before_call=lambda training, number: None, training=RecordedTraining, device="cpu"
):
    """``calls``: (batch size, options) of each step, taken with ``recorder`` and without one. Returns the first."""
    trainings, losses, states = [training(recorder, device), training(None, device)], [], []
    for one in trainings:
        torch.manual_seed(3)
        losses.append([])
        for number, (size, options) in enumerate(calls):
            before_call(one, number)
            generator = torch.Generator().manual_seed(number)
            inputs = torch.randn(size, 6, generator=generator).to(one.device)
            targets = torch.randint(0, 3, (size,), generator=generator).to(one.device)
            losses[-1].append(one.step(inputs, targets, **options)["loss"].item())
        states.append(one.state())
    assert losses[0] == losses[1]
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []
    return trainings[0]
