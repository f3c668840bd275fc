"""What a trace records, and what is refused since torch.fx would get it wrong in silence."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ganvas.nn.tracing import NotTraceable, trace


def _module(forward, **attributes) -> nn.Module:
    module = type("Own", (nn.Module,), {"forward": forward})()
    module.weight = nn.Parameter(torch.ones(3))
    module.register_buffer("count", torch.zeros(1))
    module.conv = nn.Conv2d(3, 3, 1)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def _no_grad(self, x):
    with torch.no_grad():
        y = self.conv(x)
    return y + x


def _autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.conv(x.float())


def _checkpoint(self, x):
    return checkpoint(self.conv, x, use_reentrant=False)


def _control_flow(self, x):
    return self.conv(x) if x.mean() > 0 else x


def _parameter_decides(self, x):
    return self.conv(x) if self.weight.sum() > 0 else x


def _python_number(self, x):
    return self.conv(x) * int(x.shape[0])


def _sets_attribute(self, x):
    self.last = self.conv(x)
    return self.last


def _sets_buffer(self, x):
    self.count = self.count + 1
    return self.conv(x)


def _appends(self, x):
    self.seen.append(x)
    return self.conv(x)


def _python_random(self, x):
    return self.conv(x) if random.random() < 0.5 else x


def _torch_random(self, x):
    return self.conv(x) if torch.rand(()) < 0.5 else x


def _noise(self, x):
    return self.conv(x) + torch.randn(3, 1, 1)


def _constant(self, x):
    return self.conv(x) + torch.arange(3.0)[:, None, None]


def _no_arguments(self, *images):
    return self.conv(images[0])


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (_no_grad, "it switches gradients, autocast or saved tensors on or off"),
        (torch.no_grad()(lambda self, x: self.conv(x)), "it switches gradients, autocast or saved tensors on or off"),
        (_autocast, "it switches gradients, autocast or saved tensors on or off"),
        (_control_flow, "it cannot be traced: symbolically traced variables cannot be used as inputs to control flow"),
        (_parameter_decides, "it cannot be traced: symbolically traced variables cannot be used as inputs to"),
        (_python_number, "it cannot be traced: "),
        (_sets_attribute, "it sets attributes: last"),
        (_sets_buffer, "it sets attributes: count"),
        (_appends, "it sets attributes: seen"),
        (_python_random, "it draws random numbers to decide what to do"),
        (_torch_random, "it draws random numbers to decide what to do"),
        (_noise, "it makes tensors that depend on no input"),
        (_constant, "it makes tensors that depend on no input"),
        (_no_arguments, "it takes no argument that is sure to be there"),
    ],
)
def test_a_forward_that_does_more_than_a_trace_holds_is_refused(forward, reason):
    module = _module(forward, seen=[])
    with pytest.raises(NotTraceable) as refused:
        trace(module)
    assert str(refused.value).startswith(reason)


def test_checkpointing_is_refused():
    with pytest.raises(NotTraceable):
        trace(_module(_checkpoint))


@pytest.mark.parametrize(
    "forward", [_sets_attribute, _sets_buffer, _appends, _python_random, _noise, _autocast, _no_grad]
)
def test_a_refusal_leaves_no_trace(forward):
    module = _module(forward, seen=[])
    attributes, buffer = dict(module.__dict__), module.count
    states = random.getstate(), torch.get_rng_state()
    with pytest.raises(NotTraceable):
        trace(module)
    assert module.__dict__ == attributes
    assert module.count is buffer
    assert buffer == 0
    assert module.seen == []
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_autocast_dtype("cpu") is torch.bfloat16


@pytest.mark.parametrize("forward", [_sets_attribute, _python_random, _control_flow, _no_grad, _noise])
def test_a_child_that_cannot_be_traced_is_called_as_it_is(forward):
    child = _module(forward)
    traced = trace(_module(lambda self, x: torch.relu(self.child(x)), child=child))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["child"]
    assert list(traced.opaque) == [child]
    assert child not in traced.inlined


def _operations(forward, **attributes) -> list[str]:
    return [str(getattr(node.target, "__name__", node.target)) for node in _nodes(forward, **attributes)]


def _nodes(forward, **attributes):
    graph = trace(_module(forward, **attributes)).graph
    return [node for node in graph.nodes if node.op not in ("placeholder", "output")]


def _in_place(self, x):
    x += self.weight
    x *= 2
    return x


def test_in_place_operators_are_recorded_as_such():
    assert _operations(_in_place) == ["weight", "iadd", "imul"]


def _asks_for_a_tensor(self, x):
    if isinstance(x, Tensor) and torch.is_tensor(x) and not hasattr(x, "tensors"):
        x = [x]
    return torch.cat(x)


def test_an_argument_is_a_tensor_when_asked():
    assert _operations(_asks_for_a_tensor) == ["cat"]


def test_arguments_with_defaults_are_left_at_them():
    def forward(self, x, mask=None, *others, scale=1.0, **options):
        return self.conv(x) if mask is None and not others and not options and scale == 1.0 else x

    assert _operations(forward) == ["conv"]


def test_constants_kept_as_attributes_are_read():
    assert _operations(lambda self, x: x + self.offset, offset=torch.ones(3)) == ["offset", "add"]


def test_parameters_and_buffers_are_read_when_called():
    assert _operations(lambda self, x: x * (self.weight * 2 + self.count)) == ["weight", "mul", "count", "add", "mul"]


def test_shapes_are_computed_when_called():
    operations = _operations(lambda self, x: x.view(x.size(0), -1)[:, : x.shape[1] // 2])
    assert operations[:2] == ["size", "view"]


def test_torchs_own_layers_are_called_and_identities_left_out():
    def forward(self, x):
        return self.block(x)

    block = nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout()), nn.Identity())
    assert _operations(forward, block=block) == ["block.1.0", "block.1.1"]


@pytest.mark.parametrize("where", ["block", "block.0"])
def test_modules_with_hooks_are_called(where):
    def forward(self, x):
        return self.block(x)

    module = _module(forward, block=nn.Sequential(nn.Identity(), nn.ReLU()))
    module.get_submodule(where).register_forward_hook(lambda *_: None)
    calls = [node.target for node in trace(module).graph.nodes if node.op == "call_module"]
    assert calls == (["block"] if where == "block" else ["block.0", "block.1"])


def test_a_module_outside_of_the_model_is_not_traced():
    stranger = nn.ReLU()
    with pytest.raises(NotTraceable, match="module is not installed as a submodule"):
        trace(_module(lambda self, x: stranger(x)))


def test_gradients_switched_off_around_the_trace_do_not_matter():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert _operations(lambda self, x: F.relu(self.conv(x))) == ["conv", "relu"]
        with pytest.raises(NotTraceable):
            trace(_module(_no_grad))
        assert not torch.is_grad_enabled()
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16
