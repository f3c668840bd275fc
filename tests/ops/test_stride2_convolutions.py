"""The native stride-2 convolutions against float64, beside torch's own, and what is written as one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import native_convolutions
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from instruction_sets import passes, with_lesser_instruction_sets
from native_convolutions import KINDS, Arguments, kernels
from torch import Tensor

pytest.importorskip("ganvas._native")

from ganvas import _native as native
from ganvas._native import ConvolutionKind
from ganvas.ops.backends.cpu import stride2
from ganvas.ops.backends.cpu.kernels import NativeConvolution
from ganvas.ops.pending import Pending

# What each of them is, in torch's words.
TORCH: dict[ConvolutionKind, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    ConvolutionKind.conv4x4: lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1),
    ConvolutionKind.conv_transpose4x4: lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1),
    ConvolutionKind.conv3x3_even: lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1),
    ConvolutionKind.conv3x3_odd: lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1),
    ConvolutionKind.conv3x3_avg_pool2: lambda x, w, b: F.avg_pool2d(F.conv2d(x, w, b, padding=1), 2),
    ConvolutionKind.upsample2_conv3x3: lambda x, w, b: F.conv2d(F.interpolate(x, scale_factor=2.0), w, b, padding=1),
}
PARITY = {ConvolutionKind.conv3x3_even: 0, ConvolutionKind.conv3x3_odd: 1}  # of the maps that it takes

# The floor of the tolerance: how many roundings of float32 (eps) a result may be off, measured at what its terms add up
# to when they do not cancel. With the matrices A, B and G of F(4×4, 2×2) in csrc/cpu/winograd_transforms.h and
# independent pixels and weights, the mean over outputs i of Σ_f A_if²·|B_f|²·|G_f|² / 2 is 4.06 along each of two axes,
# so the terms' root mean square is 4.06 times the result's. Twice (gradients: three times) torch's error comes on top.
GROWTH = 4.06
# Of factors that are integers, as in test_winograd.py.
INTEGER_ROUNDING = 3 * (8191**-2 + 4095**-2) ** 0.5 / 12**0.5
CHANNELS = (1, 3, 8, 16, 17, 31, 33, 64)


@dataclass(frozen=True)
class Case(native_convolutions.Case):
    convolution: ConvolutionKind = ConvolutionKind.conv4x4

    @property
    def native(self) -> NativeConvolution:
        return stride2.convolution(self.convolution, torch.Size(self.weight_shape), self.input_shape, self.dtype)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        side, channels = stride2.kernel_side(self.convolution), (self.out_channels, self.in_channels)
        return (*(channels[::-1] if self.convolution is ConvolutionKind.conv_transpose4x4 else channels), side, side)

    def convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return TORCH[self.convolution](input, weight, bias)


def compare_with_torch(accuracy, case: Case) -> None:
    native_convolutions.compare_with_torch(accuracy, case, GROWTH, INTEGER_ROUNDING, sharing=16)  # those of a tile


@st.composite
def cases(draw: st.DrawFn) -> Case:
    convolution = draw(st.sampled_from(stride2.KINDS))
    height, width = (draw(st.integers(1 if stride2.doubles(convolution) else 2, 19)) for _ in range(2))
    parity = PARITY.get(convolution)
    assume(parity is None or height % 2 == width % 2 == parity)
    return Case(
        convolution,
        images=draw(st.integers(1, 3)),
        in_channels=draw(st.sampled_from(CHANNELS)),
        out_channels=draw(st.sampled_from(CHANNELS)),
        height=height,
        width=width,
        groups=draw(st.sampled_from([1, 1, 2, 3])),
        pending=draw(st.sampled_from(KINDS)),
        statistics_of_activation=draw(st.booleans()),
        has_bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        slope=draw(st.sampled_from([0.0, 0.2, 1.0])),
        seed=draw(st.integers(0, 2**31)),
    )


SETTINGS = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
)


@settings(SETTINGS, max_examples=40)
@given(cases())
def test_random_shapes_are_as_accurate_as_torch(accuracy, case):
    compare_with_torch(accuracy, case)


AWKWARD = {
    "one pixel from four": Case(images=1, height=2, width=2),
    "four pixels from one": Case(ConvolutionKind.conv_transpose4x4, images=1, height=1, width=1),
    "odd maps": Case(height=11, width=7, groups=2, pending="kink_affine"),
    "channel tails": Case(in_channels=33, out_channels=47, height=18, width=14, statistics_of_activation=True),
    "transposed channel tails": Case(
        ConvolutionKind.conv_transpose4x4, in_channels=47, out_channels=33, height=9, groups=2
    ),
    "several segments in a row": Case(height=6, width=110, groups=2),
    "several segments from a row": Case(ConvolutionKind.conv_transpose4x4, height=3, width=59, groups=2),
    "weights larger than all else": Case(in_channels=200, out_channels=300, height=10, groups=2),
    "and transposed": Case(ConvolutionKind.conv_transpose4x4, in_channels=300, out_channels=200, height=5, width=3),
    "bfloat16 tails": Case(in_channels=19, out_channels=21, height=12, width=10, dtype=torch.bfloat16, groups=2),
    "3x3 of an even map": Case(ConvolutionKind.conv3x3_even, height=6, width=10),
    "3x3 of an odd map": Case(ConvolutionKind.conv3x3_odd, height=7, width=5),
    "pooled odd map": Case(ConvolutionKind.conv3x3_avg_pool2, height=7, width=9),
    "upsampled": Case(ConvolutionKind.upsample2_conv3x3, in_channels=20, out_channels=24, height=5, width=6),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_shapes_are_as_accurate_as_torch(accuracy, name):
    compare_with_torch(accuracy, AWKWARD[name])


@with_lesser_instruction_sets
def test_lesser_instruction_sets_pass_the_same_tests(isa):
    passes(__file__, isa, "-k", "awkward")


# Enough work for five threads: fewer pixels are not worth waking one for.
SEVERAL_THREADS = {
    "tiles to share": Case(images=3, in_channels=24, out_channels=40, height=44, width=38, groups=2),
    "tiles to make": Case(
        ConvolutionKind.conv_transpose4x4, images=3, in_channels=40, out_channels=24, height=22, width=19
    ),
    "channels to share": Case(images=1, in_channels=320, out_channels=250, height=16, width=16, pending="kink_affine"),
}


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("name", SEVERAL_THREADS)
def test_any_number_of_threads_is_as_accurate_as_torch(accuracy, threads, name, count):
    threads(count)
    compare_with_torch(accuracy, SEVERAL_THREADS[name])


@pytest.mark.parametrize("name", SEVERAL_THREADS)
def test_same_arguments_give_the_same_bits(threads, name):
    threads(3)
    of = Arguments(SEVERAL_THREADS[name])
    first = kernels(of)
    kernels(Arguments(Case(height=34, width=18)))  # leaves other numbers in the workspace
    for name, again in kernels(of).items():
        assert torch.equal(again, first[name]), name


@pytest.mark.parametrize("convolution", stride2.KINDS, ids=lambda kind: kind.name)
def test_padding_contributes_zero_after_the_shift(convolution):
    side = 3 if PARITY.get(convolution) else 2
    of = Arguments(Case(convolution, images=1, height=side, width=side, has_bias=False))
    of.stored.zero_(), of.shift.fill_(1.0), of.weight.fill_(1.0)
    expected = of.case.convolve(torch.ones(1, 16, side, side), of.weight)
    torch.testing.assert_close(of.case.native.forward(of.pending, of.weight, None), expected, rtol=1e-5, atol=0)


def test_running_statistics_move_towards_each_group_in_order():
    case = Case(ConvolutionKind.conv_transpose4x4, out_channels=21, groups=3)
    of, running_mean, running_var = Arguments(case), torch.randn(21), torch.rand(21)
    expected_mean, expected_var = running_mean.clone(), running_var.clone()
    after = case.native.forward_with_statistics(
        of.pending,
        of.weight,
        of.bias,
        None,
        None,
        running_mean,
        running_var,
        0.3,
        1e-5,
        0.2,
        False,
        3,
    )
    count = case.images * after.stored[0, 0].numel()
    for mean, var in zip(after.mean, after.var):
        expected_mean.lerp_(mean, 0.3)
        expected_var.lerp_(var * count / (count - 1), 0.3)
    torch.testing.assert_close(running_mean, expected_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(running_var, expected_var, rtol=1e-6, atol=1e-6)


def test_weights_of_any_strides():
    of = Arguments(Case())
    expected = kernels(of)
    strided = torch.zeros(4, 20, 5, 18).permute(3, 1, 0, 2)[1:17, 2:18, :, 1:]
    strided.copy_(of.weight)
    of.weight = strided
    for name, result in kernels(of).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize(
    ("convolution", "weight", "input", "taken"),
    [
        (ConvolutionKind.conv4x4, (64, 16, 4, 4), (2, 16, 8, 8), True),
        (ConvolutionKind.conv4x4, (64, 16, 3, 3), (2, 16, 8, 8), False),
        (ConvolutionKind.conv4x4, (64, 3, 4, 4), (2, 3, 8, 8), True),
        (
            ConvolutionKind.conv4x4,
            (8, 3, 4, 4),
            (2, 3, 8, 8),
            False,
        ),  # few channels: the transforms outweigh what they save
        (ConvolutionKind.conv4x4, (64, 16, 4, 4), (2, 16, 1, 8), False),  # no output
        (ConvolutionKind.conv_transpose4x4, (16, 64, 4, 4), (2, 16, 1, 8), True),
        (ConvolutionKind.upsample2_conv3x3, (64, 16, 3, 3), (2, 16, 4, 4), True),
    ],
)
def test_takes_what_it_does_well(convolution, weight, input, taken):
    assert stride2.takes(convolution, torch.empty(weight), torch.Size(input)) is taken


def test_a_3x3_convolution_of_stride_2_depends_on_the_parity_of_the_map():
    assert stride2.conv3x3(torch.Size((1, 16, 8, 6))) is ConvolutionKind.conv3x3_even
    assert stride2.conv3x3(torch.Size((1, 16, 7, 5))) is ConvolutionKind.conv3x3_odd
    assert stride2.conv3x3(torch.Size((1, 16, 7, 6))) is None


def test_a_map_without_output_is_refused_before_any_work():
    with pytest.raises(ValueError, match=r"the output would be empty; got a map of 1×8 and padding 1"):
        native.Convolution(ConvolutionKind.conv4x4, native.Dtype.float32, False, (1, 16, 1, 8), 16, 1)


@pytest.mark.parametrize(
    ("kind", "sides", "padding", "message"),
    [
        (ConvolutionKind.conv3x3_even, (6, 7), 1, "sides must be even; got 6×7"),
        (ConvolutionKind.conv3x3_odd, (6, 8), 1, "sides must be odd; got 6×8"),
        (ConvolutionKind.upsample2_conv3x3, (6, 8), 0, "padding must be 1 here; got 0"),
    ],
)
def test_what_is_no_4x4_convolution_is_refused(kind, sides, padding, message):
    with pytest.raises(ValueError, match=message):
        native.Convolution(kind, native.Dtype.float32, False, (1, 16, *sides), 16, padding)


@pytest.mark.parametrize(
    "kind", [kind for kind in stride2.KINDS if stride2.kernel_side(kind) == 3], ids=lambda kind: kind.name
)
def test_autocast_does_not_reach_the_folding_of_the_weight(kind):
    side = 6 + PARITY.get(kind, 0)
    x = torch.randn(2, 16, side, side).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, 3, 3)
    convolution = stride2.convolution(kind, weight.shape, x.shape, x.dtype)
    output = convolution.forward(Pending(x), weight, None)

    def everything():
        grad_input, _ = convolution.backward_input(output, weight, Pending(x))
        gradient = convolution.backward_weight(output, weight, Pending(x))
        return convolution.forward(Pending(x), weight, None), grad_input, gradient

    with torch.autocast("cpu", torch.bfloat16):
        got = everything()
    for mine, expected in zip(got, everything()):
        assert torch.equal(mine, expected)
