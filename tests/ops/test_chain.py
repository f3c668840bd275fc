"""Chains of convolution, BatchNorm and LeakyReLU against the same layers one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from chains import SETTINGS, Chain, chains, compare_with_torch, everything, layer, plain, with_grad
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("ganvas._native")

from ganvas.ops.chain import Layer, can_chain, conv_bn_leaky_relu_chain


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: more would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@settings(SETTINGS, max_examples=25)
@given(chains())
def test_random_chains_are_as_accurate_as_torch(accuracy, chain):
    compare_with_torch(accuracy, chain)


@pytest.mark.slow
@settings(SETTINGS, max_examples=200)
@given(chains())
def test_many_random_chains_are_as_accurate_as_torch(accuracy, chain):
    compare_with_torch(accuracy, chain)


@pytest.mark.parametrize("norm", [True, None])
def test_pooling_alone_makes_a_chain_of_a_layer_whose_convolution_is_torchs(accuracy, norm):
    x, stem = image(4, 3, 9, 8), layer(3, 8, norm=norm)
    assert not can_chain(x, [stem])
    compare_with_torch(accuracy, Chain(x, [replace(stem, max_pool=True)], 2))


def three_layers(**options) -> list[Layer]:
    """Torch's convolution between two native ones, in both orders."""
    torch.manual_seed(0)
    return [
        layer(16, 24, bias=True, **options),
        layer(24, 16, "grouped", activation_first=True, **options),
        layer(16, 20, norm=None, bias=True, **options),
    ]


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape or (4, 16, 7, 9), generator=generator).to(dtype)


def test_the_output_is_channels_last_and_nobody_elses_memory():
    x, layers = image(), three_layers()
    output = conv_bn_leaky_relu_chain(x, layers)
    assert output.is_contiguous(memory_format=torch.channels_last)
    before = output.clone()
    conv_bn_leaky_relu_chain(image() + 1, layers)
    assert torch.equal(output, before)


def test_the_result_does_not_depend_on_whether_gradients_are_wanted():
    x, layers = image(), three_layers()[:2]  # with fixed statistics a result may differ in its last bit
    expected = conv_bn_leaky_relu_chain(x, with_grad(layers))
    assert expected.requires_grad
    with torch.no_grad():
        inside = conv_bn_leaky_relu_chain(x, with_grad(layers))
    with torch.inference_mode():
        inference = conv_bn_leaky_relu_chain(x, with_grad(layers))
    for output in (inside, inference, conv_bn_leaky_relu_chain(x, layers)):
        assert not output.requires_grad
        assert torch.equal(output, expected)


def test_statistics_made_in_inference_mode_can_be_moved():
    with torch.inference_mode():
        layers = three_layers()
        before = layers[0].running_mean.clone()
        conv_bn_leaky_relu_chain(image(), layers)
        assert not torch.equal(layers[0].running_mean, before)


PLACES = ["input", *(f"{name} {i}" for i in range(3) for name in ("weight", "bias", "bn_weight", "bn_bias"))]


@pytest.mark.parametrize(
    "wanted",
    [*({place} for place in PLACES if place not in ("bias 1", "bn_weight 2", "bn_bias 2")), {"weight 0", "bn_bias 1"}],
    ids=lambda wanted: " and ".join(sorted(wanted)),  # the same in every process
)
def test_frozen_tensors_get_no_gradient_and_the_others_the_same(wanted):
    x, layers = image(), three_layers()
    everywhere = everything(conv_bn_leaky_relu_chain, x, layers)
    x, layers = x.clone().requires_grad_("input" in wanted), with_grad(layers)
    leaves = {"input": x}
    for i, one in enumerate(layers):
        for name in ("weight", "bias", "bn_weight", "bn_bias"):
            if (tensor := getattr(one, name)) is not None:
                leaves[f"{name} {i}"] = tensor.requires_grad_(f"{name} {i}" in wanted)
    output = conv_bn_leaky_relu_chain(x, layers)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    for place, leaf in leaves.items():
        if place in wanted:
            assert torch.equal(leaf.grad, everywhere[f"grad of {place}"]), place
        else:
            assert leaf.grad is None, place


def test_a_second_backward_is_torchs_own_error_and_retain_graph_allows_it():
    layers = with_grad(three_layers())
    output = conv_bn_leaky_relu_chain(image(), layers).sum()
    output.backward(retain_graph=True)
    first = layers[0].weight.grad.clone()
    output.backward()
    assert torch.equal(layers[0].weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.backward()


@pytest.mark.parametrize("place", ["input", "weight 0", "weight 1", "weight 2", "bn_weight 0"])
def test_a_change_between_forward_and_backward_is_torchs_own_error(place):
    x, layers = image(), with_grad(three_layers())
    name, *i = place.split()
    tensor = getattr(layers[int(i[0])], name) if i else x
    output = conv_bn_leaky_relu_chain(x, layers)
    with torch.no_grad():
        tensor.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_running_statistics_moved_between_forward_and_backward_are_torchs_own_error_where_they_were_used():
    fixed = with_grad([layer(16, 16, norm=False)])
    output = conv_bn_leaky_relu_chain(image(), fixed)
    conv_bn_leaky_relu_chain(image(), [replace(fixed[0], batch_statistics=True)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_changing_the_running_statistics_is_visible_to_autograd():
    (one,) = [layer(16, 16)]
    before = one.running_mean._version, one.running_var._version
    conv_bn_leaky_relu_chain(image(), [one])
    assert one.running_mean._version > before[0]
    assert one.running_var._version > before[1]


@pytest.mark.parametrize("kind", ["double", "every second value"])
def test_running_statistics_that_no_kernel_reaches_move_all_the_same(kind):
    ours, theirs = layer(16, 24), layer(16, 24)
    mean, var = torch.zeros(48, dtype=torch.float64 if kind == "double" else None), torch.ones(48)
    if kind == "double":
        theirs, ours = replace(ours, running_mean=mean[:24].float(), running_var=var[:24].clone()), replace(
            ours, running_mean=mean[:24], running_var=var[:24].double()
        )  # fmt: skip
    else:
        theirs, ours = replace(ours, running_mean=mean[::2].clone(), running_var=var[::2].clone()), replace(
            ours, running_mean=mean[::2], running_var=var[::2]
        )  # fmt: skip
    conv_bn_leaky_relu_chain(image(), [ours], 2)
    plain(image(), [theirs], 2)
    torch.testing.assert_close(ours.running_mean.float(), theirs.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_var.float(), theirs.running_var, rtol=1e-4, atol=1e-5)


def _second_order(
    function: Callable[..., Tensor], x: Tensor, layers: Sequence[Layer], groups: int = 1, skip: bool = False
) -> list[Tensor]:
    """Gradients of a gradient penalty; with ``skip`` the input is added to what becomes of it."""
    x, layers = x.clone().requires_grad_(), with_grad(layers)
    body = x * 1.0
    output = function(body, layers, groups, body if skip else None)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    leaves = [x, *(t for one in layers for t in (one.weight, one.bias, one.bn_weight, one.bn_bias) if t is not None)]
    found = torch.autograd.grad(gradient.square().sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("norm", [True, False])
def test_gradients_of_second_order_equal_plain_torchs(norm, groups):
    torch.manual_seed(0)
    layers = [
        layer(16, 16, norm=norm, max_pool=True),
        layer(16, 20, "upsampled", norm, activation_first=True),
        layer(20, 8, "stride 2", None, bias=True),
    ]
    x = image(4, 16, 8, 8)
    ours, theirs = (_second_order(function, x, layers, groups) for function in (conv_bn_leaky_relu_chain, plain))
    for got, expected in zip(ours, theirs):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_many_images_that_are_pooled_in_turn_equal_each_alone(threads, dtype, count):
    threads(count)
    torch.manual_seed(0)
    layers = [layer(16, 64, norm=None, bias=True, max_pool=True), layer(64, 24, norm=False, max_pool=True)]
    layers = [replace(one, weight=one.weight.to(dtype)) for one in layers]
    # The first layer stores 8 MiB of it or more.
    x = image(43, 16, 36, 41, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        together = conv_bn_leaky_relu_chain(x, layers)
        alone = [conv_bn_leaky_relu_chain(one, layers) for one in x.split(1)]
    assert together.shape == (43, 24, 9, 10)
    for got, expected in zip(together.split(1), alone):
        torch.testing.assert_close(got, expected, rtol=2e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation_first", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0, 1.5, -0.5])
def test_pooled_in_evaluation_is_what_is_pooled_in_training(slope, activation_first, dtype):
    """There it is the largest of four activations; here the activation of the largest or the smallest stored value."""
    torch.manual_seed(0)
    one = layer(16, 40, norm=False, activation_first=activation_first, slope=slope, max_pool=True)
    assert one.bn_weight is not None
    one.bn_weight[::3] *= -1
    one.bn_weight[:2] = 0.0
    one = replace(one, weight=one.weight.to(dtype))
    x = image(3, 16, 12, 10, dtype=dtype)
    for at, odd in ((0, float("inf")), (1, float("-inf")), (2, float("nan"))):
        x[at, :, 5, 5] = odd
    kept = conv_bn_leaky_relu_chain(x, with_grad([one])).detach()
    with torch.inference_mode():
        found = conv_bn_leaky_relu_chain(x, [one])
    assert kept.isnan().any()
    assert kept.isfinite().any()
    torch.testing.assert_close(found, kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_gradients_of_second_order_of_a_residual_block_equal_plain_torchs(slope):
    torch.manual_seed(0)
    layers = [layer(16, 24), layer(24, 16, slope=slope)]
    ours, theirs = (_second_order(function, image(), layers, 1, True) for function in (conv_bn_leaky_relu_chain, plain))
    for got, expected in zip(ours, theirs):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def test_a_residual_alone_may_want_a_gradient():
    layers, residual = three_layers()[:1], image(4, 24, 7, 9).requires_grad_()
    output = conv_bn_leaky_relu_chain(image(), layers, 1, residual)
    output.sum().backward()
    assert torch.equal(residual.grad, torch.where(output > 0, 1.0, 0.2))


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_tensor_in_two_places_gets_the_sum_of_both_gradients(create_graph):
    torch.manual_seed(0)
    first = layer(16, 16, bias=True)
    results = []
    for function in (conv_bn_leaky_relu_chain, plain):
        (one,) = with_grad([first])
        output = function(image(), [one, replace(one, negative_slope=0.5)]).square().sum()
        results.append(torch.autograd.grad(output, [one.weight, one.bn_weight, one.bn_bias], create_graph=create_graph))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_a_weight_that_is_made_of_the_input_gets_its_gradient_once():
    results = []
    for function in (conv_bn_leaky_relu_chain, plain):
        x = image(2, 16, 6, 6).requires_grad_()
        one = replace(layer(16, 16, norm=None), weight=torch.ones(16, 16, 3, 3) * x.mean())
        results.append(torch.autograd.grad(function(x, [one]).square().sum(), x, create_graph=True)[0])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


LAYOUTS = {
    "contiguous": image(4, 16, 7, 9),
    "channels_last": image(4, 16, 7, 9).contiguous(memory_format=torch.channels_last),
    "every second image": image(8, 16, 7, 9)[::2],
    "channels sliced": image(4, 24, 7, 9).contiguous(memory_format=torch.channels_last)[:, 3:19],
    "pixels sliced": image(4, 16, 12, 13).contiguous(memory_format=torch.channels_last)[:, :, 2:9, 1:10],
    "transposed": image(4, 16, 9, 7).transpose(2, 3),
    "offset": image(4 * 16 * 63 + 1)[1:].view(4, 16, 7, 9),
    "expanded images": image(1, 16, 7, 9).expand(4, 16, 7, 9),
    "expanded pixels": image(4, 16, 1, 1).expand(4, 16, 7, 9),
    "one image": image(1, 16, 7, 9).contiguous(memory_format=torch.channels_last),
    "one pixel": image(5, 16, 1, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_same_bits(layout):
    x, layers = LAYOUTS[layout], three_layers()
    assert can_chain(x, layers)
    expected = everything(conv_bn_leaky_relu_chain, x.clone(memory_format=torch.contiguous_format), layers)
    leaf, own = x.detach().requires_grad_(), with_grad(layers)
    output = conv_bn_leaky_relu_chain(leaf, own)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(output, [leaf, own[0].weight], grad)
    assert torch.equal(output, expected["output"])
    assert torch.equal(grads[0], expected["grad of input"])
    assert torch.equal(grads[1], expected["grad of weight 0"])


def test_a_gradient_of_any_strides():
    layers = with_grad(three_layers())
    output = conv_bn_leaky_relu_chain(image(), layers)
    scalar = torch.tensor(0.5)
    grads = [
        torch.autograd.grad(output, layers[0].weight, g, retain_graph=True)[0]
        for g in (scalar.expand(output.shape), torch.full(output.shape, 0.5), torch.full_like(output, 0.5))
    ]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[1], grads[2])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weights_keep_their_layout_in_their_gradients(memory_format):
    layers = with_grad(three_layers())
    layers[0] = replace(layers[0], weight=layers[0].weight.detach().contiguous(memory_format=memory_format))
    layers[0].weight.requires_grad_()
    conv_bn_leaky_relu_chain(image(), layers).sum().backward()
    assert layers[0].weight.grad.stride() == layers[0].weight.stride()


def test_what_autograd_keeps_may_come_back_in_another_layout():
    """As from a hook that writes saved tensors to a file or to another device."""
    layers = with_grad([layer(16, 16, max_pool=True), layer(16, 16)])
    expected = everything(conv_bn_leaky_relu_chain, image(), layers)

    def unpack(kept: tuple[Tensor, int]) -> Tensor:
        return kept[0].clone(memory_format=torch.contiguous_format)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor, 0), unpack):
        got = everything(conv_bn_leaky_relu_chain, image(), layers)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_torchs_default_device_and_dtype_do_not_matter():
    x, layers = image(), [*three_layers(), layer(20, 16, "4x4 stride 2", max_pool=True), layer(16, 16, norm=False)]
    layers += [layer(16, 16, "upsampled", None)]
    expected = everything(conv_bn_leaky_relu_chain, x, layers)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            leaf, own = x.clone().requires_grad_(), with_grad(layers)
            output = conv_bn_leaky_relu_chain(leaf, own)
            output.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(output, expected["output"])
    assert leaf.grad.isfinite().all()


def test_several_gradients_at_once_equal_one_at_a_time():
    """As a Jacobian is computed: under vmap a tensor has no memory of its own."""
    layers = with_grad(three_layers())
    output = conv_bn_leaky_relu_chain(image(), layers)
    grads = torch.randn(3, *output.shape)

    def vjp(grad: Tensor) -> Tensor:
        return torch.autograd.grad(output, layers[0].weight, grad, retain_graph=True)[0]

    for got, expected in zip(torch.vmap(vjp)(grads), map(vjp, grads)):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_what_is_not_finite_in_torch_is_not_finite(bad):
    layers = [layer(16, 16, norm=None), layer(16, 16), layer(16, 16)]
    x = image(4, 16, 12, 12)
    x[1, 2, 3, 4] = float(bad)
    ours = everything(conv_bn_leaky_relu_chain, x, layers, 2)
    theirs = everything(plain, x, layers, 2)
    for name, expected in theirs.items():
        assert not ours[name].isfinite()[~expected.isfinite()].any(), name
    assert ours["output"][2:].isfinite().all(), "the other statistics group"


def test_autocast_computes_in_bfloat16_with_gradients_of_the_leaves_dtype():
    x, layers = image(), three_layers()
    with torch.autocast("cpu", torch.bfloat16):
        assert can_chain(x, layers)
        assert can_chain(x.bfloat16(), layers), "what follows another layer under autocast"
        ours = everything(conv_bn_leaky_relu_chain, x, layers)
    assert ours["output"].dtype is torch.bfloat16
    assert all(tensor.dtype is torch.float32 for name, tensor in ours.items() if name != "output")
    narrow = [
        replace(one, weight=one.weight.bfloat16(), bias=None if one.bias is None else one.bias.bfloat16())
        for one in layers
    ]
    torchs, exact = everything(plain, x.bfloat16(), narrow), everything(plain, x, layers)
    for name, tensor in ours.items():
        allowed = 2 * (torchs[name] - exact[name]).norm() + 1e-4
        assert (tensor - exact[name]).norm() <= allowed, name


def _refused() -> dict[str, tuple]:
    x, one = image(), layer(16, 16, bias=True)

    def changed(**changes) -> list[Layer]:
        return [layer(16, 16), replace(one, **changes)]

    class Subclass(Tensor):
        pass

    return {
        "float64": (x.double(), with_grad([one], torch.float64), 1),
        "half": (x.half(), with_grad([one], torch.float16), 1),
        "weights of another dtype": (x, changed(weight=one.weight.bfloat16()), 1),
        "no image": (x[:0], [one], 1),
        "no batch dimension": (x[0], [one], 1),
        "groups that do not divide the batch": (x, [one], 3),
        "other channels": (x[:, :8], [one], 1),
        "other channels later on": (x, [one, layer(8, 16)], 1),
        "a kernel larger than the padded map": (x[:, :, :2, :2], [layer(16, 16, "3x3 unpadded")], 1),
        "pooling of one pixel": (x[:, :, :1, :1], [layer(16, 16, max_pool=True)], 1),
        "one value per channel": (x[:1, :, :1, :1], [one], 1),
        "one value per channel and group": (x[:2, :, :1, :1], [one], 2),
        "few channels": (x[:, :8], [layer(8, 8)], 1),
        "a bias of another size": (x, changed(bias=torch.zeros(15)), 1),
        "a norm of another size": (x, changed(bn_weight=torch.ones(17)), 1),
        "a norm's bias of another size": (x, changed(bn_bias=torch.ones(1)), 1),
        "statistics of another size": (x, changed(running_mean=torch.ones(15)), 1),
        "variances of another size": (x, changed(running_var=torch.ones(8)), 1),
        "parameters without memory": (x, changed(bn_weight=torch.ones(16, device="meta")), 1),
        "statistics without memory": (x, changed(running_mean=torch.ones(16, device="meta")), 1),
        "a residual of another size": (x, [one], 1, x[:1]),
        "a residual of another dtype": (x, [one], 1, x.bfloat16()),
        "a residual before a kink whose side the output does not tell": (x, changed(negative_slope=-0.5), 1, x),
        "a subclass of Tensor": (x.as_subclass(Subclass), [one], 1),
        "a weight that is a subclass of Tensor": (x, changed(weight=one.weight.as_subclass(Subclass)), 1),
    }


@pytest.mark.parametrize("name", _refused())
def test_what_does_not_fit_is_left_to_torch(name):
    assert not can_chain(*_refused()[name])


def test_a_forced_reference_backend_runs_no_chain(monkeypatch):
    assert can_chain(image(), three_layers())
    monkeypatch.setenv("GANVAS_BACKEND", "reference")
    assert not can_chain(image(), three_layers())
