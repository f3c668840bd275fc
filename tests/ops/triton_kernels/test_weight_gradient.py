"""The Triton kernel of the weight gradient: in the interpreter without a GPU, each of its configurations on one."""

from __future__ import annotations

import itertools

import pytest
import torch
from fences import fenced
from gathers import CONVOLUTIONS, weight_shape
from torch import Tensor

from ganvas.ops.backends.triton import tf32, weight_gradient
from ganvas.ops.backends.triton.precision import uses_tf32
from ganvas.ops.backends.triton.weight_gradient import Configuration, backward_weight, configurations
from ganvas.ops.convolution import Geometry, convolve_backward
from ganvas.ops.pending import Pending, PendingGradient

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHANNELS = [(1, 3), (3, 16), (5, 33), (16, 5), (33, 1)]
OPERANDS = list(itertools.product(("stored", "pending", "activation_first"), repeat=2))  # the input, the gradient
MANY_PARTS = Configuration(4, 8, 16, 16, 4, 2, 64)


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(weight_gradient, "LEAST_STEPS", 1)


class Case:
    """A convolution's weight, input and gradient, and what torch makes of them."""

    def __init__(
        self, name: str, device: torch.device, dtype: torch.dtype = torch.float32, input: str = "stored",
        grad: str = "stored", channels: tuple[int, int] = (5, 9), batch: int = 4, groups: int = 2,
        size: tuple[int, int] = (5, 4), slopes: tuple[float, float] = (0.2, 0.1), geometry: Geometry | None = None,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.geometry, kernel = CONVOLUTIONS[name]
        if geometry is not None:
            self.geometry = geometry
        self.device, self.dtype, self.groups = device, dtype, groups
        self.weight = torch.randn(weight_shape(self.geometry, kernel, *channels), device=device)
        stored = self.pixels(torch.Size((batch, channels[0], *size)))
        self.input = Pending(stored)
        if input != "stored":
            scale, shift = self.per_channel(channels[0]), self.per_channel(channels[0])
            self.input = Pending(
                stored, scale, shift, negative_slope=slopes[0], activation_first=input == "activation_first"
            )
        self.grad: Tensor | PendingGradient = self.pixels(self.geometry.output_shape(stored.shape, self.weight.shape))
        if grad != "stored":
            self.grad = PendingGradient(
                self.grad, self.pixels(self.grad.shape), *(self.per_channel(channels[1]) for _ in range(3)),
                slopes[1], grad == "activation_first",
            )  # fmt: skip

    def pixels(self, shape: torch.Size) -> Tensor:
        values = torch.randn(shape, device=self.device).to(self.dtype)
        return values.contiguous(memory_format=torch.channels_last)

    def per_channel(self, channels: int) -> Tensor:
        return torch.randn(self.groups, channels, device=self.device)

    @property
    def configurations(self) -> list[Configuration]:
        return configurations(self.geometry, self.weight.shape, self.input.stored.shape, self.dtype)

    def ours(self, configuration: Configuration | None = None) -> Tensor:
        return backward_weight(self.geometry, self.grad, self.weight, self.input, configuration=configuration)

    def torchs(self, dtype: torch.dtype, storage: torch.dtype) -> Tensor:
        """Computed in ``dtype``, with operands and result in ``storage``; rounded to TF32 where that is allowed."""
        operands = self._gradient(dtype).to(storage), self._activation(dtype).to(storage)
        if storage is torch.float32 and uses_tf32():
            operands = tf32.rounded(operands[0]), tf32.rounded(operands[1])
        return convolve_backward(*operands, self.weight.to(storage), self.geometry, (False, True))[1]

    def exact(self) -> Tensor:
        return self.torchs(torch.float64, torch.float64)

    def check(self, accuracy, configuration: Configuration | None = None) -> None:
        ours, exact = self.ours(configuration), self.exact()
        assert ours.dtype is torch.float32
        assert ours.stride() == self.weight.stride()
        # One rounding of the pixels' dtype: a sum of few terms may have lost its error by chance when torch stored it.
        terms = exact * (torch.finfo(self.dtype).eps / torch.finfo(ours.dtype).eps)
        accuracy.check(str(configuration), ours, exact, self.torchs(torch.float32, self.dtype), exact, 3.0, terms)

    def _activation(self, dtype: torch.dtype) -> Tensor:
        x = self.input.stored.to(dtype)
        if self.input.scale is None:
            return x
        scale, shift = (self._by_image(values, dtype) for values in self.input[1:3])
        if self.input.activation_first:
            return scale * _leaky_relu(x, self.input.negative_slope) + shift
        return _leaky_relu(scale * x + shift, self.input.negative_slope)

    def _gradient(self, dtype: torch.dtype) -> Tensor:
        if isinstance(self.grad, Tensor):
            return self.grad.to(dtype)
        grad, x = self.grad.grad.to(dtype), self.grad.stored.to(dtype)
        alpha, beta, delta = (self._by_image(values, dtype) for values in self.grad[2:5])
        if not self.grad.activation_first:
            return alpha * grad + beta * x + delta
        slope = self.grad.negative_slope
        return (alpha * grad + beta * _leaky_relu(x, slope) + delta) * torch.where(x > 0, 1.0, slope).to(dtype)

    def _by_image(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype).repeat_interleave(len(self.input.stored) // self.groups, 0)[:, :, None, None]


def _leaky_relu(x: Tensor, negative_slope: float) -> Tensor:
    return torch.where(x > 0, x, negative_slope * x)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_convolution_is_as_accurate_as_torchs(accuracy, device, name):
    i = list(CONVOLUTIONS).index(name)
    Case(name, device, DTYPES[i % 3], *OPERANDS[i % 9], CHANNELS[i % 5], size=(5 + i % 2, 4)).check(accuracy)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_convolution_of_every_operand_is_as_accurate_as_torchs(accuracy, device, name, dtype):
    sizes = itertools.cycle([(8, 5), (5, 9)])
    for (operands, channels), size in zip(itertools.product(OPERANDS, CHANNELS), sizes):
        Case(name, device, dtype, *operands, channels, batch=2, size=size).check(accuracy)


@pytest.mark.parametrize(("input", "grad"), OPERANDS)
def test_every_operand_is_as_accurate_as_torchs(accuracy, device, input, grad):
    for dtype in DTYPES:
        Case("4x4_stride2", device, dtype, input, grad).check(accuracy, MANY_PARTS)


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0, 1.5, -0.5])
@pytest.mark.parametrize("kind", ["pending", "activation_first"])
def test_every_slope(accuracy, device, slope, kind):
    Case("3x3", device, torch.float32, kind, kind, slopes=(slope, slope)).check(accuracy)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("input", "grad"), [("stored", "pending"), ("pending", "stored"), ("pending", "pending")])
def test_every_image_has_the_coefficients_of_its_group(accuracy, device, groups, input, grad):
    case = Case("4x4_stride2", device, torch.float32, input, grad, batch=6, groups=groups)
    case.check(accuracy)
    case.check(accuracy, MANY_PARTS)


def _wide_and_narrow(device: torch.device) -> list[Case]:
    """Cases of which the lists of configurations differ, each with more than one tile of any."""
    shapes = [("3x3", (3, 70)), ("4x4_stride2", (33, 129)), ("1x1", (520, 129)), ("4x4_transposed", (17, 33))]
    return [
        Case(name, device, dtype, "pending", grad, channels, batch=2, size=(4, 3))
        for (name, channels), dtype, grad in itertools.product(shapes, DTYPES, ("pending", "activation_first"))
    ]


def test_a_sample_of_the_configurations_is_as_accurate_as_torchs(accuracy, device):
    for i, case in enumerate(_wide_and_narrow(device)[::5]):
        case.check(accuracy, case.configurations[i % len(case.configurations)])


@pytest.mark.exhaustive
def test_every_configuration_is_as_accurate_as_torchs(accuracy, device):
    for case in _wide_and_narrow(device):
        for configuration in case.configurations:
            case.check(accuracy, configuration)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; torch finds none here")
def test_every_configuration_on_a_gpu_is_as_accurate_as_torchs(accuracy, device):
    shapes = [(3, 64), (32, 32), (64, 64), (96, 160), (256, 136)]
    for name, dtype, channels, operands in itertools.product(CONVOLUTIONS, DTYPES, shapes, OPERANDS[::4]):
        case = Case(name, device, dtype, *operands, channels, batch=16, size=(17, 18))
        for configuration in case.configurations:
            case.check(accuracy, configuration)


def test_configurations_are_few_and_differ():
    for (geometry, kernel), (n, m) in itertools.product(CONVOLUTIONS.values(), [(1, 1), (3, 64), (64, 64), (512, 512)]):
        shape = weight_shape(geometry, kernel, n, m)
        found = configurations(geometry, shape, torch.Size((8, n, 16, 16)), torch.bfloat16)
        assert 1 <= len(found) == len(set(found)) <= 6
        for tile in found:
            assert min(tile.block_taps * tile.block_in, tile.block_out, tile.block_pixels) >= 16
            assert tile.block_taps * tile.block_in <= 128
            assert tile.block_out <= 128


@pytest.mark.parametrize("operand", ["stored", "pending"])
def test_tf32_is_rounded_to_and_not_cut_off(accuracy, device, operand):
    case = Case("3x3", device, torch.float32, operand, operand, channels=(9, 17))
    case.check(accuracy)
    exact = case.ours()
    torch.backends.cudnn.allow_tf32 = True
    case.check(accuracy)
    assert not torch.equal(case.ours(), exact)


def test_channels_last_weights_have_channels_last_gradients(accuracy, device):
    for name in ("3x3", "4x4_transposed"):
        case = Case(name, device)
        case.weight = case.weight.contiguous(memory_format=torch.channels_last)
        case.check(accuracy)


@pytest.mark.parametrize("name", ["3x3", "4x4_stride2", "4x4_transposed", "3x3_upsampled"])
def test_no_images_have_no_gradient(device, name):
    assert torch.equal(
        *(t.cpu() for t in (Case(name, device, batch=0).ours(), torch.zeros_like(Case(name, device).weight)))
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("name", ["1x1_stride2", "3x3_transposed_output_padding", "4x4_transposed", "3x3_upsampled"])
@pytest.mark.parametrize("channels", [(1, 1), (3, 16)])
def test_the_smallest_images(accuracy, device, name, size, channels):
    Case(name, device, torch.float32, "pending", "pending", channels, size=size).check(accuracy)


def test_phases_without_taps_or_pixels(accuracy, device):
    spread = Geometry(stride=(2, 2), transposed=True)
    Case("1x1", device, geometry=spread, size=(1, 3)).check(accuracy)
    Case("3x3", device, geometry=spread._replace(padding=(1, 1)), size=(1, 3)).check(accuracy)
    Case("1x1", device, geometry=spread._replace(stride=(4, 3)), size=(2, 3)).check(accuracy, MANY_PARTS)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("operand", ["stored", "pending", "activation_first"])
@pytest.mark.parametrize(("bad", "dtype"), list(zip([float("nan"), float("inf"), -float("inf")], DTYPES)))
def test_what_is_not_finite_spreads_as_it_does_in_torch(device, operand, bad, dtype):
    for of_input in (True, False):
        case = Case("3x3_padding2", device, dtype, operand, operand, batch=2)
        pixels = case.input.stored if of_input else case.grad if isinstance(case.grad, Tensor) else case.grad.grad
        pixels[1, 2, 3, 3] = bad
        assert torch.equal(case.ours().isfinite(), case.exact().isfinite())


def test_pixels_that_are_not_there_are_not_infinite(accuracy, device):
    case = Case("1x1", device, torch.float16, "pending", "pending", batch=2)
    case.grad.stored.fill_(1000.0)
    case.grad.beta.fill_(-100.0)
    case.grad.delta.fill_(100_000.0)  # more than float16 has, unlike the sum
    case.check(accuracy)


def test_relu_of_minus_infinity_is_zero(device):
    case = Case("1x1", device, torch.float32, "pending", "stored", slopes=(0.0, 0.0))
    case.input.stored[1, 2, 3, 3] = -float("inf") * case.input.scale[0, 2].sign()
    assert case.ours().isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_arguments_give_the_same_bits(device, dtype):
    case = Case("4x4_stride2", device, dtype, "pending", "pending")
    first, *others = (case.ours(MANY_PARTS) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", ["4x4_stride2", "3x3_upsampled"])
def test_offsets_beyond_31_bits_find_the_same_pixels(device, monkeypatch, name):
    case = Case(name, device, torch.float32, "pending", "pending", batch=6, groups=2)
    narrow = [case.ours(), case.ours(MANY_PARTS)]
    monkeypatch.setattr(weight_gradient, "LEAST_WIDE_SPAN", 0)
    assert all(map(torch.equal, narrow, [case.ours(), case.ours(MANY_PARTS)]))


def test_partial_sums_are_bounded(accuracy, device, monkeypatch):
    case = Case("1x1", device, torch.float32, "pending", "pending", batch=8)
    parts, empty = [], torch.empty

    def recorded(shape, **options):
        if len(shape) == 5:
            parts.append(shape[0])
        return empty(shape, **options)

    monkeypatch.setattr(torch, "empty", recorded)
    case.ours(MANY_PARTS)
    monkeypatch.setattr(weight_gradient, "MOST_PARTIAL_BYTES", 3 * 2 * 4 * case.weight.numel())
    case.ours(MANY_PARTS)
    monkeypatch.setattr(weight_gradient, "MOST_PARTIAL_BYTES", 1)
    case.ours(MANY_PARTS)
    assert parts[0] > 6
    assert parts[1:] == [6, 2]  # three, and one, of each of two groups
    case.check(accuracy, MANY_PARTS)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(
    "name", ["1x1_stride2", "3x3", "4x4_stride2", "4x4_padding0", "4x4_transposed", "3x3_upsampled"]
)
def test_nothing_beside_the_tensors_is_touched_and_every_sum_is_written(device, monkeypatch, name, at_end):
    if device.type != "cpu":
        pytest.skip("memory is fenced on the CPU only")
    case = Case(name, device, torch.float32, "pending", "activation_first", channels=(5, 17), batch=2, groups=2)
    expected = case.ours()
    empty = torch.empty

    def fenced_empty(shape, **options):
        return fenced(empty(shape, **options).fill_(float("nan")), at_end)

    case.input = Pending(*(fenced(t, at_end) for t in case.input[:3]), *case.input[3:])
    case.grad = PendingGradient(*(fenced(t, at_end) for t in case.grad[:5]), *case.grad[5:])
    monkeypatch.setattr(torch, "empty", fenced_empty)
    assert torch.equal(case.ours(), expected)


def _changed(case: Case, **changes) -> dict:
    arguments = {
        "geometry": case.geometry, "grad_output": case.grad, "weight": case.weight, "input": case.input
    }  # fmt: skip
    return arguments | changes


def test_bad_arguments_are_named(device):
    case = Case("3x3", device, torch.float32, "pending", "pending")
    grad, stored = case.grad.grad, case.input.stored
    double = Pending(stored.double())
    bad = [
        ({"geometry": case.geometry._replace(groups=2)}, ValueError, r"geometry must have groups=1; got 2"),
        ({"geometry": Geometry((5, 5), transposed=True)}, ValueError, r"geometry.stride must be at most 4"),
        ({"input": double}, TypeError, r"input must be float32, bfloat16 or float16; got torch.float64"),
        ({"input": Pending(stored[:, :2])}, ValueError, r"input must be \(N, Cin, H, W\)"),
        ({"input": Pending(stored.contiguous())}, ValueError, r"input must be channels_last"),
        ({"grad_output": grad.half()}, TypeError, r"grad_output must be of the input's dtype"),
        (
            {"grad_output": grad[:, :, 1:]},
            ValueError,
            r"grad_output must have shape \(4, 9, 5, 4\); got",
        ),
        ({"grad_output": grad.contiguous()}, ValueError, r"grad_output must be channels_last"),
        ({"grad_output": case.grad._replace(stored=grad[:2])}, ValueError, r"grad_output.stored must have shape"),
        (
            {"grad_output": case.grad._replace(alpha=case.grad.alpha[:1])},
            ValueError,
            r"the input's 2 groups; got 1",
        ),
        (
            {"input": case.input._replace(stored=stored[:3]), "grad_output": grad[:3]},
            ValueError,
            r"the batch of 3",
        ),
    ]
    for changes, error, message in bad:
        with pytest.raises(error, match=message):
            backward_weight(**_changed(case, **changes))
    with pytest.raises(ValueError, match="direction must be 'backward_weight'; got 'forward'"):
        configurations(case.geometry, case.weight.shape, stored.shape, stored.dtype, "forward")
