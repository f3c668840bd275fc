"""One forward over several groups does what one forward per group does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ganvas.nn import ConvBNLeakyReLU, FusedSequential, LinearBNLeakyReLU, statistics_groups, supports_statistics_groups


def _discriminator(**norm) -> FusedSequential:
    return FusedSequential(
        ConvBNLeakyReLU(3, 8, 3, padding=1, **norm),
        nn.Sequential(nn.MaxPool2d(2), ConvBNLeakyReLU(8, 8, 3, order="conv_act_bn", **norm)),
        nn.Flatten(),
        LinearBNLeakyReLU(8 * 2 * 2, 4, **norm),
        nn.Linear(4, 1),
    )


def _one_by_one(model, leaves):
    return torch.cat([model(leaf) for leaf in leaves])


def _grouped(model, leaves):
    with statistics_groups(model, len(leaves)):
        return model(torch.cat(leaves))


def _results(forward, model, groups):
    """Output and the groups' gradients; the parameters' gradients; the buffers."""
    leaves = [group.clone().requires_grad_() for group in groups]
    output = forward(model, leaves)
    output.square().sum().backward()
    passed = [output.detach(), *(leaf.grad for leaf in leaves)]
    return passed, [parameter.grad for parameter in model.parameters()], list(model.buffers())


def _assert_equal_up_to_rounding(got, expected, dtype):
    for part, part_expected in zip(got, expected):
        assert len(part) == len(part_expected)
        # A gradient that cancels to nothing (of a bias before a norm) is rounding noise of its neighbours' size.
        largest = max((tensor.abs().max().item() for tensor in part_expected), default=0.0)
        for tensor, tensor_expected in zip(part, part_expected):
            torch.testing.assert_close(tensor, tensor_expected, rtol=0, atol=64 * torch.finfo(dtype).eps * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "norm",
    [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}],
    ids=["default", "cumulative average", "no running statistics", "not affine"],
)
def test_groups_equal_separate_calls(dtype, count, norm):
    model = _discriminator(**norm).to(dtype)
    one_by_one = copy.deepcopy(model)
    groups = [torch.randn(5, 3, 8, 8, dtype=dtype) * (i + 1) + i for i in range(count)]
    for _ in range(2):
        expected = _results(_one_by_one, one_by_one, groups)
        got = _results(_grouped, model, groups)
    _assert_equal_up_to_rounding(got, expected, dtype)


def test_batches_are_counted_once_per_group():
    model = _discriminator()
    with statistics_groups(model, 3):
        model(torch.randn(6, 3, 8, 8))
    assert {int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")} == {3}


def test_evaluation_does_not_depend_on_groups():
    model = _discriminator().eval()
    x = torch.randn(5, 3, 8, 8)  # 5 is no multiple of 2: with fixed statistics there is nothing to split
    with statistics_groups(model, 2):
        assert torch.equal(model(x), model(x))
        inside = model(x)
    assert torch.equal(inside, model(x))


@pytest.mark.parametrize("make", ["subclass", "hook"])
def test_norms_that_run_as_modules_are_called_group_by_group(make):
    class OwnBatchNorm(nn.BatchNorm2d):
        pass

    norm = OwnBatchNorm(4) if make == "subclass" else nn.BatchNorm2d(4)
    model = FusedSequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())
    calls = []
    if make == "hook":
        norm.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[0]))
    one_by_one = copy.deepcopy(model)
    groups = [torch.randn(4, 3, 6, 6), 3 + torch.randn(4, 3, 6, 6)]
    expected = _results(_one_by_one, one_by_one, groups)
    _assert_equal_up_to_rounding(_results(_grouped, model, groups), expected, torch.float32)
    assert make == "subclass" or calls[-2:] == [4, 4]


class _OwnBatchNorm(nn.BatchNorm1d):
    pass


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), _OwnBatchNorm(3), nn.BatchNorm1d(3, momentum=None)])
def test_a_batch_that_does_not_divide_is_refused(norm):
    model = FusedSequential(norm)
    message = "statistics_groups must divide the batch of 5; got 2"
    with statistics_groups(model, 2), pytest.raises(ValueError, match=message):
        model(torch.randn(5, 3))
    assert norm.num_batches_tracked == 0


def test_the_block_ends_with_an_exception_too():
    model = _discriminator()
    with pytest.raises(KeyError), statistics_groups(model, 2):
        raise KeyError
    assert all("statistics_groups" not in module.__dict__ for module in model.modules())
    assert model.statistics_groups == 1


def test_blocks_nest():
    model = _discriminator()
    with statistics_groups(model, 4):
        with statistics_groups(model, 2):
            assert model.statistics_groups == 2
        assert model.statistics_groups == 4
    assert model.statistics_groups == 1


class _Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return x + self.norm(x)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (FusedSequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))), "0.1 (BatchNorm2d)"),
        (FusedSequential(_Residual()), "0.norm (BatchNorm2d)"),
        (FusedSequential(nn.InstanceNorm2d(3, track_running_stats=True)), "0 (InstanceNorm2d)"),
        (nn.BatchNorm2d(3), "the module itself is a BatchNorm2d"),
    ],
)
def test_a_norm_that_would_mix_the_groups_is_named(model, named):
    assert named in supports_statistics_groups(model)
    with pytest.raises(ValueError) as error, statistics_groups(model, 2):
        pass
    assert named in str(error.value)
    with statistics_groups(model, 1):
        pass
    model.eval()
    assert supports_statistics_groups(model) is None
    with statistics_groups(model, 2):
        model(torch.randn(3, 3, 4, 4))


def test_modules_that_look_at_one_sample_at_a_time_are_no_obstacle():
    model = FusedSequential(nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    assert supports_statistics_groups(model) is None


@pytest.mark.parametrize("groups", [0, -1])
def test_less_than_one_group_is_refused(groups):
    message = f"groups must be at least 1; got {groups}"
    with pytest.raises(ValueError, match=message), statistics_groups(nn.ReLU(), groups):
        pass
