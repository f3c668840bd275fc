"""What is timed: the same work as torch eager, as torch.compile and as ganvas. One definition for speed and memory."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ganvas
from cifar_resnet import CifarResNet
from ganvas.training.gan_steps import discriminate_pair, frozen
from shapes import CONVOLUTIONS, LayerShape, MapShape

Call = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """One row of a table: a name, and each candidate's forward and forward + backward."""

    name: str
    forward: dict[str, Call]
    step: dict[str, Call]


def batch_norm_leaky_relu(shape: MapShape, dtype: torch.dtype, *, compiled: bool, training: bool = True) -> Work:
    """BatchNorm + LeakyReLU(0.2) on a channels-last map, forward and backward."""
    x = random_map(shape, dtype).requires_grad_()
    grad = random_map(shape, dtype)
    weight, bias = torch.ones(shape.channels, requires_grad=True), torch.zeros(shape.channels, requires_grad=True)
    candidates = batch_norm_leaky_relu_functions(weight, bias, training=training)

    def step_of(function: Callable[[Tensor], Tensor]) -> Call:
        def step() -> None:
            x.grad = weight.grad = bias.grad = None
            function(x).backward(grad)

        return step

    functions = _with_compiled(candidates, compiled)
    return Work(
        str(shape),
        {name: _without_grad(function, x) for name, function in functions.items()},
        {name: step_of(function) for name, function in functions.items()},
    )


def random_map(shape: MapShape, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Normal values, channels_last."""
    values = torch.randn(shape.batch, shape.size, shape.size, shape.channels, device=device).to(dtype)
    return values.permute(0, 3, 1, 2)


def batch_norm_leaky_relu_functions(
    weight: Tensor, bias: Tensor, *, training: bool = True, running: bool = True, backend: str | None = None
) -> dict[str, Callable[[Tensor], Tensor]]:
    """BatchNorm + LeakyReLU(0.2) in torch and in ganvas, with ``running`` statistics or without."""
    mean = torch.zeros_like(weight, requires_grad=False) if running else None
    var = torch.ones_like(weight, requires_grad=False) if running else None

    def eager(x: Tensor) -> Tensor:
        return F.leaky_relu(F.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-5), 0.2)

    def fused(x: Tensor) -> Tensor:
        return ganvas.ops.batch_norm_leaky_relu(
            x, weight, bias, mean, var, training=training, negative_slope=0.2, backend=backend
        )

    return {"eager": eager, "ganvas": fused}


def discriminator_loss(count: int, kind: str, dtype: torch.dtype, *, compiled: bool) -> Work:
    """A discriminator's loss on ``count`` real and ``count`` fake logits, its gradients and its four logged metrics.

    As for :func:`generator_loss`, ``forward`` builds the graph, and ``step`` has one candidate more: ``floor``.
    """
    logits = _logits(count, dtype, 2)
    return _loss(f"{kind} {count}", discriminator_loss_functions(kind, logits[0]), logits, compiled)


def discriminator_loss_functions(
    kind: str, like: Tensor, backend: str | None = None
) -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]]:
    """The loss and its four logged metrics in torch and in ganvas, of real and fake logits ``like`` those given."""
    ones, zeros = torch.ones_like(like, requires_grad=False), torch.zeros_like(like, requires_grad=False)

    def eager_bce(real: Tensor, fake: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)

    def eager_other(real: Tensor, fake: Tensor) -> Tensor:
        return ganvas.ops.discriminator_loss(real, fake, kind, backend="reference")

    eager_loss = eager_bce if kind == "bce" else eager_other

    def eager(real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
        loss = eager_loss(real, fake)
        with torch.no_grad():
            return loss, real.mean(), fake.mean(), (real > 0).float().mean(), (fake < 0).float().mean()

    def fused(real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
        loss, metrics = ganvas.ops.discriminator_loss(real, fake, kind, return_metrics=True, backend=backend)
        return loss, *metrics

    return {"eager": eager, "ganvas": fused}


def generator_loss(count: int, kind: str, dtype: torch.dtype, *, compiled: bool) -> Work:
    """A generator's loss on ``count`` fake logits (and as many real ones where they are paired), and its gradient."""

    def loss_of(backend: str | None) -> Callable[..., tuple[Tensor]]:
        return lambda fake, real=None: (ganvas.ops.generator_loss(fake, real, kind, backend=backend),)

    candidates = {"eager": loss_of("reference"), "ganvas": loss_of(None)}
    return _loss(f"{kind} {count}", candidates, _logits(count, dtype, 2 if kind == "relativistic" else 1), compiled)


def _logits(count: int, dtype: torch.dtype, sets: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(count).to(dtype).requires_grad_() for _ in range(sets))


def _loss(name: str, candidates: dict[str, Callable], logits: tuple[Tensor, ...], compiled: bool) -> Work:
    def step_of(function: Callable[..., tuple[Tensor, ...]]) -> Call:
        def step() -> object:
            for values in logits:
                values.grad = None
            loss, *metrics = function(*logits)
            loss.backward()
            return metrics

        return step

    functions = _with_compiled(candidates, compiled)
    _ReadyGradients.gradients = tuple(torch.ones_like(values) for values in logits)
    steps = {label: step_of(function) for label, function in functions.items()}
    steps["floor"] = step_of(lambda *logits: (_ReadyGradients.apply(*logits),))
    return Work(name, {label: lambda f=function: f(*logits) for label, function in functions.items()}, steps)


class _ReadyGradients(torch.autograd.Function):
    """Computes nothing: what is left of a step is torch's own graph, which no loss can do without."""

    gradients: tuple[Tensor, ...]

    @staticmethod
    def forward(ctx, *logits):
        return logits[0].new_empty(())

    @staticmethod
    def backward(ctx, grad_loss):
        return _ReadyGradients.gradients


def conv_chain(shape: MapShape, dtype: torch.dtype, *, compiled: bool) -> Work:
    """Four layers of conv 3×3, BatchNorm and LeakyReLU(0.2), as wide as their input."""
    channels = shape.channels
    layers = [layer for _ in range(4) for layer in _conv_bn_leaky_relu(channels)]
    return _network(str(shape), layers, shape, dtype, compiled)


def upsampled_convolution(shape: MapShape, dtype: torch.dtype, *, compiled: bool) -> Work:
    """One layer: nearest-neighbour upsampling, conv 3×3, BatchNorm, LeakyReLU(0.2)."""
    layers = [nn.Upsample(scale_factor=2), *_conv_bn_leaky_relu(shape.channels)]
    return _network(str(shape), layers, shape, dtype, compiled)


def bottleneck(shape: MapShape, dtype: torch.dtype, *, compiled: bool) -> Work:
    """A block of a ResNet: 1×1, 3×3 and 1×1 convolutions with BatchNorm and ReLU, and the input added."""
    return _network(str(shape), [_Bottleneck(shape.channels, shape.channels // 4)], shape, dtype, compiled)


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + x)


def conv_layer(shape: LayerShape) -> list[nn.Module]:
    """The convolution of ``shape`` (after its upsampling), BatchNorm, LeakyReLU(0.2)."""
    channels, size = (shape.in_channels, shape.out_channels), CONVOLUTIONS[shape.kind].kernel_size
    if shape.kind.startswith("transposed"):
        convolution: nn.Module = nn.ConvTranspose2d(*channels, size, stride=2, padding=1, bias=False)
    else:
        stride = 2 if CONVOLUTIONS[shape.kind].scale < 1 else 1
        convolution = nn.Conv2d(*channels, size, stride, padding=(size - 1) // 2, bias=False)
    upsampling = [nn.Upsample(scale_factor=2)] if shape.kind.startswith("upsampled") else []
    return [*upsampling, convolution, nn.BatchNorm2d(shape.out_channels), nn.LeakyReLU(0.2)]


def _conv_bn_leaky_relu(channels: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels), nn.LeakyReLU(0.2)]


def _network(name: str, layers: list[nn.Module], shape: MapShape, dtype: torch.dtype, compiled: bool) -> Work:
    """Forward in evaluation without gradients, and a training step without an optimiser."""
    torch.manual_seed(0)
    plain = nn.Sequential(*layers).to(memory_format=torch.channels_last).to(dtype)
    fused = copy.deepcopy(plain)
    ganvas.convert(fused)
    networks: dict[str, nn.Module] = {"eager": plain, "ganvas": fused}
    if compiled:
        networks["compile"] = torch.compile(copy.deepcopy(plain))
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.no_grad():
        grad = torch.randn_like(plain(x))

    def step_of(network: nn.Module) -> Call:
        def step() -> None:
            network.train()
            x.grad = None
            network.zero_grad()
            network(x).backward(grad)

        return step

    def inference_of(network: nn.Module) -> Call:
        def inference() -> None:
            network.eval()
            with torch.inference_mode():
                network(x)

        return inference

    return Work(
        name,
        {label: inference_of(network) for label, network in networks.items()},
        {label: step_of(network) for label, network in networks.items()},
    )


def training_step(name: str, batch: int, dtype: torch.dtype, *, compiled: bool) -> Work:
    """A whole step of a model: classifier or GAN (one D and one G step), Adam, batch in memory."""
    torch.manual_seed(0)
    candidates = _networks(name)
    if compiled:
        candidates["compile"] = [torch.compile(network) for network in copy.deepcopy(candidates["eager"])]
    return _training(name, batch, dtype, candidates)


def inference(name: str, batch: int, dtype: torch.dtype, *, compiled: bool) -> Work:
    """A classifier in evaluation mode; ``torch.compile`` may fold its weights (``freezing``)."""
    torch.manual_seed(0)
    networks = {label: network.eval() for label, (network,) in _networks(name).items()}
    if compiled:
        networks["compile"] = torch.compile(copy.deepcopy(networks["eager"]), options={"freezing": True})
    return _evaluation(name, batch, dtype, networks)


def compiled_training_step(name: str, batch: int, dtype: torch.dtype) -> Work:
    """The step of :func:`training_step`, of ganvas' networks and of the same under ``torch.compile``."""
    torch.manual_seed(0)
    networks = _networks(name)["ganvas"]
    compiled = [torch.compile(network) for network in copy.deepcopy(networks)]
    return _training(name, batch, dtype, {"ganvas": networks, "compiled": compiled})


def compiled_inference(name: str, batch: int, dtype: torch.dtype) -> Work:
    """Likewise, of :func:`inference`."""
    torch.manual_seed(0)
    (network,) = _networks(name)["ganvas"]
    network.eval()
    return _evaluation(name, batch, dtype, {"ganvas": network, "compiled": torch.compile(copy.deepcopy(network))})


def _training(name: str, batch: int, dtype: torch.dtype, candidates: dict[str, list[Any]]) -> Work:
    images = _images(name, batch)
    labels = torch.arange(batch) % 10 if len(candidates["ganvas"]) == 1 else None
    steps = {label: TrainingStep(candidate, dtype) for label, candidate in candidates.items()}
    calls: dict[str, Call] = {label: functools.partial(step, images, labels) for label, step in steps.items()}
    return Work(_title(name, batch), {}, calls)


def _evaluation(name: str, batch: int, dtype: torch.dtype, networks: dict[str, Any]) -> Work:
    images = _images(name, batch)

    def inference_of(network: nn.Module) -> Call:
        def call() -> None:
            with torch.inference_mode(), autocast("cpu", dtype):
                network(images)

        return call

    return Work(_title(name, batch), {label: inference_of(network) for label, network in networks.items()}, {})


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """To ``dtype``, none to float32."""
    return torch.autocast(device, dtype, enabled=dtype is not torch.float32)


def _size_and_channels(name: str) -> tuple[int, int]:
    return (28, 1) if name == "mlp_conv_gan" else (64, 3) if name == "dcgan" else (32, 3)


def _title(name: str, batch: int) -> str:
    size, _ = _size_and_channels(name)
    return f"{name} {size}x{size} batch {batch}"


def _images(name: str, batch: int) -> Tensor:
    size, channels = _size_and_channels(name)
    return torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)


def _networks(name: str) -> dict[str, list[nn.Module]]:
    """Of a model in the registry, or ``resnet20``, which is written in torch and converted."""
    if name == "resnet20":
        plain = CifarResNet(blocks=3, width=16).to(memory_format=torch.channels_last)
        converted = copy.deepcopy(plain)
        ganvas.convert(converted)
        return {"eager": [plain], "ganvas": [converted]}
    size, channels = _size_and_channels(name)
    networks = registered_networks(name, size=size, channels=channels)
    return {"eager": plain_networks(networks), "ganvas": networks}


def registered_networks(name: str, **options: Any) -> list[nn.Module]:
    """A classifier, or a generator and its discriminator, channels_last."""
    model = ganvas.models.create(name, **options)
    networks = model if isinstance(model, tuple) else (model,)
    return [network.to(memory_format=torch.channels_last) for network in networks]


def plain_networks(networks: Sequence[nn.Module]) -> list[nn.Module]:
    """Copies of plain torch modules."""
    copies = [copy.deepcopy(network) for network in networks]
    for network in copies:
        ganvas.revert(network)
    return copies


class TrainingStep:
    """A classifier's step, or one of a discriminator and one of its generator, with Adam under autocast.

    ``step(images, labels)`` returns the losses by name. It can be captured in a CUDA graph.

    Args:
        networks: a classifier, or a generator and its discriminator, of ganvas, plain torch or compiled.
        dtype: autocast's; float32 for none.
    """

    def __init__(self, networks: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.networks = list(networks)
        self._device = next(networks[0].parameters()).device
        self._dtype = dtype
        adam = functools.partial(torch.optim.Adam, fused=True, capturable=self._device.type == "cuda")
        options: dict[str, Any] = {} if len(networks) == 1 else {"lr": 2e-4, "betas": (0.5, 0.999)}
        self.optimizers = [adam(network.parameters(), **options) for network in self.networks]
        fused = any(isinstance(module, ganvas.nn.FusedSequential) for module in networks[-1].modules())
        self._loss_backend = None if fused else "reference"
        self._take = self._classifier if len(networks) == 1 else self._gan

    def __call__(self, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        return self._take(images, labels)

    def _classifier(self, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        with autocast(self._device.type, self._dtype):
            loss = F.cross_entropy(self.networks[0](images), labels)
        self._update(0, loss)
        return {"loss": loss}

    def _gan(self, real: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        generator, discriminator = self.networks
        given = () if labels is None else (labels,)
        with autocast(self._device.type, self._dtype):
            fake = generator(torch.randn(len(real), 100, device=self._device), *given)
            # Plain networks know no statistics groups: two forwards, as one writes it in torch.
            logits = discriminate_pair(discriminator, real, fake.detach().to(real.dtype), labels)
            loss = ganvas.ops.discriminator_loss(*logits, backend=self._loss_backend)
        self._update(1, loss)
        with frozen(discriminator):
            with autocast(self._device.type, self._dtype):
                of_generator = ganvas.ops.generator_loss(discriminator(fake, *given), backend=self._loss_backend)
            self._update(0, of_generator)
        return {"discriminator_loss": loss, "generator_loss": of_generator}

    def _update(self, index: int, loss: Tensor) -> None:
        self.optimizers[index].zero_grad()
        loss.backward()
        self.optimizers[index].step()


def _with_compiled(functions: dict[str, Callable], compiled: bool) -> dict[str, Callable]:
    if compiled:
        torch._dynamo.reset()
        functions["compile"] = torch.compile(functions["eager"], dynamic=False)
    return functions


def _without_grad(function: Callable, *arguments: Tensor) -> Call:
    def call() -> None:
        with torch.no_grad():
            function(*arguments)

    return call
