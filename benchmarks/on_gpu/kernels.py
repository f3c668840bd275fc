"""What the device can do, and how near the kernels come that do nothing but move memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import ganvas
from ganvas.ops.selection import choose
from on_gpu import floors
from on_gpu.cases import Remaining, Row
from on_gpu.device import Device
from on_gpu.sides import Side, Sides, relative_errors
from shapes import MapShape
from timing import interleaved
from workloads import batch_norm_leaky_relu_functions, discriminator_loss_functions, random_map


def measure_versions(device: Device, remaining: Remaining) -> Row:
    """What the numbers are true for."""
    triton = None
    try:
        import triton as installed
    except ImportError:
        pass
    else:
        triton = installed.__version__
    return {**device.describe(), "torch": torch.__version__, "triton": triton, "ganvas": ganvas.__version__}


def measure_copy(device: Device, remaining: Remaining, size: int) -> Row:
    """Bytes read and written per second by a copy of ``size`` bytes on the device."""
    source = torch.randn(size // 2, device=device.torch_device).to(torch.bfloat16)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, turns=9, seconds_of=device.seconds)["copy"]
    return {"ms": 1000 * timing.seconds, "bytes_per_second": 2 * source.nbytes / timing.seconds}


def measure_matmul(device: Device, remaining: Remaining, side: int) -> Row:
    """Operations per second of the product of two square bfloat16 matrices of normal values."""
    a, b = (torch.randn(side, side, device=device.torch_device).to(torch.bfloat16) for _ in range(2))
    result = torch.empty_like(a)
    timing = interleaved({"product": lambda: torch.mm(a, b, out=result)}, turns=9, seconds_of=device.seconds)["product"]
    return {"ms": 1000 * timing.seconds, "operations_per_second": 2 * side**3 / timing.seconds}


def measure_batch_norm(device: Device, remaining: Remaining, shape: MapShape, dtype: str) -> Row:
    """BatchNorm + LeakyReLU, forward (nothing kept) and backward by themselves, without running statistics.

    Those change with each forward, and torch's backward refuses to run again after that.
    """
    torch.manual_seed(0)
    x = random_map(shape, getattr(torch, dtype), device.torch_device).requires_grad_()
    grad = random_map(shape, x.dtype, device.torch_device)
    weight, bias = (torch.rand(shape.channels, device=device.torch_device).requires_grad_() for _ in range(2))
    doubled = _double(weight), _double(bias)
    in_torch = batch_norm_leaky_relu_functions(*doubled, running=False)["eager"]
    exact = _batch_norm(in_torch, _double(x), *doubled, grad.double())
    backend, why = _backend("batch_norm_leaky_relu", x)

    def side(function: Callable[[Tensor], Tensor]) -> Side:
        output = function(x)
        return Side(
            {
                "forward": torch.no_grad()(lambda: function(x)),
                "backward": lambda: torch.autograd.grad(output, (x, weight, bias), grad, retain_graph=True),
            },
            relative_errors(_batch_norm(function, x, weight, bias, grad), exact),
        )

    sides = Sides(device, remaining, x.dtype)
    functions = batch_norm_leaky_relu_functions(weight, bias, running=False, backend=backend)
    for name, function in functions.items():
        sides.add(name, functools.partial(side, function))
    exact.clear()  # gigabytes
    floor = {"forward": floors.batch_norm_forward(x.nbytes), "backward": floors.batch_norm_backward(x.nbytes)}
    return {"backend": backend, "why": why, "bytes": x.nbytes, **_timed(sides, floor)}


def measure_discriminator_loss(device: Device, remaining: Remaining, kind: str, count: int) -> Row:
    """Loss, gradients and metrics of so many real and so many generated float32 logits.

    ``call``: ganvas' one call, which has the gradients then, against torch's forward and backward; ``step``: both
    through autograd, which scales ganvas' gradients once more.
    """
    torch.manual_seed(0)
    real, fake = ((torch.randn(count, device=device.torch_device) + 0.5).requires_grad_() for _ in range(2))
    doubled = _double(real), _double(fake)
    exact = _loss(discriminator_loss_functions(kind, doubled[0])["eager"], *doubled)
    backend, why = _backend("discriminator_loss", real)

    def side(name: str, function: Callable[..., tuple[Tensor, ...]]) -> Side:
        step = functools.partial(_loss, function, real, fake)
        call = step if name == "eager" else functools.partial(function, real, fake)
        return Side({"call": call, "step": step}, relative_errors(step(), exact))

    sides = Sides(device, remaining, real.dtype)
    for name, function in discriminator_loss_functions(kind, real, backend).items():
        sides.add(name, functools.partial(side, name, function))
    exact.clear()
    floor = dict.fromkeys(("call", "step"), floors.discriminator_loss(real.nbytes))
    return {"backend": backend, "why": why, "bytes": real.nbytes, **_timed(sides, floor)}


def _timed(sides: Sides, floor: dict[str, floors.Floor]) -> Row:
    for part in floor:
        sides.time(part)
    return {
        **sides.status(),
        "sides": sides.rows,
        "floor": {part: of_part._asdict() for part, of_part in floor.items()},
    }


def _batch_norm(
    function: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
) -> dict[str, Tensor]:
    output = function(x)
    grads = torch.autograd.grad(output, (x, weight, bias), grad)
    return {"output": output.detach(), **dict(zip(("gradient of the input", "gradient of γ", "gradient of β"), grads))}


def _loss(function: Callable[..., tuple[Tensor, ...]], real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    loss, *metrics = function(real, fake)
    of_real, of_fake = torch.autograd.grad(loss, (real, fake))
    results = {"gradient of real": of_real, "gradient of fake": of_fake, "output": loss.detach()}
    return results | {f"metric {index}": metric for index, metric in enumerate(metrics)}


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


def _backend(op: str, tensor: Tensor) -> tuple[str, str | None]:
    """CUDA's where it can run, asked for or not; else the automatic choice, and why."""
    try:
        return choose(op, tensor, "cuda"), None
    except ValueError as error:
        return choose(op, tensor, None), str(error)
