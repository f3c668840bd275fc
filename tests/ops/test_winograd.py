"""The native 3×3 convolutions against float64, beside torch's own, with every kind of pending activation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import native_convolutions
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from instruction_sets import multiplies_by, passes, with_lesser_instruction_sets
from native_convolutions import KINDS, Arguments, kernels, layer_by_layer
from torch import Tensor

pytest.importorskip("ganvas._native")

from ganvas import _native as native
from ganvas.ops.backends.cpu import winograd
from ganvas.ops.backends.cpu.kernels import NativeConvolution
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending

# The floor of the tolerance: how many roundings of float32 (eps) a result may be off, measured at what its terms add up
# to when they do not cancel. An output of F(4×4, 3×3) is made of larger terms than a direct convolution's: with the
# matrices A, B and G of csrc/cpu/winograd_transforms.h and independent pixels and weights, the mean over outputs i of
# Σ_f A_if²·|B_f|²·|G_f|² / 3 is 5.02, along each of two axes, so their root mean square is 5.02 times as large. The
# weight's gradient has the same factor. Twice (gradients: three times) torch's own error comes on top.
GROWTH = 5.02
# A factor that is an integer of a largest 8191 (of the input) or 4095 (of the weight, or the gradient) is off by 1/√12
# of one, root mean square, and the largest factor of a tile, a column or a run of tiles is about three times the root
# mean square.
INTEGER_ROUNDING = 3 * (8191**-2 + 4095**-2) ** 0.5 / 12**0.5
DTYPES = (torch.float32, torch.bfloat16)
CHANNELS = (1, 3, 8, 16, 17, 31, 33, 64)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """Small tensors: more would only wait for each other."""
    threads(1)


@dataclass(frozen=True)
class Case(native_convolutions.Case):
    padding: int = 1

    @property
    def native(self) -> NativeConvolution:
        return self.native_of(self.input_shape)

    def native_of(self, input: torch.Size) -> NativeConvolution:
        geometry = Geometry(padding=(self.padding, self.padding))
        return winograd.convolution(geometry, torch.Size(self.weight_shape), input, self.dtype)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.out_channels, self.in_channels, 3, 3)

    def convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(input, weight, bias, padding=self.padding)

    def terms(self, squares: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """A tile's outputs share their errors, also where most of a window is the zeros around a small map."""
        whole_window = input.mean() * weight.sum((1, 2, 3))
        return squares.maximum(whole_window[:, None, None])


def with_statistics(of: Arguments, **changes) -> Pending:
    """The output's pending activation, of a norm without weight, bias and running statistics but for ``changes``."""
    arguments = {
        "input": of.pending, "weight": of.weight, "bias": of.bias, "bn_weight": None,
        "bn_bias": None, "running_mean": None, "running_var": None, "momentum": 0.0, "eps": 1e-5,
        "negative_slope": of.case.slope, "activation_first": of.case.statistics_of_activation, "groups": of.case.groups,
    }  # fmt: skip
    return of.case.native.forward_with_statistics(**{**arguments, **changes})


def compare_with_torch(accuracy, case: Case) -> None:
    native_convolutions.compare_with_torch(accuracy, case, GROWTH, INTEGER_ROUNDING, sharing=16)  # those of a tile


def cases(largest: int, channels: tuple[int, ...]) -> st.SearchStrategy[Case]:
    def has_output(case: Case) -> bool:
        return min(case.height, case.width) + 2 * case.padding >= 3

    return st.builds(
        Case,
        images=st.integers(1, 3),
        in_channels=st.sampled_from(channels),
        out_channels=st.sampled_from(channels),
        height=st.integers(1, largest),
        width=st.integers(1, largest),
        padding=st.integers(0, 2),
        groups=st.sampled_from([1, 1, 2, 3]),
        pending=st.sampled_from(KINDS),
        statistics_of_activation=st.booleans(),
        has_bias=st.booleans(),
        weight_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
        dtype=st.sampled_from(DTYPES),
        slope=st.sampled_from([0.0, 0.2, 1.0]),
        seed=st.integers(0, 2**31),
    ).filter(has_output)


SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(SETTINGS, max_examples=30)
@given(cases(13, CHANNELS))
def test_random_shapes_are_as_accurate_as_torch(accuracy, case):
    compare_with_torch(accuracy, case)


@pytest.mark.slow
@settings(SETTINGS, max_examples=200)
@given(cases(70, (*CHANNELS, 100, 130, 256)))
def test_random_larger_shapes_are_as_accurate_as_torch(accuracy, case):
    compare_with_torch(accuracy, case)


AWKWARD = {
    "one pixel": Case(images=1, height=1, width=1),
    "one pixel, padded by two": Case(images=1, height=1, width=1, padding=2, pending="kink_affine"),
    "two pixels, padded by two": Case(
        in_channels=64, out_channels=64, height=1, width=2, padding=2, pending="stored", has_bias=False
    ),
    "one output": Case(images=1, height=3, width=3, padding=0),
    "one channel": Case(in_channels=1, out_channels=1, height=5, width=6),
    "channel tails": Case(in_channels=33, out_channels=47, height=9, width=7, statistics_of_activation=True),
    "several segments in a row": Case(height=5, width=111, groups=2),
    "a tall image": Case(height=61, width=2, padding=2, weight_format=torch.channels_last),
    "few tiles, many channels": Case(images=1, in_channels=200, out_channels=300, height=4, width=4),
    "few tiles, none of them whole": Case(images=3, in_channels=200, out_channels=300, height=6, width=9, groups=3),
    "and as integers": Case(images=3, in_channels=200, out_channels=300, height=2, width=7, dtype=torch.bfloat16),
    "many images of one tile": Case(images=33, height=2, width=3, groups=3, pending="kink_affine"),
    "bfloat16 tails": Case(in_channels=19, out_channels=21, height=6, width=10, dtype=torch.bfloat16, groups=2),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_shapes_are_as_accurate_as_torch(accuracy, name):
    compare_with_torch(accuracy, AWKWARD[name])


# Along an axis: maps of one, two and three outputs more than whole tiles, and of none more.
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 17, 30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("apart", [0, 3, 6])
def test_maps_that_tiles_do_not_fill_are_as_accurate_as_torch(accuracy, apart, padding, dtype):
    """All pairs of remainders; blocks and runs of tiles begin and end anywhere in an image."""
    for height, width in zip(SIZES, SIZES[apart:] + SIZES[:apart]):
        if min(height, width) + 2 * padding >= 3:
            case = Case(
                padding,
                images=3,
                in_channels=18,
                out_channels=50,
                height=height,
                width=width,
                groups=2,
                dtype=dtype,
                seed=height,
            )
            compare_with_torch(accuracy, case)


@with_lesser_instruction_sets
def test_lesser_instruction_sets_pass_the_same_tests(isa):
    passes(__file__, isa, "-k", "awkward or not_finite or do_not_fill")


# Enough work for five threads: fewer pixels are not worth waking one for.
SEVERAL_THREADS = {
    "tiles to share": Case(images=3, in_channels=24, out_channels=40, height=22, width=19, groups=2),
    "channels to share": Case(images=1, in_channels=320, out_channels=250, height=8, width=8, pending="kink_affine"),
    "tiles enough for sums of their own": Case(images=10, in_channels=18, out_channels=40, height=35, width=30),
    "and as integers": Case(images=10, in_channels=40, out_channels=50, height=30, width=35, dtype=torch.bfloat16),
    "bfloat16": Case(images=2, in_channels=70, out_channels=48, height=23, width=30, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("name", SEVERAL_THREADS)
def test_any_number_of_threads_is_as_accurate_as_torch(accuracy, threads, name, count):
    threads(count)
    compare_with_torch(accuracy, SEVERAL_THREADS[name])


def test_waves_of_the_weights_gradient_are_as_accurate_as_torch(accuracy, threads):
    """Sums too large for each thread to have its own, of more tiles than are transformed at a time."""
    threads(2)
    compare_with_torch(accuracy, Case(images=140, in_channels=180, out_channels=176, height=2, width=3, groups=2))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", SEVERAL_THREADS)
def test_same_arguments_give_the_same_bits(threads, name, count):
    threads(count)
    of = Arguments(SEVERAL_THREADS[name])
    first = kernels(of)
    kernels(Arguments(Case(height=17, width=9)))  # leaves other numbers in the workspace
    for name, again in kernels(of).items():
        assert torch.equal(again, first[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_too_large_for_the_cache_has_the_bits_of_its_parts(threads, dtype):
    """Such outputs are written past the cache."""
    threads(2)
    of = Arguments(
        Case(
            images=64, in_channels=32, out_channels=32, height=66, width=65, weight_format=torch.channels_last,
            dtype=dtype,
        )
    )  # fmt: skip
    whole = of.case.native.forward(of.pending, of.weight, None)
    assert whole.numel() >= 8 << 20
    gradient, _ = of.case.native.backward_input(whole, of.weight, of.pending)
    for images in torch.arange(64).split(8):
        part = of.pending._replace(stored=of.stored[images])
        kernels = of.case.native_of(part.stored.shape)
        output = kernels.forward(part, of.weight, None)
        assert torch.equal(output, whole[images])
        assert torch.equal(kernels.backward_input(output, of.weight, part)[0], gradient[images])


def student_t(*shape: int) -> Tensor:
    return torch.randn(shape) / torch.randn(3, *shape).square().mean(0).sqrt()


# In integers a number is rounded relative to its tile's norm or largest number, or to the largest of a channel in 64
# tiles: what if that stands far out?
SPREADS = {
    "a heavy tail": student_t,
    "channels of different size": lambda n, c, h, w: torch.randn(n, c, h, w) * torch.randn(1, c, 1, 1).exp(),
    "pixels of different size": lambda n, c, h, w: torch.randn(n, c, h, w) * torch.randn(n, 1, h, w).exp(),
    "far from zero": lambda *shape: torch.randn(shape) + 5,
}


@pytest.mark.parametrize("channels", [16, 48, 256])
@pytest.mark.parametrize("spread", SPREADS)
def test_bfloat16_of_any_spread_is_as_accurate_as_torch(accuracy, spread, channels):
    torch.manual_seed(0)
    of = Arguments(
        Case(in_channels=channels, out_channels=channels, pending="stored", dtype=torch.bfloat16, has_bias=False)
    )
    for tensor in (of.stored, of.grad_output):
        tensor.copy_(SPREADS[spread](*tensor.shape))
    ours, torchs, exact = kernels(of), layer_by_layer(of, of.case.dtype), layer_by_layer(of, torch.float64)
    for name, factor in (("output", 2.0), ("grad_input", 2.0), ("grad_weight", 3.0)):
        accuracy.check(name, ours[name], exact[name], torchs[name], exact[name], factor, torch.zeros(()))


@pytest.mark.parametrize("out_channels", [16, 32])
@pytest.mark.parametrize("value", [1.0, -1e37, 1e-36, 0.0])
def test_bfloat16_of_equal_numbers_overflows_nothing(value, out_channels):
    """The largest sums of integers that there are (from 32 channels on), and the largest and the smallest scales."""
    of = Arguments(
        Case(in_channels=256, out_channels=out_channels, pending="stored", dtype=torch.bfloat16, has_bias=False)
    )
    of.stored.fill_(value)
    of.weight.fill_(1e-3)
    output, expected = (
        of.case.native.forward(of.pending, of.weight, None),
        layer_by_layer(of, torch.float64),
    )
    # Of tiles, products below the least normal number are zeros, as they are to torch where it multiplies tiles.
    least = 9 * 256 * torch.finfo(torch.float32).tiny if native.has_bfloat16_tiles() else 1e-37
    torch.testing.assert_close(output.double(), expected["output"], rtol=1e-2, atol=least)


@pytest.mark.parametrize("signs", list(product((1.0, -1.0), repeat=3)))
def test_bfloat16_of_signs_that_add_up_overflows_nothing(signs):
    """Each transformed pixel is as large as it can be for some of these signs, and of one sign in all channels."""
    of = Arguments(
        Case(
            images=1, in_channels=256, out_channels=32, height=4, width=4, pending="stored", dtype=torch.bfloat16,
            has_bias=False,
        )
    )  # fmt: skip
    along = torch.tensor((1.0, *signs))
    of.stored.copy_(along[:, None] * along)
    of.weight.fill_(1.0)
    output, expected = of.case.native.forward(of.pending, of.weight, None), layer_by_layer(of, torch.float64)["output"]
    torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


def many_tiles(channels: int) -> Case:
    """Of which a weight's gradient is made by floats up to 47 channels, and by integers from there on."""
    return Case(
        images=4, in_channels=channels, out_channels=channels, height=32, width=32, pending="stored",
        dtype=torch.bfloat16,
    )  # fmt: skip


@pytest.mark.parametrize("channels", [16, 48])
@pytest.mark.parametrize("value", [1.0, -1e16, 1e-16, 0.0])
def test_bfloat16_weight_gradient_of_equal_numbers_overflows_nothing(value, channels):
    of = Arguments(many_tiles(channels))
    of.stored.fill_(value)
    of.grad_output.fill_(abs(value))
    expected = layer_by_layer(of, torch.float64)["grad_weight"]
    gradient = of.case.native.backward_weight(of.grad_output, of.weight, of.pending)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-37)


@pytest.mark.parametrize("channels", [16, 48])
@pytest.mark.parametrize("tensor", ["stored", "grad_output"])
def test_bfloat16_weight_gradient_does_not_lose_a_nan(tensor, channels):
    of = Arguments(many_tiles(channels))
    getattr(of, tensor)[1, 3, 5, 7] = torch.nan
    gradient = of.case.native.backward_weight(of.grad_output, of.weight, of.pending)
    channel = gradient[:, 3] if tensor == "stored" else gradient[3]
    assert channel.isnan().all()
    assert gradient.isnan().sum() == channel.numel()


@pytest.fixture
def precision():
    """torch.set_float32_matmul_precision, for this test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_medium_float32_precision_is_finer_than_factors_rounded_to_bfloat16_or_just_that(precision):
    of = Arguments(Case(in_channels=64, out_channels=64, height=17, width=20, pending="stored", has_bias=False))
    exact, plain = layer_by_layer(of, torch.float64), kernels(of)
    precision("high")
    assert all(torch.equal(result, plain[name]) for name, result in kernels(of).items())
    precision("medium")
    ours = kernels(of)
    for tensor in (of.stored, of.weight, of.grad_output):
        tensor.copy_(tensor.bfloat16())
    rounded = layer_by_layer(of, torch.float64)
    for name in ("output", "grad_input", "grad_weight"):
        error, rounding = (ours[name] - exact[name]).norm(), (rounded[name] - exact[name]).norm()
        assert error < rounding or (native.has_bfloat16_tiles() and error < 1.001 * rounding), name
        assert torch.equal(ours[name], plain[name]) != multiplies_by("avx512_vnni"), name


@pytest.mark.parametrize("activation_first", [False, True])
def test_statistics_are_turned_into_the_next_layers_scale_and_shift(activation_first):
    case = Case(out_channels=21, groups=2, statistics_of_activation=activation_first)
    of, weight, bias = Arguments(case), torch.randn(21), torch.randn(21)
    after = with_statistics(of, bn_weight=weight, bn_bias=bias, eps=1e-3, negative_slope=0.1)
    scale = weight / (after.var.double() + 1e-3).sqrt()
    torch.testing.assert_close(after.scale, scale.float(), rtol=3e-7, atol=0)
    torch.testing.assert_close(after.shift, (bias - after.mean * scale).float(), rtol=1e-6, atol=1e-6)
    assert (after.weight, after.bias) == (weight, bias)
    assert (after.eps, after.negative_slope, after.activation_first) == (1e-3, 0.1, activation_first)


def test_running_statistics_move_towards_each_group_in_order():
    case = Case(out_channels=21, groups=3)
    of, running_mean, running_var = Arguments(case), torch.randn(21), torch.rand(21)
    expected_mean, expected_var = running_mean.clone(), running_var.clone()
    after = with_statistics(of, running_mean=running_mean, running_var=running_var, momentum=0.3)
    count = case.images * case.height * case.width
    for mean, var in zip(after.mean, after.var):
        expected_mean.lerp_(mean, 0.3)
        expected_var.lerp_(var * count / (count - 1), 0.3)
    torch.testing.assert_close(running_mean, expected_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(running_var, expected_var, rtol=1e-6, atol=1e-6)


def test_statistics_survive_a_mean_far_from_zero():
    of = Arguments(Case(images=8, height=12, width=12, pending="stored"))
    of.bias = torch.full((16,), 1000.0)
    after = with_statistics(of)
    exact = F.conv2d(of.stored.double(), of.weight.double(), of.bias.double(), padding=1)
    # A value near 1000 is off by up to 1000·eps/2 from the sum alone, and so is a deviation from the mean, of size 1.
    torch.testing.assert_close(after.mean[0].double(), exact.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(after.var[0].double(), exact.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=0)


def test_padding_contributes_zero_after_the_shift():
    of = Arguments(Case(images=1, height=2, width=2, padding=2))
    of.stored.zero_(), of.shift.fill_(1.0), of.weight.fill_(1.0)
    of.bias = None
    output = of.case.native.forward(of.pending, of.weight, None)[0, 0]
    inside = torch.tensor([1.0, 2.0, 2.0, 1.0])  # taps of each row or column that meet the image
    torch.testing.assert_close(output, 16 * inside[:, None] * inside, rtol=0, atol=1e-3)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so_and_reaches_no_further_than_its_tiles(bad, kind):
    """Winograd spreads a NaN or an infinity over the 4×4 tiles of output whose 6×6 windows hold it."""
    of = Arguments(Case(images=2, height=11, width=14, pending=kind))
    clean = kernels(of)
    of.stored[1, 3, 5, 8] = float(bad)
    dirty, torchs = kernels(of), layer_by_layer(of, torch.float32)
    for name in ("output", "grad_weight"):
        assert not dirty[name].isfinite()[~torchs[name].isfinite()].any(), name
    # Window t of a row holds pixels 4t - 1 to 4t + 4: rows 5 and columns 8 lie in window 1 (rows), 1 and 2 (columns).
    dirty["output"][1, :, 4:8, 4:12] = clean["output"][1, :, 4:8, 4:12]
    dirty["grad_weight"][:, 3] = clean["grad_weight"][:, 3]
    for name in ("output", "grad_weight"):
        assert torch.equal(dirty[name], clean[name]), name


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_stays_so_and_reaches_no_further_than_its_tiles(bad):
    of = Arguments(Case(images=2, height=11, width=14))
    clean = kernels(of)
    of.grad_output[1, 3, 5, 8] = float(bad)
    dirty, torchs = kernels(of), layer_by_layer(of, torch.float32)
    for name in ("grad_input", "grad_weight", "sum", "sum_deviation"):
        assert not dirty[name].isfinite()[~torchs[name].isfinite()].any(), name
    dirty["grad_input"][1, :, 4:8, 4:12] = clean["grad_input"][1, :, 4:8, 4:12]
    dirty["grad_weight"][3] = clean["grad_weight"][3]
    for name in ("grad_input", "grad_weight"):
        assert torch.equal(dirty[name], clean[name]), name


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_weight_that_is_not_finite_touches_its_two_channels_only(bad):
    of = Arguments(Case(images=2, height=11, width=14))
    clean = kernels(of)
    of.weight[3, 7, 1, 2] = float(bad)
    dirty, torchs = kernels(of), layer_by_layer(of, torch.float32)
    for name, channel in (("output", 3), ("grad_input", 7)):
        assert not dirty[name].isfinite()[~torchs[name].isfinite()].any(), name
        dirty[name][:, channel] = clean[name][:, channel]
        assert torch.equal(dirty[name], clean[name]), name


def test_weights_of_any_strides():
    of = Arguments(Case())
    expected = kernels(of)
    strided = torch.zeros(3, 20, 4, 18).permute(3, 1, 0, 2)[1:17, 2:18, :, 1:]
    strided.copy_(of.weight)
    of.weight = strided
    for name, result in kernels(of).items():
        assert torch.equal(result, expected[name]), name


def _forward(**changes) -> None:
    x, weight, output = torch.zeros(2, 16, 4, 4), torch.zeros(16, 16, 3, 3), torch.zeros(2, 16, 4, 4)
    what = {
        "kind": native.ConvolutionKind.conv3x3, "dtype": native.Dtype.float32, "integers": False,
        "input_shape": list(x.shape), "out_channels": 16, "padding": 1,
    }  # fmt: skip
    arguments = {
        "groups": 1, "input": x.data_ptr(), "scale": 0, "shift": 0, "negative_slope": 0.1, "activation_first": False,
        "weight": weight.data_ptr(), "weight_strides": list(weight.stride()), "bias": 0, "output": output.data_ptr(),
        "output_scale": 0, "output_shift": 0, "output_negative_slope": 0.1, "output_activation_first": False,
        "residual": 0, "threads": 1,
    }  # fmt: skip
    convolution = native.Convolution(*(changes.get(name, value) for name, value in what.items()))
    convolution.forward(*(changes.get(name, value) for name, value in arguments.items()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_shape": [0, 16, 4, 4]}, "batch and channels must be at least 1; got batch 0, channels 16 and 16"),
        ({"out_channels": 0}, "batch and channels must be at least 1; got batch 2, channels 16 and 0"),
        ({"padding": 3}, "padding must be 0, 1 or 2; got 3"),
        ({"input_shape": [2, 16, 1, 4], "padding": 0}, "got a map of 1×4 and padding 0"),
        ({"groups": 3}, "groups must divide the batch; got 3 groups, batch 2"),
        ({"dtype": native.Dtype.float16}, "the CPU kernels take float32 and bfloat16; got float16"),
        ({"input": 0}, "input must not be null"),
        ({"output": 6}, "output must be aligned to 4 bytes; got address 6"),
        ({"weight": 0}, "weight must not be null"),
        ({"scale": 8}, "scale and shift go together"),
        ({"output_shift": 8}, "output_scale and output_shift go together"),
        ({"residual": 8}, "a residual is added before the activation; got no output_scale"),
    ],
)
def test_sizes_and_addresses_are_validated(changes, message):
    with pytest.raises(ValueError, match=message):
        _forward(**changes)
