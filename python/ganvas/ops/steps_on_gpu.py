"""The steps by which a GPU is asked whether an op's CUDA kernel is right and not slower: forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ganvas.ops import tuning
from ganvas.ops.backends.gpu.measure import device_name
from ganvas.ops.backends.trial import Way
from ganvas.ops.batch_norm_leaky_relu import batch_norm_leaky_relu
from ganvas.ops.gan_loss import discriminator_loss, generator_loss
from ganvas.ops.selection import StepOnGPU, steps_on_gpu

_MOST_BYTES = 64 * 2**20  # of a tensor that is measured where the given one is larger


def _batch_norm_leaky_relu(input: Tensor) -> StepOnGPU:
    batch, channels, *sides = input.shape
    bytes_of_one = max(1, input.element_size() * channels * torch.Size(sides).numel())
    batch = tuning.power_of_two(min(batch, _MOST_BYTES // bytes_of_one))
    if batch * torch.Size(sides).numel() == 1:
        batch = 2  # statistics of one value are no statistics

    def ways() -> tuple[Way, Way]:
        uniform = _uniform(input)
        x, grad = uniform(batch, channels, *sides), uniform(batch, channels, *sides)
        if x.dim() == 4:
            x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        weight, bias = (uniform(channels).float() for _ in range(2))

        def way(backend: str) -> Way:
            def output(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return batch_norm_leaky_relu(
                    x, weight, bias, None, None, training=True, negative_slope=0.2, backend=backend
                )

            return lambda: _step(output, (x, weight, bias), grad)

        return way("cuda"), way("reference")

    height, width = (*sides, 1, 1)[:2]
    return StepOnGPU(_case("batch_norm_leaky_relu", input, batch, channels, height, width), ways)


def _discriminator_loss(logits: Tensor) -> StepOnGPU:
    return _loss("discriminator_loss", logits, discriminator_loss, 2)


def _generator_loss(logits: Tensor) -> StepOnGPU:
    return _loss("generator_loss", logits, generator_loss, 1)


def _loss(name: str, logits: Tensor, loss: Callable[..., Tensor], arguments: int) -> StepOnGPU:
    count = tuning.power_of_two(min(logits.numel(), _MOST_BYTES // logits.element_size()))

    def ways() -> tuple[Way, Way]:
        uniform = _uniform(logits)
        values, grad = [uniform(count) for _ in range(arguments)], logits.new_ones(())

        def way(backend: str) -> Way:
            return lambda: _step(lambda *given: loss(*given, kind="bce", backend=backend), values, grad)

        return way("cuda"), way("reference")

    return StepOnGPU(_case(name, logits, count, 1, 1, 1), ways)


def _step(run: Callable[..., Tensor], inputs: Any, grad: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = run(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, grad)


def _case(op: str, like: Tensor, batch: int, channels: int, height: int, width: int) -> tuning.Case:
    dtype, device = str(like.dtype).removeprefix("torch."), device_name(like.device.index)
    return tuning.Case("step", op, dtype, device, 0, batch, channels, channels, height, width)


def _uniform(like: Tensor) -> Callable[..., Tensor]:
    generator = torch.Generator(like.device).manual_seed(0)
    options: Any = {"dtype": like.dtype, "device": like.device}
    return lambda *shape: torch.empty(shape, **options).uniform_(-1, 1, generator=generator)


steps_on_gpu["batch_norm_leaky_relu"] = _batch_norm_leaky_relu
steps_on_gpu["discriminator_loss"] = _discriminator_loss
steps_on_gpu["generator_loss"] = _generator_loss
