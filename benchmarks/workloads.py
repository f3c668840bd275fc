"""What is timed: the same work as torch eager, as torch.compile and as ganvas. One definition for speed and memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ganvas
from shapes import MapShape

Call = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """One row of a table: a name, and each candidate's forward and forward + backward."""

    name: str
    forward: dict[str, Call]
    step: dict[str, Call]


def batch_norm_leaky_relu(shape: MapShape, dtype: torch.dtype, *, compiled: bool, training: bool = True) -> Work:
    """BatchNorm + LeakyReLU(0.2) on a channels-last map, forward and backward."""
    channels = shape.channels
    x = torch.randn(shape.batch, channels, shape.size, shape.size).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(x.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(channels, requires_grad=True), torch.zeros(channels, requires_grad=True)
    mean, var = torch.zeros(channels), torch.ones(channels)

    def eager(x: Tensor) -> Tensor:
        return F.leaky_relu(F.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-5), 0.2)

    def fused(x: Tensor) -> Tensor:
        return ganvas.ops.batch_norm_leaky_relu(x, weight, bias, mean, var, training=training, negative_slope=0.2)

    def step_of(function: Callable[[Tensor], Tensor]) -> Call:
        def step() -> None:
            x.grad = weight.grad = bias.grad = None
            function(x).backward(grad)

        return step

    functions = _with_compiled({"eager": eager, "ganvas": fused}, compiled)
    return Work(
        str(shape),
        {name: _without_grad(function, x) for name, function in functions.items()},
        {name: step_of(function) for name, function in functions.items()},
    )


def discriminator_loss(count: int, kind: str, dtype: torch.dtype, *, compiled: bool) -> Work:
    """A discriminator's loss on ``count`` real and ``count`` fake logits, its gradients and its four logged metrics.

    As for :func:`generator_loss`, ``forward`` builds the graph, and ``step`` has one candidate more: ``floor``.
    """
    ones, zeros = torch.ones(count, dtype=dtype), torch.zeros(count, dtype=dtype)

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
        loss, metrics = ganvas.ops.discriminator_loss(real, fake, kind, return_metrics=True)
        return loss, *metrics

    return _loss(f"{kind} {count}", {"eager": eager, "ganvas": fused}, _logits(count, dtype, 2), compiled)


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
        return torch.empty(())

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
    """A whole step of a model in the registry: classifier or GAN (one D and one G step), Adam, batch in memory."""
    torch.manual_seed(0)
    makers = {"cnn_32_64": _classifier_step, "resnet": _classifier_step, "mlp_conv_gan": _gan_step, "dcgan": _gan_step}
    options = {
        "cnn_32_64": {"channels": 3, "size": 32},
        "resnet": {"channels": 3, "size": 32},
        "mlp_conv_gan": {"size": 28, "channels": 1},
        "dcgan": {"size": 64, "channels": 3},
    }[name]
    model = ganvas.models.create(name, **options)
    plain = copy.deepcopy(model)
    for module in plain if isinstance(plain, tuple) else (plain,):
        ganvas.revert(module)
        module.to(memory_format=torch.channels_last)
    candidates = {"eager": plain, "ganvas": model}
    if compiled:
        copies = copy.deepcopy(plain)
        candidates["compile"] = (
            tuple(map(torch.compile, copies)) if isinstance(copies, tuple) else torch.compile(copies)
        )
    images = torch.randn(batch, options["channels"], options["size"], options["size"])
    images = images.contiguous(memory_format=torch.channels_last)
    make = makers[name]
    steps = {label: make(candidate, images, dtype) for label, candidate in candidates.items()}
    return Work(f"{name} {options['size']}x{options['size']} batch {batch}", {}, steps)


def _classifier_step(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Call:
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    labels = torch.arange(len(images)) % 10

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _gan_step(networks: tuple[nn.Module, nn.Module], real: Tensor, dtype: torch.dtype) -> Call:
    generator, discriminator = networks
    optimizers = [torch.optim.Adam(n.parameters(), 2e-4, betas=(0.5, 0.999), fused=True) for n in networks]
    latent = torch.randn(len(real), 100)
    # The plain networks know no statistics groups: two forwards, as one writes it in torch.
    fused = isinstance(next(iter(discriminator.children()), None), ganvas.nn.FusedSequential)
    loss_backend = None if fused else "reference"

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            fake = generator(latent)
            if fused:
                with ganvas.nn.statistics_groups(discriminator, 2):
                    real_logits, fake_logits = discriminator(torch.cat([real, fake.detach().to(real.dtype)])).chunk(2)
            else:
                real_logits, fake_logits = discriminator(real), discriminator(fake.detach())
            loss = ganvas.ops.discriminator_loss(real_logits, fake_logits, backend=loss_backend)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        discriminator.requires_grad_(False)
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            loss = ganvas.ops.generator_loss(discriminator(fake), backend=loss_backend)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        discriminator.requires_grad_(True)

    return step


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
