"""conv_bn_leaky_relu: the public op equals convolution, then normalisation, then activation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ganvas.ops import conv_bn_leaky_relu


def plain(x, weight, bias, bn_weight, bn_bias, mean, var, *, training, slope, order, **conv):
    y = F.conv2d(x, weight, bias, **conv)
    if order == "conv_act_bn":
        return F.batch_norm(F.leaky_relu(y, slope), mean, var, bn_weight, bn_bias, training)
    return F.leaky_relu(F.batch_norm(y, mean, var, bn_weight, bn_bias, training), slope)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    groups=st.sampled_from([1, 2]),
    in_channels=st.sampled_from([2, 4, 6]),
    out_channels=st.sampled_from([2, 8, 20]),
    size=st.integers(5, 12),
    kernel=st.sampled_from([1, 3, (3, 5), 4]),
    stride=st.sampled_from([1, 2, (2, 1)]),
    padding=st.sampled_from([0, 1, 2, (2, 0)]),
    dilation=st.sampled_from([1, 2]),
    training=st.booleans(),
    order=st.sampled_from(["conv_bn_act", "conv_act_bn"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_float64_equals_the_composition(
    batch, groups, in_channels, out_channels, size, kernel, stride, padding, dilation, training, order, with_bias, seed
):
    torch.manual_seed(seed)
    rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
    pad = min(padding) if isinstance(padding, tuple) else padding
    if size + 2 * pad < dilation * (max(rows, columns) - 1) + 2:
        size += dilation * max(rows, columns)
    x = torch.randn(batch, in_channels, size, size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(out_channels, in_channels // groups, rows, columns, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(out_channels, dtype=torch.float64, requires_grad=True) if with_bias else None
    gamma, beta = torch.randn(2, out_channels, dtype=torch.float64).requires_grad_().unbind()
    mean, var = torch.randn(out_channels, dtype=torch.float64), torch.rand(out_channels, dtype=torch.float64) + 0.5
    conv = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    runs = []
    for function in (
        lambda *a: conv_bn_leaky_relu(*a, training=training, order=order, negative_slope=0.2, **conv),
        lambda *a: plain(*a, training=training, order=order, slope=0.2, **conv),
    ):
        running = mean.clone(), var.clone()
        out = function(x, weight, bias, gamma, beta, *running)
        runs.append([out, *torch.autograd.grad(out.square().sum(), (x, weight)), *running])
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("in_channels", [1, 3, 16])
def test_native_path_equals_plain_torch_and_answers_in_channels_last(memory_format, in_channels):
    torch.manual_seed(0)
    x = torch.randn(4, in_channels, 9, 7).contiguous(memory_format=memory_format)
    weight, gamma, beta = torch.randn(24, in_channels, 3, 3), torch.rand(24), torch.randn(24)
    out = conv_bn_leaky_relu(x, weight, None, gamma, beta, None, None, padding=1, training=True, backend="cpu")
    expected = plain(
        x, weight, None, gamma, beta, None, None, padding=1, training=True, slope=0.01, order="conv_bn_act"
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("size", "stride"), [((3, 3), 1), ((5, 3), 1), ((4, 3), 1), ((3, 3), 2)])
def test_padding_by_words_is_torchs(padding, size, stride):
    input, weight = torch.randn(2, 16, 9, 8), torch.randn(16, 16, *size)
    arguments = (None, None, None, None, None)
    if padding == "same" and stride > 1:
        with pytest.raises(RuntimeError, match="strided"):
            conv_bn_leaky_relu(input, weight, *arguments, padding=padding, stride=stride, training=True)
        return
    ours = conv_bn_leaky_relu(input, weight, *arguments, padding=padding, stride=stride, training=True)
    convolved = F.conv2d(input, weight, None, stride, padding)
    expected = F.leaky_relu(F.batch_norm(convolved, None, None, training=True), 0.01)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_two_tensors_a_layer_are_kept_for_backward():
    """Torch keeps three: the convolution's input, its output and the normalised tensor."""
    x = torch.randn(16, 32, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(32, 32, 3, 3)
    kept: dict[int, int] = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        conv_bn_leaky_relu(x, weight, None, None, None, None, None, padding=1, training=True, backend="cpu")
    maps = [size for size in kept.values() if size >= x.untyped_storage().nbytes()]
    assert len(maps) == 2


def test_autocast_convolves_in_bfloat16_and_keeps_float32_statistics():
    x, weight = torch.randn(8, 4, 6, 6), torch.randn(6, 4, 3, 3)
    mean, var = torch.zeros(6), torch.ones(6)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv_bn_leaky_relu(x, weight, None, None, None, mean, var, training=True, backend="cpu")
    assert out.dtype is torch.bfloat16
    expected = 0.1 * F.conv2d(x, weight).mean((0, 2, 3))
    torch.testing.assert_close(mean, expected, rtol=0.05, atol=0.01)


X, W = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0], W), {}, ValueError, r"input must have shape \(N, Cin, H, W\); got \(4, 6, 6\)"),
        ((X, W[0]), {}, ValueError, r"weight must have shape \(Cout, Cin/groups, kH, kW\)"),
        ((X, W[:, :3]), {}, ValueError, "input has 4 channels, but weight .* takes 3"),
        ((X, W), {"groups": 3}, ValueError, "groups must be positive and divide Cout=8; got 3"),
        ((X, W), {"stride": 0}, ValueError, "stride must be an integer >= 1 or two of them; got 0"),
        ((X, W), {"stride": (1, -1)}, ValueError, "stride must be an integer >= 1"),
        ((X, W), {"padding": -1}, ValueError, "padding must be an integer >= 0"),
        ((X, W), {"padding": "full"}, ValueError, "'valid' or 'same'; got 'full'"),
        ((X, W), {"dilation": 0}, ValueError, "dilation must be an integer >= 1"),
        ((X, W.double()), {}, TypeError, "weight must be of the input's dtype torch.float32; got torch.float64"),
        ((X, W), {"backend": "triton"}, ValueError, "backend='triton' cannot run conv_bn_leaky_relu: .*got one on cpu"),
        ((X, W.to("meta")), {}, ValueError, "weight must be on the input's device cpu; got meta"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        conv_bn_leaky_relu(*arguments, None, None, None, None, None, training=True, **options)
