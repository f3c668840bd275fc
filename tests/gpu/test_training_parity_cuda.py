"""Some steps of training on a GPU go the way of the CPU's, and of plain torch's on the GPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ganvas
from ganvas.ops import discriminator_loss, generator_loss
from ganvas.ops.backends import triton
from ganvas.training.gan_steps import discriminate_pair, frozen

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
STEPS, BATCH, SIZE, LATENT = 10, 16, 16, 100


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    reason = triton.can_run("conv_bn_leaky_relu", torch.empty(1, device=DEVICE))
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=["triton", "cuda", None], ids=str)
def backend(request, monkeypatch) -> str | None:
    """Triton's convolutions, torch's, or those that are taken unmeasured; CUDA kernels between them."""
    if request.param is None:
        monkeypatch.delenv("GANVAS_BACKEND", raising=False)
    else:
        monkeypatch.setenv("GANVAS_BACKEND", request.param)
    return request.param


class Training:
    """SGD with momentum, in which a difference stays as small as it is, on data that are the same everywhere.

    Args:
        networks: a classifier, or a generator and its discriminator. They are copied.
        dtype: of autocast on the GPU, and of everything on the CPU; float32 and float64 are computed in as they are.
    """

    def __init__(self, networks: Sequence[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.inputs = torch.float64 if dtype is torch.float64 else torch.float32
        self.networks = [
            copy.deepcopy(network).to(device, self.inputs, memory_format=torch.channels_last) for network in networks
        ]
        self.optimizers = [torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.5) for network in self.networks]
        self.random = torch.Generator().manual_seed(3)

    def losses(self) -> Tensor:
        """(STEPS, losses of a step), float64."""
        step = self.classify if len(self.networks) == 1 else self.compete
        return torch.stack([torch.stack([loss.detach().double().cpu() for loss in step()]) for _ in range(STEPS)])

    def state(self) -> dict[str, Tensor]:
        """Parameters and running statistics."""
        return {
            f"{i}.{name}": value.double().cpu()
            for i, network in enumerate(self.networks)
            for name, value in network.state_dict().items()
            if value.is_floating_point()
        }

    def classify(self) -> list[Tensor]:
        labels = torch.randint(0, 10, (BATCH,), generator=self.random)
        images = self.drawn(BATCH, 3, SIZE, SIZE, offset=labels[:, None, None, None] / 5 - 1)
        with self.autocast():
            logits = self.networks[0](images)
        loss = F.cross_entropy(logits.to(self.inputs), labels.to(self.device))
        self.update(0, loss)
        return [loss]

    def compete(self) -> list[Tensor]:
        generator, discriminator = self.networks
        real, latent = self.drawn(BATCH, 3, SIZE, SIZE), self.drawn(BATCH, LATENT)
        with self.autocast():
            fake = generator(latent)
            logits = discriminate_pair(discriminator, real, fake.detach().to(real.dtype), None)
        loss = discriminator_loss(*(of_set.to(self.inputs) for of_set in logits))
        self.update(1, loss)
        with frozen(discriminator):
            with self.autocast():
                logits = discriminator(fake)
            of_generator = generator_loss(logits.to(self.inputs))
            self.update(0, of_generator)
        return [loss, of_generator]

    def drawn(self, *shape: int, offset: Tensor | float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.random) + offset
        return values.to(self.device, self.inputs)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not self.inputs)

    def update(self, index: int, loss: Tensor) -> None:
        self.optimizers[index].zero_grad()
        loss.backward()
        self.optimizers[index].step()


def networks_of(name: str) -> list[nn.Module]:
    torch.manual_seed(0)
    model = ganvas.models.create(name, size=SIZE, channels=3, width=8)
    return list(model) if isinstance(model, tuple) else [model]


def plain(networks: Sequence[nn.Module]) -> list[nn.Module]:
    copies = [copy.deepcopy(network) for network in networks]
    for network in copies:
        ganvas.revert(network)
    return copies


def run(networks: Sequence[nn.Module], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    training = Training(networks, device, dtype)
    return training.losses(), training.state()


def on_cpu(networks: Sequence[nn.Module], dtype: torch.dtype, monkeypatch) -> tuple[Tensor, dict[str, Tensor]]:
    with monkeypatch.context() as patch:
        patch.delenv("GANVAS_BACKEND", raising=False)
        return run(networks, torch.device("cpu"), dtype)


def distance(values: Tensor, others: Tensor) -> float:
    return ((values - others).norm() / (others.norm() + 1e-3)).item()


@pytest.mark.parametrize("name", ["resnet", "dcgan"])
def test_float32_training_is_the_cpus(name, backend, monkeypatch):
    networks = networks_of(name)
    losses, state = run(networks, DEVICE, torch.float32)
    expected, cpus = on_cpu(networks, torch.float32, monkeypatch)
    assert losses.isfinite().all()
    assert not torch.equal(expected[0], expected[-1])
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    for key, value in state.items():
        assert distance(value, cpus[key]) < 1e-3, key


@pytest.mark.parametrize("name", ["resnet", "dcgan"])
def test_bfloat16_training_is_as_near_to_the_exact_one_as_plain_torchs(name, backend, monkeypatch):
    networks = networks_of(name)
    ours, _ = run(networks, DEVICE, torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setenv("GANVAS_BACKEND", "reference")
        torchs, _ = run(plain(networks), DEVICE, torch.bfloat16)
    exact, _ = on_cpu(plain(networks), torch.float64, monkeypatch)
    assert distance(ours, exact) <= 3 * distance(torchs, exact) + torch.finfo(torch.bfloat16).eps
