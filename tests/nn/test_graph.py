"""Which layers of a traced forward become one run, and which runs one step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ganvas.nn.graph import FusedForward, fuse
from ganvas.nn.tracing import trace


class _Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.norm, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.act, self.act_ = nn.LeakyReLU(0.2), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.linear = nn.Linear(4, 4)
        self.opaque = _Opaque()


class _Opaque(nn.Module):
    def forward(self, x):
        return x if x.mean() > 0 else x.relu_()


def _fuse(forward) -> FusedForward:
    module = type("Own", (_Layers,), {"forward": forward})()
    return fuse(module, trace(module))


def _runs(forward) -> list[str]:
    """The runs' layers, joined by ``-``, in the order in which they end."""
    return ["-".join(group.types) for group in _fuse(forward).groups]


def _lines(forward) -> list[int]:
    """How many runs each step has."""
    return [len(line.runs) for line in _fuse(forward).lines]


ACTIVATIONS = {
    "F.relu": lambda x: F.relu(x),
    "F.relu, in place": lambda x: F.relu(x, inplace=True),
    "F.relu_": lambda x: F.relu_(x),
    "torch.relu": lambda x: torch.relu(x),
    "torch.relu_": lambda x: torch.relu_(x),
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "F.leaky_relu, in place": lambda x: F.leaky_relu(x, negative_slope=0.2, inplace=True),
    "F.leaky_relu_": lambda x: F.leaky_relu_(x, 0.2),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_way_to_call_an_activation(name):
    activation = ACTIVATIONS[name]
    fused = _fuse(lambda self, x: activation(self.norm(self.conv(x))))
    (group,) = fused.groups
    assert group.types[:2] == ("Conv2d", "BatchNorm2d")
    assert len(group.types) == 3
    assert group.names == ("conv", "norm")
    assert getattr(group.run.activation, "negative_slope", 0.0) == (0.2 if "leaky" in name else 0.0)
    assert _runs(lambda self, x: self.norm(activation(self.up(x))))[0].startswith("ConvTranspose2d-")


def test_both_orders_and_their_remains():
    assert _runs(lambda self, x: self.act(self.norm(self.conv(x)))) == ["Conv2d-BatchNorm2d-LeakyReLU"]
    assert _runs(lambda self, x: self.norm(self.act(self.conv(x)))) == ["Conv2d-LeakyReLU-BatchNorm2d"]
    assert _runs(lambda self, x: self.norm(x)) == ["BatchNorm2d"]
    assert _runs(lambda self, x: self.act(self.conv(x))) == ["Conv2d-LeakyReLU"]
    assert _runs(lambda self, x: self.conv(x)) == []


def test_an_in_place_activation_keeps_writing_to_a_tensor_from_outside():
    assert _runs(lambda self, x: self.norm(self.act_(x))) == ["BatchNorm2d"]
    assert _runs(lambda self, x: self.norm(torch.relu_(x))) == ["BatchNorm2d"]


def _twice(self, x):
    y = self.norm(self.conv(x))
    return self.act(y) + y


def test_a_value_that_is_read_twice_ends_a_run():
    assert _runs(_twice) == ["Conv2d-BatchNorm2d"]


def _returned(self, x):
    y = self.norm(self.conv(x))
    return y, self.act(y)


def test_a_value_that_is_returned_ends_a_run():
    assert _runs(_returned) == ["Conv2d-BatchNorm2d"]


def _iadd(self, x):
    out = self.norm(self.conv(x))
    out += x
    return self.act(out)


def _add_method(self, x):
    return self.norm(self.conv(x)).add_(x).relu_()


@pytest.mark.parametrize(
    "forward",
    [
        _iadd,
        lambda self, x: self.act(self.norm(self.conv(x)) + x),
        lambda self, x: self.act(x + self.norm(self.conv(x))),
        lambda self, x: self.act(torch.add(x, self.norm(self.conv(x)))),
        lambda self, x: self.act(self.norm(self.conv(x)).add(x)),
        lambda self, x: self.norm(self.conv(x)) + x,
        _add_method,
    ],
)
def test_every_way_to_add_a_residual(forward):
    (group,) = _fuse(forward).groups
    assert group.types[:3] == ("Conv2d", "BatchNorm2d", "add")
    assert group.run.norm is not None


def _writes_to_the_residual(self, x):
    y = x * 2
    y += self.norm(self.conv(x))
    return torch.relu(y), x


@pytest.mark.parametrize(
    "forward",
    [
        _writes_to_the_residual,
        lambda self, x: self.act(torch.add(self.norm(self.conv(x)), x, alpha=2)),
        lambda self, x: self.act(self.norm(self.conv(x)) + 1.0),
        lambda self, x: self.act(self.norm(self.conv(x)) - x),
        lambda self, x: self.act(self.norm(self.act(self.conv(x))) + x)[0],
    ],
)
def test_what_is_no_residual_is_left_to_torch(forward):
    assert "add" not in _fuse(forward).groups[0].types


def _doubled(self, x):
    y = self.norm(self.conv(x))
    return self.act(y + y)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x + self.act(self.norm(self.conv(x))),
        lambda self, x: self.act_(self.norm(self.conv(x))) + x,
        lambda self, x: F.relu(self.norm(self.conv(x))).add(x),
    ],
)
def test_a_residual_may_be_added_to_the_activation(forward):
    fused = _fuse(forward)
    (group,) = fused.groups
    assert group.types[-1] == "add"
    assert group.run.adds_last
    assert fused.lines[0].adds == (0,)


def test_a_norm_adds_rather_than_an_activation():
    fused = _fuse(lambda self, x: self.act(self.norm(self.conv(x))) + self.norm2(self.up(x)))
    assert ["-".join(group.types) for group in fused.groups] == [
        "Conv2d-BatchNorm2d-LeakyReLU", "ConvTranspose2d-BatchNorm2d-add",
    ]  # fmt: skip


def test_a_sum_with_itself_is_no_residual():
    assert _runs(_doubled) == ["Conv2d-BatchNorm2d"]


def test_norms_on_both_sides_of_a_sum():
    assert _runs(lambda self, x: self.act(self.norm(self.conv(x)) + self.norm2(self.up(x)))) == [
        "ConvTranspose2d-BatchNorm2d",
        "Conv2d-BatchNorm2d-add-LeakyReLU",
    ]


def test_layers_called_with_more_than_a_tensor_are_left():
    assert _runs(lambda self, x: self.norm(self.up(x, output_size=(8, 8)))) == ["BatchNorm2d"]


def test_runs_that_follow_each_other_are_one_step():
    assert _lines(lambda self, x: self.act(self.norm2(self.up(self.act(self.norm(self.conv(x))))))) == [2]
    assert _lines(lambda self, x: self.act(self.norm2(self.up(self.pool(self.norm(self.conv(x))))))) == [2]
    assert _lines(lambda self, x: self.act(self.norm2(self.up(torch.tanh(self.norm(self.conv(x))))))) == [1, 1]


def test_a_convolution_that_nothing_follows_belongs_to_its_neighbours():
    forward = lambda self, x: self.up(self.act(self.norm(self.conv(x)))) + x  # noqa: E731
    assert _lines(forward) == [2]
    assert _runs(forward) == ["Conv2d-BatchNorm2d-LeakyReLU"]
    assert _lines(lambda self, x: self.act(self.norm(self.conv(x))) @ self.linear(x)) == [1]


POOLINGS = {
    "MaxPool2d": lambda self, x: self.pool(x),
    "F.max_pool2d": lambda self, x: F.max_pool2d(x, 2),
    "F.max_pool2d, pairs": lambda self, x: F.max_pool2d(x, kernel_size=(2, 2), stride=(2, 2)),
    "torch.max_pool2d": lambda self, x: torch.max_pool2d(x, 2),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_every_way_to_pool(name):
    pool = POOLINGS[name]
    for forward in (
        lambda self, x: pool(self, self.act(self.norm(self.conv(x)))),
        lambda self, x: pool(self, self.norm(self.act(self.conv(x)))),
        lambda self, x: pool(self, F.relu(self.conv(x))),
    ):
        (group,) = _fuse(forward).groups
        assert type(group.run.pool) is nn.MaxPool2d
    (group,) = _fuse(lambda self, x: pool(self, self.act(self.norm(self.conv(x)) + x))).groups
    assert group.run.pool is None


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: F.max_pool2d(x, 2, 1),
        lambda x: F.max_pool2d(x, 2, ceil_mode=True),
        lambda x: torch.max_pool2d(x, 2, 2, 0, 1, True),
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda x: F.max_pool2d(x, x.shape[-1]),
        lambda x: F.avg_pool2d(x, 2),
    ],
)
def test_other_poolings_are_left_to_torch(pool):
    assert _runs(lambda self, x: pool(self.act(self.conv(x)))) == ["Conv2d-LeakyReLU"]


@pytest.mark.parametrize("upsample", [lambda x: F.interpolate(x, scale_factor=2), nn.Upsample(scale_factor=2)])
def test_upsampling_before_a_convolution_is_part_of_its_run(upsample):
    def forward(self, x):
        self_up = self.upsample(x) if isinstance(upsample, nn.Module) else upsample(x)
        return self.act(self.norm(self.conv(self_up)))

    module = type("Own", (_Layers,), {"forward": forward})()
    if isinstance(upsample, nn.Module):
        module.upsample = upsample
    (group,) = fuse(module, trace(module)).groups
    assert type(group.run.upsample) is nn.Upsample


@pytest.mark.parametrize("options", [{"size": (8, 8)}, {"scale_factor": 3}, {"scale_factor": 2, "mode": "bilinear"}])
def test_other_upsamplings_are_left_to_torch(options):
    (group,) = _fuse(lambda self, x: self.act(self.conv(F.interpolate(x, **options)))).groups
    assert group.run.upsample is None


def _block(self, x):
    x = self.act(self.norm(x))
    out = self.act(self.norm(self.conv(x)))
    out = self.norm2(self.up(out))
    out += x
    return self.act(out)


def test_a_residual_block_is_one_step_with_what_it_adds():
    (line,) = _fuse(_block).lines
    assert [run.names for run in line.runs] == [("norm", "act"), ("conv", "norm", "act"), ("up", "norm2", "act")]
    assert line.adds == (None, None, 1)


def _blocks(self, x):
    x = self.act(self.norm(self.conv(x)))
    x = self.act(self.norm2(self.up(x)) + x)
    x = self.act(self.norm2(self.up(x)) + x)
    return self.norm(self.conv(x))


def _shortcut(self, x):
    x = self.act(self.norm(self.conv(x)))
    x = self.act(self.norm2(self.up(x)) + self.norm(self.conv(x)))
    return self.act(self.norm2(self.up(x)) + x)


def _read_twice(self, x):
    x = self.act(self.norm(self.conv(x)))
    return self.act(self.norm2(self.up(x)) + x), x


def _added_twice(self, x):
    x = self.act(self.norm(self.conv(x)))
    y = self.act(self.norm2(self.up(x)) + x)
    return self.act(self.norm2(self.up(y)) + x)


def _written_between(self, x):
    x = self.act(self.norm(self.conv(x)))
    y = self.norm2(self.up(x))
    x.mul_(2)
    return self.act(y + x)


@pytest.mark.parametrize(
    ("forward", "adds"),
    [
        (_blocks, [(None, 1, 2, None)]),
        (_shortcut, [(None,), (None,), (None, 1)]),  # the block with a shortcut adds what comes from outside
        (_read_twice, [(None,), (0,)]),
        (_added_twice, [(None,), (0, None)]),
        (_written_between, [(None,)]),
    ],
)
def test_blocks_that_follow_each_other_are_one_step(forward, adds):
    assert [line.adds for line in _fuse(forward).lines] == adds


def _disturbed(write):
    """A write between the layers of a run, to what they read."""

    def forward(self, x):
        y = self.pool(x)
        z = self.norm(self.conv(y))
        write(self, y)
        return self.act(z)

    return forward


@pytest.mark.parametrize(
    "write",
    [
        lambda self, y: y.mul_(2),
        lambda self, y: F.relu(y, inplace=True),
        lambda self, y: torch.relu_(y),
        lambda self, y: self.act_(y),
        lambda self, y: self.opaque(y),
        lambda self, y: y.__iadd__(1),
        lambda self, y: torch.mul(y, 2, out=y),
        lambda self, y: self.norm(y),
    ],
)
def test_layers_with_a_write_between_them_are_left_as_they_stand(write):
    forward = _disturbed(write)
    fused = _fuse(forward)
    assert ["-".join(group.types) for group in fused.disturbed][:1] == ["Conv2d-BatchNorm2d-LeakyReLU"]
    module = type("Own", (_Layers,), {"forward": forward})().double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    expected = module(x.clone())
    module.load_state_dict(state)
    assert torch.equal(fuse(module, trace(module)).function(module, x.clone()), expected)


@pytest.mark.parametrize("read", [lambda self, y: y * 2, lambda self, y: self.act(self.norm2(self.up(y)))])
def test_what_only_reads_may_stand_between_layers(read):
    assert _fuse(_disturbed(read)).disturbed == ()


def test_the_generated_code_reads_like_a_forward():
    assert "fused" in _fuse(_block).source
    assert "def forward(self, x):" in _fuse(_block).source
