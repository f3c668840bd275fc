"""The Triton convolutions, forward and to the input, against float64 beside torch's own, with every pending kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from convolution_cases import LARGER, Arguments, Case, by_torch, check_against_torch, combined, covering
from fences import fenced
from gathers import CONVOLUTIONS
from torch import Tensor

from ganvas.ops.backends.triton import convolution, gather_convolution, tf32
from ganvas.ops.backends.triton.configurations import Configuration
from ganvas.ops.backends.triton.gather import backward_gather, forward_gather, pack_weight
from ganvas.ops.convolution import Geometry
from ganvas.ops.pending import Pending, PendingGradient

SMALL = Configuration(64, 32, 32, 4, 2, group_m=3)
SMALLER = Configuration(32, 16, 16, 4, 2, group_m=1)


@pytest.mark.parametrize("case", covering(1), ids=lambda case: case.convolution)
def test_as_accurate_as_torch(accuracy, device, case):
    check_against_torch(accuracy, case, device, SMALL)


@pytest.mark.parametrize("convolution", ["3x3", "4x4_transposed", "3x3_upsampled"])
@pytest.mark.parametrize("kind", ["affine_kink", "stored"])
def test_tf32_is_as_accurate_as_rounded_operands(accuracy, device, monkeypatch, convolution, kind):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    check_against_torch(accuracy, Case(convolution, input_kind=kind, gradient_kind=kind), device, SMALL)


def test_tf32_is_rounded_to(device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    of = Arguments(Case(input_kind="stored"), device)
    rounded = of.changed(stored=tf32.rounded(of.stored), weight=tf32.rounded(of.weight))
    ours, expected = (
        convolution.forward(o.case.geometry, o.input, o.weight, o.bias, configuration=SMALL) for o in (of, rounded)
    )
    assert torch.equal(ours, expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", covering(15)[len(CONVOLUTIONS) :], ids=str)
def test_as_accurate_as_torch_in_many_combinations(accuracy, device, case):
    check_against_torch(accuracy, case, device, SMALL if case.seed % 2 else SMALLER)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", LARGER, ids=str)
@pytest.mark.parametrize("index", range(8))
def test_every_configuration_is_as_accurate_as_torch(accuracy, device, case, index):
    for choices in case.configurations():
        if index < len(choices):
            check_against_torch(accuracy, case, device, choices[index])


@pytest.mark.parametrize("kind", ["affine_kink", "kink_affine"])
def test_zero_padding_pads_the_activation(device, kind):
    of = Arguments(Case(in_channels=3, out_channels=4, input_kind=kind, has_bias=False), device)
    shifted = of.changed(stored=torch.zeros_like(of.stored), shift=torch.ones_like(of.shift))
    output = convolution.forward(shifted.case.geometry, shifted.input, torch.ones_like(of.weight), None)
    assert set(output[0, 0].flatten().tolist()) == {12.0, 18.0, 27.0}  # 4, 6 and 9 taps of 3 channels


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0, -0.5])
@pytest.mark.parametrize("kind", ["affine_kink", "kink_affine", "stored"])
def test_nan_and_infinity_go_where_torch_has_them(device, slope, kind):
    case = Case(in_channels=3, out_channels=5, slope=slope, input_kind=kind, gradient_kind=kind)
    of, on_cpu = Arguments(case, device), Arguments(case)  # cuDNN's fast algorithms spread a NaN over its neighbours
    for arguments in (of, on_cpu):
        for pixels in (arguments.stored, arguments.grad):
            pixels[0, 0, 1, 1] = float("nan")
            pixels[1, 1, 3, 3] = float("inf")
            pixels[1, 2, 5, 2] = -float("inf")
        arguments.weight.abs_().add_(0.1)
    output = convolution.forward(of.case.geometry, of.input, of.weight, of.bias, configuration=SMALL)
    grad, sums = convolution.backward_input(of.case.geometry, of.gradient, of.weight, of.input, configuration=SMALL)
    exact = by_torch(on_cpu, torch.float32)
    for name, ours in (("output", output.cpu()), ("grad_input", grad.cpu())):
        assert torch.equal(ours.isnan(), exact[name].isnan()), name
        assert torch.equal(ours == float("inf"), exact[name] == float("inf")), name
    if kind != "stored":
        assert torch.equal(sums[0].isnan().cpu(), exact["sum"].isnan())


def test_statistics_do_not_cancel(device):
    case = Case("1x1", in_channels=1, out_channels=2, images=3, input_kind="stored", size=(20, 20))
    of = Arguments(case, device)
    bias = torch.tensor([1e4, -3e4], device=device)
    output, *partial = convolution.forward_with_statistics(case.geometry, of.input, of.weight, bias, False, 1.0, 1)
    values = of.by_group(output.double())
    torch.testing.assert_close(combined(*partial)[1], values.var(2, unbiased=False), rtol=1e-3, atol=0.0)


def test_a_stored_input_has_no_kink_and_no_sums(device):
    of = Arguments(Case(input_kind="stored"), device)
    grad, sums = convolution.backward_input(of.case.geometry, of.grad, of.weight, of.input, configuration=SMALL)
    _, again = by_torch(of, torch.float32).values()
    torch.testing.assert_close(grad, again)
    assert sums.shape == (2, 1, 5)
    assert not sums.any()


def test_a_mean_that_is_not_there_is_zero(device):
    of = Arguments(Case(groups=2), device)
    without = of.input._replace(mean=None)
    zero = of.input._replace(mean=torch.zeros_like(of.mean))
    ours, expected = (
        convolution.backward_input(of.case.geometry, of.grad, of.weight, input, configuration=SMALL)[1]
        for input in (without, zero)
    )
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_weight_is_rounded_to_the_inputs_dtype(device, dtype):
    of = Arguments(Case(dtype=dtype), device)
    wide = of.weight.float() * 1.001
    arguments = {"configuration": SMALL}
    ours = convolution.forward(of.case.geometry, of.input, wide, of.bias.float(), **arguments)
    assert ours.dtype is dtype
    assert torch.equal(ours, convolution.forward(of.case.geometry, of.input, wide.to(dtype), of.bias, **arguments))


def test_the_same_bits_each_time(device):
    of = Arguments(Case(dtype=torch.bfloat16, gradient_kind="affine_kink"), device)
    first, second = (
        [
            *convolution.forward_with_statistics(of.case.geometry, of.input, of.weight, of.bias, False, 0.2, 1),
            *convolution.backward_input(of.case.geometry, of.gradient, of.weight, of.input),
        ]
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("name", ["3x3", "4x4_stride2", "4x4_transposed", "3x3_upsampled"])
def test_offsets_beyond_31_bits_find_the_same_pixels(device, monkeypatch, name):
    case = Case(name, in_channels=3, groups=2, gradient_kind="kink_affine", size=(5, 3))
    of = Arguments(case, device)

    def everything() -> list[Tensor]:
        forward = (case.geometry, of.input, of.weight, of.bias, False, 0.2, case.groups)
        backward = (case.geometry, of.gradient, of.weight, of.input)
        return [
            *convolution.forward_with_statistics(*forward, configuration=SMALLER),
            *convolution.backward_input(*backward, configuration=SMALLER),
        ]

    narrow = everything()
    monkeypatch.setattr(gather_convolution, "LEAST_WIDE_SPAN", 0)
    assert all(map(torch.equal, narrow, everything()))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("read", "written", "least"), [(64, 3, 4), (100, 33, 4), (6, 5, 2), (3, 64, 1), (8, 12, 4)])
def test_weights_are_read_as_many_at_a_time_as_pixels(read, written, least, channels_last):
    weight = torch.randn(written, read, 3, 3)
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    packed = pack_weight(weight, forward_gather(*CONVOLUTIONS["3x3"]), False, torch.float32)
    ordered = gather_convolution.in_vectors(packed)
    assert torch.equal(ordered, packed)
    tap, *rows = ordered.stride()[1:]
    assert 1 in rows
    assert tap % least == max(rows) % least == 0


FENCED = [
    Case("3x3", torch.bfloat16, 5, 17, 1, 2, gradient_kind="kink_affine"),
    Case("3x3_padding2", torch.float32, 16, 16, input_kind="kink_affine", gradient_kind="affine_kink"),
    Case("4x4_transposed", torch.float16, 3, 33, input_kind="stored"),
    Case("3x3_upsampled", torch.float32, 17, 1),
    Case("3x3_stride3_dilation2", torch.float32, 33, 5),
    Case("5x5_stride2", torch.bfloat16, 16, 3, channels_last_weight=True),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's memory is fenced; on a GPU memcheck looks")
@pytest.mark.parametrize("at_end", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("case", FENCED, ids=lambda case: case.convolution)
def test_nothing_outside_the_arrays_is_touched(monkeypatch, case, at_end):
    def fence(values: Tensor) -> Tensor:
        return fenced(values, at_end)

    def fence_all(values):
        return type(values)(*(fence(v) if isinstance(v, Tensor) else v for v in values))

    partials_of = gather_convolution._partials
    monkeypatch.setattr(
        gather_convolution, "_partials",
        lambda *arguments: (lambda made: made if made is None else fence_all(made))(partials_of(*arguments)),
    )  # fmt: skip
    of = Arguments(case)
    kernel = CONVOLUTIONS[case.convolution][1]
    for gather, read, like in (
        (forward_gather(case.geometry, kernel), of.input, of.grad),
        (backward_gather(case.geometry, kernel), of.gradient, of.stored),
    ):
        packed = pack_weight(of.weight, gather, case.geometry.transposed, case.dtype)
        pending = read if isinstance(read, (Pending, PendingGradient)) else Pending(read)
        after = gather_convolution.StatisticsOf(True, 0.2)
        if like is of.stored:
            after = fence_all(of.input) if of.input.scale is not None else None
        bias = fence(of.bias) if like is of.grad else None
        output = fence(torch.full_like(like, float("nan")))
        configuration = SMALLER if case.in_channels == 16 else SMALL
        gather_convolution.gather_convolution(
            gather, fence_all(pending), fence(gather_convolution.in_vectors(packed)), bias, output, case.groups, after,
            configuration,
        )  # fmt: skip
        assert not output.isnan().any()


BAD = {
    "groups must divide the batch of 2; got 3": {"groups": 3},
    r"weight \(17, 4, 3, 3\) takes 4 channels; the input has 5": {"weight": torch.empty(17, 4, 3, 3)},
    r"bias must have shape \(17,\)": {"bias": torch.empty(5)},
    "input.stored must be channels_last": {"input": Pending(torch.empty(2, 5, 7, 6))},
    "take groups=1; got 5": {"geometry": Geometry(groups=5), "weight": torch.empty(5, 1, 3, 3)},
    "strides up to 4": {"geometry": Geometry(stride=(5, 5))},
    "nothing to compute": {"weight": torch.empty(17, 5, 9, 9)},
    "after upsampling": {"geometry": Geometry(stride=(2, 2), upsampled=True)},
    "4 dimensions": {"weight": torch.empty(17, 5, 3)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    of = Arguments(Case(input_kind="stored"))
    arguments = {
        "geometry": of.case.geometry, "input": of.input, "weight": of.weight, "bias": of.bias,
        "activation_first": False, "negative_slope": 0.2, "groups": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        convolution.forward_with_statistics(**{**arguments, **BAD[message]})


def test_bad_gradients_and_dtypes_are_named():
    of = Arguments(Case(gradient_kind="affine_kink"))
    arguments = (of.weight, of.input)
    with pytest.raises(TypeError, match=r"grad_output must be of the input's dtype, torch.float32; got torch.float16"):
        convolution.backward_input(of.case.geometry, of.grad.half(), *arguments)
    with pytest.raises(ValueError, match=r"grad_output.grad must have shape \(2, 17, 7, 6\)"):
        convolution.backward_input(of.case.geometry, of.gradient._replace(grad=of.grad[:1]), *arguments)
    with pytest.raises(ValueError, match=r"grad_output.alpha must have shape \(1, 17\)"):
        convolution.backward_input(of.case.geometry, of.gradient._replace(alpha=of.alpha[:, :5]), *arguments)
    with pytest.raises(TypeError, match=r"float32, bfloat16 and float16; got torch.float64"):
        convolution.forward(of.case.geometry, Pending(of.stored.double()), of.weight, None)
    with pytest.raises(TypeError, match=r"input.shift must be a float32 tensor; got torch.float64"):
        convolution.forward(of.case.geometry, of.input._replace(shift=of.shift.double()), of.weight, None)


def test_what_it_takes_and_what_not():
    weight, shape = torch.empty(17, 5, 3, 3), torch.Size((2, 5, 7, 6))
    assert convolution.takes(Geometry(), weight, shape, torch.float32) is None
    assert "float64" in convolution.takes(Geometry(), weight, shape, torch.float64)
    many = torch.Size((2**20, 5, 64, 64))
    assert "pixels" in convolution.takes(Geometry(), weight, many, torch.float32)
    large = torch.Size((1, 5, 2**15, 2**15))
    assert "values" in convolution.takes(Geometry(), weight, large, torch.float32)


@pytest.mark.parametrize("case", [*LARGER, *(replace(case, images=512, size=(64, 64)) for case in LARGER)], ids=str)
def test_few_configurations_are_worth_measuring(case):
    for choices in case.configurations():
        assert 2 <= len(choices) <= 8
        assert len(set(choices)) == len(choices)


def test_many_pixels_take_larger_tiles_than_few():
    weight, geometry = torch.Size((128, 128, 3, 3)), Geometry(padding=(1, 1))
    many, few = (
        convolution.configurations(geometry, weight, torch.Size((batch, 128, 16, 16)), torch.bfloat16, "forward")[0]
        for batch in (512, 8)
    )
    assert many.block_m * many.block_n > few.block_m * few.block_n
