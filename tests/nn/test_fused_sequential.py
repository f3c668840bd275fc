"""A FusedSequential computes what the nn.Sequential of the same children computes."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from ganvas.nn import ConvBNLeakyReLU, FusedSequential
from ganvas.nn.proof import prove
from ganvas.ops.selection import choose

SETTINGS = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def stacks(draw):
    """(children, input shape): blocks of convolution | transposed convolution | linear, norm and activation."""
    channels = draw(st.sampled_from([1, 3, 8]))
    images = draw(st.booleans())
    shape = (draw(st.sampled_from([2, 6])), channels, *((7, 5) if images else ()))
    children: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.sampled_from([1, 4, 8]))
        producers = [nn.Conv2d, nn.ConvTranspose2d] if images else [nn.Linear]
        producer = draw(st.sampled_from([*producers, None]))
        if producer is None:
            out = channels
        elif images:
            children.append(producer(channels, out, 3, padding=1))
        else:
            children.append(producer(channels, out))
        channels = out
        norm = (nn.BatchNorm2d if images else nn.BatchNorm1d)(
            channels,
            eps=draw(st.sampled_from([1e-5, 1e-3])),
            momentum=draw(st.sampled_from([0.1, 0.8, None])),
            affine=draw(st.booleans()),
            track_running_stats=draw(st.booleans()),
        )
        activation = draw(
            st.sampled_from([nn.LeakyReLU(0.2), nn.LeakyReLU(0.1, inplace=True), nn.ReLU(), nn.ReLU(inplace=True)])
        )
        tail = draw(st.sampled_from([[norm, activation], [activation, norm], [norm], [activation], []]))
        children += tail
        children += draw(st.sampled_from([[], [nn.Identity()], [nn.Hardtanh()]]))
    return children, shape


@given(stacks(), st.booleans())
@SETTINGS
def test_float64_is_plain_torch_bit_for_bit(step, plain_twin, stack, training):
    children, shape = stack
    fused = FusedSequential(*children).double().train(training)
    plain = plain_twin(fused)
    x = torch.randn(shape, dtype=torch.float64)
    for _ in range(2):
        got, expected = step(fused, x).tensors(), step(plain, x).tensors()
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), name


@given(stacks())
@SETTINGS
def test_float32_differs_from_plain_torch_by_rounding(stack):
    children, shape = stack
    comparisons = prove(FusedSequential(*children), torch.randn(shape)).comparisons
    assert {one.kind for one in comparisons} >= {"output", "gradient"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layouts_and_dtypes(step, plain_twin, assert_as_accurate, dtype, memory_format):
    fused = FusedSequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Conv2d(8, 2, 3)).to(dtype)
    plain, exact = plain_twin(fused), plain_twin(fused).double()
    x = torch.randn(4, 3, 9, 9).to(dtype).contiguous(memory_format=memory_format)
    assert_as_accurate(step(fused, x), step(plain, x), step(exact, x.double()))


def test_under_autocast_the_result_has_torchs_dtype(plain_twin):
    fused = FusedSequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.LeakyReLU())
    plain = plain_twin(fused)
    x = torch.randn(2, 3, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = fused(x), plain(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_state_dict_and_repr_are_an_nn_sequentials():
    children = OrderedDict(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), act=nn.ReLU())
    fused, plain = FusedSequential(children), nn.Sequential(children)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert repr(fused).replace("FusedSequential", "Sequential") == repr(plain)
    assert isinstance(fused, nn.Sequential)


def test_slices_are_fused_sequentials_of_the_same_children():
    block = ConvBNLeakyReLU(3, 4, 3)
    head = block[:2]
    assert type(head) is FusedSequential
    assert list(head.named_children()) == list(block.named_children())[:2]
    assert block[0] is block.conv


def _stack() -> FusedSequential:
    return FusedSequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))


@pytest.mark.parametrize("edit", ["setitem", "append", "delete", "setattr"])
def test_changed_children_change_what_runs(plain_twin, edit):
    fused = _stack().double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    fused(x)
    if edit == "setitem":
        fused[2] = nn.Tanh()
    elif edit == "append":
        fused.append(nn.Sigmoid())
    elif edit == "delete":
        del fused[2]
    else:
        setattr(fused, "1", nn.Identity())
    assert torch.equal(fused(x), plain_twin(fused)(x))


def test_one_module_frozen_in_evaluation_mode_keeps_its_statistics():
    fused = _stack()
    fused[1].eval()
    before = fused[1].running_mean.clone()
    fused(torch.randn(2, 3, 6, 6))
    assert torch.equal(fused[1].running_mean, before)
    assert fused[1].num_batches_tracked == 0


def test_a_norm_used_twice_updates_twice(step, plain_twin):
    norm = nn.BatchNorm1d(4)
    fused = FusedSequential(nn.Linear(4, 4), norm, nn.ReLU(), nn.Linear(4, 4), norm, nn.ReLU()).double()
    shared = nn.Sequential(*copy.deepcopy(list(fused)))  # one deepcopy of the list keeps the norm shared
    assert shared[1] is shared[4]
    x = torch.randn(5, 4, dtype=torch.float64)
    got, expected = step(fused, x).tensors(), step(shared, x).tensors()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert norm.num_batches_tracked == 2


def test_a_block_used_twice_shares_its_parameters(step):
    block = ConvBNLeakyReLU(3, 3, 3, padding=1)
    fused = FusedSequential(block, nn.Identity(), block)
    plain = nn.Sequential(block, nn.Identity(), block)
    x = torch.randn(2, 3, 6, 6)
    state = copy.deepcopy(block.state_dict())
    got = step(fused, x)
    block.load_state_dict(state)
    expected = step(plain, x)
    assert torch.equal(got.output, expected.output)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_added_after_the_first_forward_fire(position, register):
    fused, fired = _stack(), []
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    fused(x)
    getattr(fused[position], register)(lambda *arguments: fired.append(register))
    fused(x).sum().backward()
    assert fired == [register]


def test_a_hooks_output_replaces_the_layers():
    fused = _stack()
    fused[1].register_forward_hook(lambda module, inputs, output: torch.full_like(output, -1.0))
    assert torch.equal(fused(torch.randn(2, 3, 6, 6)), torch.full((2, 4, 4, 4), -0.2))


def test_global_hooks_see_every_layer():
    fused, seen = _stack(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        fused(torch.randn(2, 3, 6, 6))
    finally:
        handle.remove()
    assert seen == [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU, FusedSequential]


def test_a_hook_keeps_the_convolutions_own_output():
    fused, kept = FusedSequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2)), []
    fused[0].register_forward_hook(lambda module, inputs, output: kept.append(output))
    output = fused(torch.randn(2, 3, 6, 6))
    assert torch.equal(nn.functional.leaky_relu(kept[0], 0.2), output)


def test_a_parametrization_added_later_is_applied():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    fused = _stack().eval()
    x = torch.randn(2, 3, 6, 6)
    fused(x)
    parametrize.register_parametrization(fused[1], "weight", Double())
    assert torch.allclose(fused(x), nn.Sequential(*fused)(x), atol=1e-6)
    assert torch.equal(fused[1].weight, torch.full((4,), 2.0))


def test_a_forward_set_on_the_instance_is_called():
    fused = _stack()
    fused[2].forward = lambda x: torch.zeros_like(x)
    assert not fused(torch.randn(2, 3, 6, 6)).any()


def test_lazy_layers_initialise_themselves_and_are_fused_from_then_on(plain_twin):
    fused = FusedSequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    x = torch.randn(2, 3, 6, 6)
    fused(x)
    plain = plain_twin(fused)
    assert type(fused[1]) is nn.BatchNorm2d
    assert torch.allclose(fused(x), plain(x), atol=1e-6)


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_padding_modes(plain_twin, padding_mode):
    fused = FusedSequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=padding_mode), nn.BatchNorm2d(4), nn.ReLU())
    plain = plain_twin(fused)
    x = torch.randn(2, 3, 6, 6)
    assert torch.allclose(fused(x), plain(x), atol=1e-6)


def test_a_negative_slope_below_zero_has_torchs_gradient(step, plain_twin):
    fused = FusedSequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(-0.5)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    got, expected = step(fused, x).tensors(), step(plain_twin(fused), x).tensors()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def _stored_activations(model: nn.Module, x: torch.Tensor) -> int:
    """How many tensors as large as an activation autograd keeps for the backward pass, the input not among them."""
    stored: dict[int, int] = {}

    def pack(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    stored.pop(x.untyped_storage().data_ptr(), None)
    return sum(numel == output.numel() for numel in stored.values())


def test_an_activation_after_a_convolution_stores_no_second_tensor():
    fused = FusedSequential(*(m for _ in range(3) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.LeakyReLU(0.2))))
    x = torch.randn(2, 4, 9, 9)
    assert _stored_activations(fused, x) == 3
    assert _stored_activations(nn.Sequential(*fused), x) == 6 - 1  # the last output is stored nowhere


@pytest.mark.skipif(
    choose("batch_norm_leaky_relu", torch.ones(1, 1), None) == "reference",
    reason="plain torch stores what plain torch stores",
)
def test_a_normalised_layer_stores_two_tensors_where_torch_stores_three():
    layers = [(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2)) for _ in range(4)]
    fused = FusedSequential(*(module for layer in layers for module in layer))
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    assert _stored_activations(fused, x) == 2 * 4 - 1
    assert _stored_activations(nn.Sequential(*fused), x) == 3 * 4 - 1


def test_the_input_is_not_written_to():
    for fused in (
        FusedSequential(nn.BatchNorm1d(4), nn.ReLU(inplace=True)),
        FusedSequential(nn.ReLU(), nn.BatchNorm1d(4)),
    ):
        x = torch.randn(5, 4)
        before = x.clone()
        fused(x)
        assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("fused", "shape"),
    [
        (FusedSequential(nn.BatchNorm2d(4), nn.ReLU()), (5, 4)),
        (FusedSequential(nn.BatchNorm1d(4), nn.ReLU()), (5, 4, 3, 3)),
        (FusedSequential(nn.BatchNorm1d(4), nn.ReLU()), (1, 4)),
        (FusedSequential(nn.BatchNorm1d(4), nn.ReLU()), (5, 3)),
    ],
)
def test_an_input_that_torch_refuses_is_refused(fused, shape):
    with pytest.raises((ValueError, RuntimeError)):
        nn.Sequential(*copy.deepcopy(list(fused)))(torch.randn(shape))
    with pytest.raises((ValueError, RuntimeError)):
        fused(torch.randn(shape))


def test_inputs_that_are_no_tensor_pass_from_child_to_child():
    class Pair(nn.Module):
        def forward(self, pair):
            return pair[0] + pair[1]

    assert FusedSequential(Pair(), nn.ReLU())((torch.ones(2), -torch.ones(2))).tolist() == [0.0, 0.0]


def test_plain_torch_is_chosen_where_no_kernel_runs(caplog):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with caplog.at_level(logging.INFO, logger="ganvas"):
        output = _stack().double()(x)
    assert output.is_contiguous(), "no conversion to channels_last that torch would not make"
