"""The native direct convolutions against float64, beside torch's own, with every kind of pending activation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import native_convolutions
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from instruction_sets import multiplies_by, passes, with_lesser_instruction_sets
from native_convolutions import KINDS, Arguments, kernels
from torch import Tensor, nn

import ganvas
from ganvas import _native as native
from ganvas.ops.backends import cpu
from ganvas.ops.backends.cpu import direct
from ganvas.ops.backends.cpu.kernels import NativeConvolution
from ganvas.ops.convolution import Geometry

# Of factors that are bfloat16: up to half a unit in the last place, as torch's are. Where a result has few of them,
# torch's rounding of the output may by chance undo it.
FACTOR_ROUNDING = torch.finfo(torch.bfloat16).eps / 2 / 3**0.5
STRIDE_2 = Geometry(stride=(2, 2))
SAME_3X3: dict[str, Any] = {"geometry": Geometry(padding=(1, 1)), "kernel": (3, 3)}
TRANSPOSED_4X4: dict[str, Any] = {"geometry": Geometry((2, 2), (1, 1), transposed=True), "kernel": (4, 4)}
DOWN_4X4: dict[str, Any] = {"geometry": Geometry((2, 2), (1, 1)), "kernel": (4, 4)}
SAME_5X5: dict[str, Any] = {"geometry": Geometry(padding=(2, 2)), "kernel": (5, 5)}
CHANNELS = (1, 3, 8, 16, 17, 31, 33, 64)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """Small tensors: more would only wait for each other."""
    threads(1)


@dataclass(frozen=True)
class Case(native_convolutions.Case):
    geometry: Geometry = Geometry()  # noqa: RUF009  it is a tuple
    kernel: tuple[int, int] = (1, 1)

    @property
    def native(self) -> NativeConvolution:
        return direct.convolution(self.geometry, torch.Size(self.weight_shape), self.input_shape, self.dtype)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        channels = (self.out_channels, self.in_channels)
        return (*(channels[::-1] if self.geometry.transposed else channels), *self.kernel)

    def convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.convolution(input, weight, bias, *self.geometry[:6])


def compare_with_torch(accuracy, case: Case) -> None:
    native_convolutions.compare_with_torch(accuracy, case, 1.0, FACTOR_ROUNDING)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Geometry, tuple[int, int]]:
    """Of a kernel of up to 5×5, mostly one that is used."""
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3)) if draw(st.booleans()) else st.integers(1, 2).map(_twice)
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)) | st.integers(1, 5).map(_twice))
    stride, dilation = draw(pairs), draw(pairs)
    padding = draw(st.tuples(*(st.integers(0, d * (k - 1) // 2 + 1) for k, d in zip(kernel, dilation))))
    transposed = draw(st.booleans())
    most = [max(s, d) - 1 for s, d in zip(stride, dilation)] if transposed else [0, 0]
    output_padding = draw(st.tuples(*(st.integers(0, m) for m in most)))
    return Geometry(stride, padding, dilation, transposed, output_padding), kernel


def _twice(value: int) -> tuple[int, int]:
    return value, value


@st.composite
def cases(draw: st.DrawFn, largest: int, channels: tuple[int, ...]) -> Case:
    geometry, kernel = draw(geometries())
    case = Case(
        geometry=geometry,
        kernel=kernel,
        images=draw(st.integers(1, 3)),
        in_channels=draw(st.sampled_from(channels)),
        out_channels=draw(st.sampled_from(channels)),
        height=draw(st.integers(1, largest)),
        width=draw(st.integers(1, largest)),
        groups=draw(st.sampled_from([1, 1, 2, 3])),
        pending=draw(st.sampled_from(KINDS)),
        statistics_of_activation=draw(st.booleans()),
        has_bias=draw(st.booleans()),
        weight_format=draw(st.sampled_from([torch.contiguous_format, torch.channels_last])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        slope=draw(st.sampled_from([0.0, 0.2, 1.0])),
        seed=draw(st.integers(0, 2**31)),
    )
    assume(min(geometry.output_shape(case.input_shape, torch.Size(case.weight_shape))) >= 1)
    return case


SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(SETTINGS, max_examples=100)
@given(cases(13, CHANNELS))
def test_random_shapes_are_as_accurate_as_torch(accuracy, case):
    compare_with_torch(accuracy, case)


@pytest.mark.slow
@settings(SETTINGS, max_examples=200)
@given(cases(40, (*CHANNELS, 100, 130, 256)))
def test_random_larger_shapes_are_as_accurate_as_torch(accuracy, case):
    compare_with_torch(accuracy, case)


AWKWARD = {
    "one pixel": Case(images=1, height=1, width=1),
    "one pixel of four": Case(images=1, height=2, width=2, geometry=STRIDE_2, pending="kink_affine"),
    "one channel": Case(in_channels=1, out_channels=1, height=5, width=6),
    "channel tails": Case(in_channels=33, out_channels=47, height=9, width=7, statistics_of_activation=True),
    "several blocks of each group": Case(height=15, width=17, groups=3, pending="kink_affine"),
    "several parts of the weight's gradient": Case(in_channels=520, out_channels=640, height=11),
    "few pixels, many channels": Case(images=1, in_channels=200, out_channels=300, height=3, width=5),
    "odd maps, stride 2": Case(height=11, width=7, groups=2, geometry=STRIDE_2, in_channels=40),
    "even maps, stride 2": Case(height=6, width=12, groups=2, geometry=STRIDE_2, pending="kink_affine"),
    "written pixels, stride 2": Case(height=9, width=10, geometry=STRIDE_2, pending="stored"),
    "bfloat16 tails": Case(in_channels=19, out_channels=21, height=6, width=10, dtype=torch.bfloat16, groups=2),
    "more bfloat16 tails": Case(in_channels=71, out_channels=75, height=6, width=10, dtype=torch.bfloat16, groups=2),
    "written bfloat16": Case(in_channels=64, out_channels=80, pending="stored", dtype=torch.bfloat16),
    "odd groups of bfloat16": Case(
        images=1, in_channels=18, height=5, width=7, dtype=torch.bfloat16, groups=3, pending="kink_affine"
    ),
    "bfloat16, stride 2": Case(in_channels=17, out_channels=30, height=7, geometry=STRIDE_2, dtype=torch.bfloat16),
    "a stem": Case(in_channels=3, out_channels=24, height=13, width=11, pending="stored", **SAME_3X3),
    "a stem, channels last": Case(
        in_channels=3, out_channels=40, height=9, weight_format=torch.channels_last, pending="stored", **SAME_3X3
    ),
    "a stem of stride 2": Case(
        in_channels=3,
        out_channels=17,
        height=19,
        width=16,
        pending="stored",
        kernel=(7, 7),
        geometry=Geometry(stride=(2, 2), padding=(3, 3)),
    ),
    "few pending channels": Case(in_channels=3, out_channels=20, groups=2, pending="kink_affine", **SAME_3X3),
    "one channel at the end": Case(in_channels=40, out_channels=1, height=12, groups=2, **SAME_3X3),
    "three channels at the end": Case(in_channels=32, out_channels=3, height=5, width=7, **TRANSPOSED_4X4),
    "a pixel becomes a map": Case(
        in_channels=20,
        out_channels=24,
        height=1,
        width=1,
        images=5,
        kernel=(4, 4),
        pending="stored",
        geometry=Geometry(transposed=True),
    ),
    "a map becomes a number": Case(in_channels=40, out_channels=1, height=4, width=4, images=5, kernel=(4, 4)),
    "maps become pixels": Case(
        in_channels=34, out_channels=40, height=3, width=5, images=24, groups=2, kernel=(3, 5), pending="kink_affine"
    ),
    "maps become pixels, channels last": Case(
        in_channels=18, out_channels=33, height=4, width=2, images=33, kernel=(4, 2), weight_format=torch.channels_last
    ),
    "pixels become maps": Case(
        in_channels=37,
        out_channels=19,
        height=1,
        width=1,
        images=44,
        groups=2,
        kernel=(3, 2),
        statistics_of_activation=True,
        geometry=Geometry(stride=(2, 1), transposed=True),
    ),
    "dense layers": Case(in_channels=65, out_channels=50, height=1, width=1, images=96, groups=2),
    "a window larger than the cache": Case(
        in_channels=520, out_channels=70, images=1, height=6, width=5, groups=2, **SAME_3X3
    ),
    "a gradient larger than the cache": Case(in_channels=140, out_channels=200, height=5, images=1, **SAME_5X5),
    "outputs that are mostly the same number": Case(
        in_channels=1,
        out_channels=1,
        height=12,
        width=24,
        images=1,
        groups=2,
        kernel=(1, 1),
        geometry=Geometry(stride=(2, 2), transposed=True),
        pending="affine_kink",
        slope=0.0,
        has_bias=False,
    ),
    "first outputs far from the others": Case(
        in_channels=1,
        out_channels=8,
        height=1,
        width=38,
        images=1,
        kernel=(3, 3),
        geometry=Geometry(dilation=(3, 1), transposed=True),
        pending="kink_affine",
        slope=0.0,
        has_bias=False,
    ),
    "bands of the output": Case(
        in_channels=20,
        out_channels=16,
        height=40,
        width=37,
        images=1,
        groups=2,
        kernel=(3, 3),
        geometry=Geometry(stride=(2, 2), padding=(1, 1), transposed=True, output_padding=(1, 0)),
        statistics_of_activation=True,
    ),
    "windows with gaps": Case(
        in_channels=18,
        out_channels=20,
        height=14,
        width=15,
        kernel=(3, 3),
        geometry=Geometry(padding=(2, 3), dilation=(2, 3)),
        pending="kink_affine",
        groups=2,
    ),
    "windows with gaps, transposed": Case(
        in_channels=17,
        out_channels=16,
        height=6,
        width=5,
        kernel=(3, 2),
        groups=2,
        geometry=Geometry(stride=(3, 2), padding=(1, 0), dilation=(2, 3), transposed=True, output_padding=(1, 2)),
    ),
    "few channels, stride 2": Case(in_channels=6, out_channels=20, height=13, width=10, groups=2, **DOWN_4X4),
    "few channels, five planes": Case(
        in_channels=2, out_channels=18, height=23, width=21, kernel=(7, 6), geometry=Geometry((5, 5), (3, 2))
    ),
    "few channels, few neighbours": Case(
        in_channels=12, out_channels=5, height=9, kernel=(3, 3), geometry=Geometry((2, 2), (1, 1))
    ),
    "a kernel wider than the map": Case(height=2, width=3, kernel=(5, 7), geometry=Geometry(padding=(4, 5))),
    "strides past the kernel": Case(height=11, width=9, kernel=(2, 1), geometry=Geometry(stride=(3, 4))),
    "a stride as long as the map": Case(
        in_channels=5, out_channels=18, height=20, width=20, kernel=(20, 20), geometry=Geometry(stride=(20, 20))
    ),
    "bfloat16 windows": Case(in_channels=22, out_channels=33, dtype=torch.bfloat16, groups=2, **SAME_3X3),
    "bfloat16 stem": Case(in_channels=3, out_channels=32, dtype=torch.bfloat16, pending="stored", **SAME_5X5),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_shapes_are_as_accurate_as_torch(accuracy, name):
    compare_with_torch(accuracy, AWKWARD[name])


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_shapes_of_bfloat16_are_as_accurate_as_torch(accuracy, name):
    compare_with_torch(accuracy, replace(AWKWARD[name], dtype=torch.bfloat16))


@with_lesser_instruction_sets
def test_lesser_instruction_sets_pass_the_same_tests(isa):
    passes(__file__, isa, "-k", "awkward or not_finite")


# Enough work for five threads: fewer pixels are not worth waking one for.
SEVERAL_THREADS = {
    "pixels to share": Case(images=3, in_channels=48, out_channels=80, height=22, width=19, groups=2),
    "channels to share": Case(images=1, in_channels=640, out_channels=500, height=8, width=8, pending="kink_affine"),
    "bfloat16": Case(images=4, in_channels=70, out_channels=48, height=23, width=30, dtype=torch.bfloat16),
    "stride 2": Case(images=3, in_channels=48, out_channels=80, height=44, width=38, groups=2, geometry=STRIDE_2),
    "images to share in bfloat16": Case(
        images=21, in_channels=36, out_channels=40, height=6, width=5, groups=2, dtype=torch.bfloat16, **SAME_3X3
    ),
    "a large gradient in bfloat16": Case(
        images=3, in_channels=290, out_channels=330, height=8, dtype=torch.bfloat16, **SAME_3X3
    ),
    "four phases in bfloat16": Case(
        images=7, in_channels=70, out_channels=50, height=9, width=11, groups=2, dtype=torch.bfloat16, **TRANSPOSED_4X4
    ),
}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("name", SEVERAL_THREADS)
def test_any_number_of_threads_is_as_accurate_as_torch(accuracy, threads, name, count):
    threads(count)
    compare_with_torch(accuracy, SEVERAL_THREADS[name])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", SEVERAL_THREADS)
def test_same_arguments_give_the_same_bits(threads, name, count):
    threads(count)
    of = Arguments(SEVERAL_THREADS[name])
    first = kernels(of)
    kernels(Arguments(Case(height=17, width=9)))  # leaves other numbers in the workspace
    for name, again in kernels(of).items():
        assert torch.equal(again, first[name]), name


def test_medium_float32_precision_multiplies_bfloat16():
    of = Arguments(Case(in_channels=64, out_channels=64, height=17, pending="stored", has_bias=False))
    before, plain = torch.get_float32_matmul_precision(), kernels(of)
    try:
        torch.set_float32_matmul_precision("medium")
        ours = kernels(of)
    finally:
        torch.set_float32_matmul_precision(before)
    for tensor in (of.stored, of.weight, of.grad_output):
        tensor.copy_(tensor.bfloat16())
    rounded = kernels(of)
    for name in ("output", "grad_input", "grad_weight"):
        assert torch.equal(ours[name], plain[name]) != multiplies_by("avx512_bf16"), name
        if multiplies_by("avx512_bf16"):
            torch.testing.assert_close(ours[name], rounded[name], rtol=1e-5, atol=1e-4)


def test_running_statistics_move_towards_each_group_in_order():
    case = Case(out_channels=21, groups=3, geometry=STRIDE_2)
    of, running_mean, running_var = Arguments(case), torch.randn(21), torch.rand(21)
    expected_mean, expected_var = running_mean.clone(), running_var.clone()
    after = case.native.forward_with_statistics(
        of.pending, of.weight, of.bias, None, None, running_mean, running_var, 0.3, 1e-5, 0.2, False, 3
    )
    count = case.images * after.stored[0, 0].numel()
    for mean, var in zip(after.mean, after.var):
        expected_mean.lerp_(mean, 0.3)
        expected_var.lerp_(var * count / (count - 1), 0.3)
    torch.testing.assert_close(running_mean, expected_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(running_var, expected_var, rtol=1e-6, atol=1e-6)


def test_statistics_survive_a_mean_far_from_zero():
    of = Arguments(Case(images=8, height=12, width=12, pending="stored"))
    of.bias = torch.full((16,), 1000.0)
    exact = F.conv2d(of.stored.double(), of.weight.double(), of.bias.double())
    results = kernels(of)
    # A value near 1000 is off by up to 1000·eps/2 from the sum alone, and so is a deviation from the mean, of size 1.
    torch.testing.assert_close(results["mean"][0].double(), exact.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(results["var"][0].double(), exact.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_what_is_not_finite_reaches_its_own_pixel_alone(bad, dtype):
    of = Arguments(Case(height=11, width=14, pending="stored", dtype=dtype))
    clean = kernels(of)
    of.stored[1, 3, 5, 8] = float(bad)
    of.grad_output[0, 2, 4, 7] = float(bad)
    dirty = kernels(of)
    assert not dirty["output"][1, :, 5, 8].isfinite().any()
    assert not dirty["grad_input"][0, :, 4, 7].isfinite().any()
    assert not dirty["grad_weight"][:, 3].isfinite().any()
    assert not dirty["grad_weight"][2].isfinite().any()
    dirty["output"][1, :, 5, 8] = clean["output"][1, :, 5, 8]
    dirty["grad_input"][0, :, 4, 7] = clean["grad_input"][0, :, 4, 7]
    dirty["grad_weight"][:, 3], dirty["grad_weight"][2] = clean["grad_weight"][:, 3], clean["grad_weight"][2]
    for name in ("output", "grad_input", "grad_weight"):
        assert torch.equal(dirty[name], clean[name]), name


@pytest.mark.parametrize("channels", [1, 3, 8, 13, 40])
@pytest.mark.parametrize("window", [SAME_3X3, SAME_5X5, DOWN_4X4, TRANSPOSED_4X4])
def test_what_is_not_finite_reaches_windows_around_it_alone(window, channels):
    shape = {"in_channels": channels, "out_channels": channels, "height": 12, "width": 14, "pending": "stored"}
    of = Arguments(Case(dtype=torch.bfloat16, **shape, **window))
    of.stored[1, 0, 5, 8] = of.grad_output[0, 0, 4, 3] = float("nan")
    results = kernels(of)
    bad = of.stored[:, :1].isnan().float().requires_grad_()
    reached = torch.convolution(bad, torch.ones(1, 1, *of.case.kernel), None, *of.case.geometry[:6])
    assert torch.equal(results["output"].isnan(), (reached > 0).expand(results["output"].shape))
    (reached,) = torch.autograd.grad(reached, bad, of.grad_output[:, :1].isnan().float())
    assert torch.equal(results["grad_input"].isnan(), (reached > 0).expand(results["grad_input"].shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_any_strides(dtype):
    of = Arguments(Case(dtype=dtype))
    expected = kernels(of)
    strided = torch.zeros(3, 20, 4, 18, dtype=dtype).permute(3, 1, 0, 2)[1:17, 2:18, 1:2, 1:2]
    strided.copy_(of.weight)
    turned = of.weight.transpose(0, 1).clone().transpose(0, 1)
    for weight in (strided, turned):
        of.weight = weight
        for name, result in kernels(of).items():
            assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize(
    ("geometry", "taken"),
    [
        (Geometry(), True),
        (Geometry(stride=(2, 1), padding=(0, 5), dilation=(3, 2)), True),
        (Geometry(transposed=True, output_padding=(1, 0), stride=(2, 1)), True),
        (Geometry(groups=2), False),
        (Geometry(upsampled=True), False),
    ],
)
def test_takes_whatever_has_no_groups(geometry, taken):
    assert direct.takes(geometry, torch.empty(64, 16, 2, 5), torch.Size((2, 16, 8, 8))) is taken


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kernel": (0, 1)},
            "kernel, stride and dilation must be at least 1, paddings at least 0; got 0, 1, 1, 0 and 0",
        ),
        ({"stride": (1, 0)}, "must be at least 1, paddings at least 0; got 3, 0, 1, 0 and 0"),
        ({"padding": (-1, 0)}, "paddings at least 0; got 3, 1, 1, -1 and 0"),
        ({"kernel": (5, 3)}, "the output would be empty; got a map of 4×4 and padding 0"),
        ({"input_shape": (0, 16, 4, 4)}, "batch and channels must be at least 1; got batch 0, channels 16 and 16"),
    ],
)
def test_what_is_no_convolution_is_refused_before_any_work(changes, message):
    arguments = {
        "dtype": native.Dtype.float32, "integers": False, "input_shape": (1, 16, 4, 4), "out_channels": 16,
        "kernel": (3, 3), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "output_padding": (0, 0),
        "transposed": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        native.Convolution.direct(*{**arguments, **changes}.values())


class Bottleneck(nn.Module):
    """As in a ResNet, with a shortcut of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.downsample = nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def test_a_converted_bottleneck_runs_its_1x1_convolutions_natively(monkeypatch):
    torch.manual_seed(0)
    plain = Bottleneck().double()
    fused = Bottleneck()
    fused.load_state_dict(plain.state_dict())
    ganvas.convert(fused)
    called = []

    def recording(name: str):
        original = getattr(NativeConvolution, name)

        def record(convolution, *arguments):
            called.append((name, convolution.kind))
            return original(convolution, *arguments)

        return record

    for name in ("forward_with_statistics", "backward_input", "backward_weight"):
        monkeypatch.setattr(NativeConvolution, name, recording(name))
    monkeypatch.setattr(cpu, "native_chain", lambda *_: None)  # one call would tell nothing
    x = torch.randn(4, 32, 16, 16, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    output, expected = fused(x), plain(exact)
    grad = torch.randn_like(output)
    output.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-3, atol=1e-4)
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-3, msg=name)
    for name in ("forward_with_statistics", "backward_input", "backward_weight"):
        assert [of for other, of in called if other == name].count(native.ConvolutionKind.direct) == 3
