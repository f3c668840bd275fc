"""A converted module lives on: copies, files, modes, hooks, edits, compilers, other callers."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from networks import BasicBlock, TimmBlock
from torch import nn
from torch.nn.utils import parametrize

from cifar_resnet import CifarBlock, CifarResNet
from ganvas.nn import convert, revert, statistics_groups
from ganvas.nn.traced_forward import TracedForward

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
Y = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(4))


def converted(model: nn.Module) -> nn.Module:
    assert convert(model).fused
    return model


def plain_twin(model: nn.Module) -> nn.Module:
    return revert(copy.deepcopy(model))


def assert_as_plain(model: nn.Module, x: torch.Tensor) -> None:
    torch.testing.assert_close(model(x), plain_twin(model)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent_and_run_fused_themselves(clone):
    model = converted(CifarResNet(1, 8))
    copied = clone(model)
    assert type(copied) is CifarResNet
    assert isinstance(copied.forward, TracedForward)
    assert torch.equal(copied.eval()(X), model.eval()(X))
    with torch.no_grad():
        copied.linear.weight.zero_()
    assert model.linear.weight.any()
    assert not torch.equal(copied(X), model(X))
    assert convert(copied).fused == convert(model).fused


def test_a_copys_gradients_and_statistics_are_its_own():
    model = converted(CifarResNet(1, 8))
    statistics = model.bn1.running_mean.clone()
    copied = copy.deepcopy(model)
    copied(X).sum().backward()
    assert model.conv1.weight.grad is None
    assert torch.equal(model.bn1.running_mean, statistics)
    assert copied.conv1.weight.grad is not None


def test_state_dicts_pass_between_converted_and_plain():
    model, plain = converted(CifarResNet(1, 8)), CifarResNet(1, 8)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(model.eval()(X), plain.eval()(X), rtol=1e-4, atol=1e-5)


def test_a_converted_model_dies_with_its_last_reference():
    model = converted(CifarResNet(1, 8))
    model(X)
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None, "no reference cycle: the memory is free at once"
    finally:
        gc.enable()


def test_a_forward_whose_module_is_gone_says_so():
    forward = converted(BasicBlock(4, 4)).forward
    with pytest.raises(ReferenceError, match="the module that this forward was bound to is gone"):
        forward(Y)


def test_revert_leaves_nothing_behind():
    model = BasicBlock(4, 4)
    attributes = set(model.__dict__)
    converted(model)(Y)
    revert(model)
    assert set(model.__dict__) == attributes


HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize(
    "name", ["conv1", "bn1", "layer1", "layer1.0", "layer1.0.bn2", "layer2.0.shortcut.1", "linear"]
)
def test_hooks_added_later_fire(name, register):
    model, fired = converted(CifarResNet(1, 8)), []
    model(X)
    handle = getattr(model.get_submodule(name), register)(lambda *_: fired.append(name))
    model(X).sum().backward()
    assert fired == [name]
    handle.remove()
    model(X).sum().backward()
    assert fired == [name]


def test_a_hook_on_an_identity_or_on_a_shared_activation_fires():
    model, fired = converted(TimmBlock(4, 4)), []
    model.drop_block.register_forward_hook(lambda *_: fired.append("identity"))
    model(Y)
    block = converted(BasicBlock(4, 4))
    block.relu.register_forward_hook(lambda *_: fired.append("relu"))
    block(Y)
    assert fired == ["identity", "relu", "relu"]


def test_a_hooks_output_replaces_the_blocks():
    model = converted(CifarResNet(1, 8))
    model.layer3.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    torch.testing.assert_close(model(X), model.linear.bias.expand(4, -1))


def test_global_hooks_see_what_they_see_in_plain_torch():
    model = converted(CifarResNet(1, 8))
    plain = plain_twin(model)
    seen: list[list[type]] = []
    for one in (model, plain):
        types: list[type] = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_, t=types: t.append(type(module)))
        try:
            one(X)
        finally:
            handle.remove()
        seen.append([nn.Sequential if issubclass(cls, nn.Sequential) else cls for cls in types])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["bn1", "layer2.0.shortcut.1"])
def test_statistics_follow_the_mode(name):
    model = converted(CifarResNet(1, 8))
    mean = model.get_submodule(name).running_mean
    before = mean.clone()
    model.eval()(X)
    assert torch.equal(mean, before)
    model.train()(X)
    assert not torch.equal(mean, before)


class _Dropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.rate = 0.5

    def forward(self, x):
        return F.dropout(F.relu(self.bn(self.conv(x))), self.rate, training=self.training)


def test_dropout_follows_the_mode():
    model = converted(_Dropout())
    assert (model(X) == 0).float().mean() > 0.6
    model.eval()
    assert_as_plain(model, X)
    model.train()
    assert (model(X) == 0).float().mean() > 0.6


def test_an_attribute_that_the_forward_reads_may_change():
    model = converted(_Dropout())
    model.rate = 0.0
    assert_as_plain(model, X)


def test_a_forward_that_keeps_changing_runs_as_it_is_written():
    model = converted(_Dropout())
    for step in range(30):
        model.rate = 0.001 * step
        model(X)
    model.rate = 0.0
    assert_as_plain(model, X)
    assert len(model.forward._variants) <= 8


@pytest.mark.parametrize("name", ["conv2", "bn2", "relu"])
def test_a_child_that_is_replaced_is_the_one_that_runs(name):
    model = converted(BasicBlock(4, 4))
    model(Y)
    setattr(model, name, nn.Tanh())
    assert_as_plain(model, Y)


def test_a_child_that_appears_is_called():
    model = converted(BasicBlock(4, 4))
    model.downsample = nn.Conv2d(4, 4, 1)
    assert_as_plain(model, Y)


def test_a_new_head_is_used():
    model = converted(CifarResNet(1, 8))
    model.linear = nn.Linear(model.linear.in_features, 3)
    assert model(X).shape == (4, 3)


def test_blocks_added_to_a_layer_are_run():
    model = converted(CifarResNet(1, 8)).eval()
    model.layer1.append(CifarBlock(8, 8, 1).eval())
    assert_as_plain(model, X)


def test_a_parametrization_added_later_is_applied():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = converted(BasicBlock(4, 4))
    model(Y)
    parametrize.register_parametrization(model.bn1, "weight", Double())
    x = Y.clone()
    expected = F.relu(F.batch_norm(model.conv1(x), None, None, model.bn1.weight, model.bn1.bias, training=True))
    seen = []
    model.conv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(x)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)


def test_a_forward_set_on_a_child_is_called():
    model = converted(CifarResNet(1, 8))
    model.layer3[0].forward = lambda x: torch.zeros(4, 32, 2, 2)
    torch.testing.assert_close(model(X), model.linear.bias.expand(4, -1))


def test_parameters_may_be_replaced():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.scale * torch.relu(self.bn(self.conv(x)))

    model = converted(Scaled())
    assert model(X).any()
    model.scale = nn.Parameter(torch.zeros(1))
    assert not model(X).any()
    twos = {name: torch.full_like(parameter, 2.0) for name, parameter in model.named_parameters()}
    expected = torch.func.functional_call(plain_twin(model), twos, (X,))
    torch.testing.assert_close(torch.func.functional_call(model, twos, (X,)), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_frozen_keeps_its_statistics():
    model = converted(CifarResNet(1, 8))
    model.layer1.eval()
    before = model.layer1[0].bn1.running_mean.clone()
    model(X)
    assert torch.equal(model.layer1[0].bn1.running_mean, before)
    assert model.layer2[0].bn1.num_batches_tracked == 1


class _Options(nn.Module):
    """Arguments beside the image."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x, scale, offset=None, negate: bool = False):
        x = F.relu(self.bn(self.conv(x))) * scale
        if offset is not None:
            x = x + offset
        return -x if negate else x


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model(X, torch.full((1,), 2.0)),
        lambda model: model(X, scale=torch.full((1,), 2.0)),
        lambda model: model(scale=torch.full((1,), 2.0), x=X),
        lambda model: model(X, 2.0),
        lambda model: model(X, torch.full((1,), 2.0), torch.ones(1)),
        lambda model: model(X, 2.0, negate=True),
        lambda model: model(X, torch.full((1,), 2.0), offset=1.0, negate=True),
    ],
)
def test_arguments_given_in_any_way(call):
    model = converted(_Options())
    torch.testing.assert_close(call(model), call(plain_twin(model)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arguments", [(), (X,), (X, 1.0, None, False, 2)])
def test_wrong_arguments_are_pythons_own_error(arguments):
    with pytest.raises(TypeError, match="argument"):
        converted(_Options())(*arguments)


def test_the_signature_is_the_forwards_own():
    assert list(inspect.signature(converted(_Options()).forward).parameters) == ["x", "scale", "offset", "negate"]


def test_a_data_parallel_replica_runs_its_own_children():
    model = converted(BasicBlock(4, 4)).eval()
    expected = model(Y)
    replica = model._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(child) for name, child in model._modules.items()}
    with torch.no_grad():
        replica._modules["conv1"].weight.zero_()
    assert not torch.allclose(replica(Y), expected)
    assert torch.equal(model(Y), expected)


def test_to_changes_the_dtype():
    model = converted(CifarResNet(1, 8))
    assert model.to(torch.bfloat16)(X.bfloat16()).dtype is torch.bfloat16


def test_under_autocast_the_result_has_torchs_dtype():
    model = converted(CifarResNet(1, 8)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = model(X), plain_twin(model)(X)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_a_residual_that_broadcasts_or_is_of_another_dtype_is_added_as_torch_does():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x, residual):
            return torch.relu(self.bn(self.conv(x)) + residual)

    model = converted(Broadcast())
    for residual in (torch.randn(4, 1, 1), torch.randn(4, 4, 8, 8).double(), torch.randn(2, 1, 4, 8, 8)[:, :, :]):
        got, expected = model(X, residual), plain_twin(model)(X, residual)
        assert got.dtype is expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_statistics_groups_reach_what_is_part_of_a_trace():
    class Discriminator(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Flatten())

        def forward(self, x):
            return self.body(x).mean(1)

    model = converted(Discriminator())
    one_by_one = copy.deepcopy(model)
    groups = [X, 3 + 2 * X]
    expected = torch.cat([one_by_one(group) for group in groups])
    with statistics_groups(model, 2):
        torch.testing.assert_close(model(torch.cat(groups)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(model.named_buffers()), dict(one_by_one.named_buffers()), rtol=1e-4, atol=1e-5)


def _compiled(model: nn.Module):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def test_compiles_in_one_graph_and_follows_the_mode():
    model = converted(CifarResNet(1, 8))
    eager = copy.deepcopy(model)
    compiled = _compiled(model)
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            got, expected = compiled(X), eager(X)
        got.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(got, expected)
    for (name, parameter), twin in zip(model.named_parameters(), eager.parameters()):
        torch.testing.assert_close(parameter.grad, twin.grad, rtol=1e-4, atol=1e-4, msg=name)
    model.eval(), eager.eval()
    torch.testing.assert_close(compiled(X), eager(X))


def test_a_compiled_model_notices_a_new_child():
    model = converted(BasicBlock(4, 4)).eval()
    compiled = _compiled(model)
    compiled(Y)
    model.conv2 = nn.Conv2d(4, 4, 1)
    torch.testing.assert_close(compiled(Y), plain_twin(model)(Y), rtol=1e-4, atol=1e-5)


def test_exports_with_the_fused_operations():
    model = converted(CifarResNet(1, 8)).eval()
    program = torch.export.export(model, (X,))
    assert any("ganvas" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(X), model(X))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_torch_jit_sees_every_operation(grad_enabled):
    model = converted(CifarResNet(1, 8)).eval()
    with torch.set_grad_enabled(grad_enabled):
        traced = torch.jit.trace(model, X, check_trace=False)
        torch.testing.assert_close(traced(2 * X), model(2 * X), rtol=1e-4, atol=1e-5)


def test_fx_traces_the_plain_layers():
    model = converted(CifarResNet(1, 8)).eval()
    traced = torch.fx.symbolic_trace(model)
    assert {"conv1", "bn1", "layer1.0.bn2"} <= {node.target for node in traced.graph.nodes if node.op == "call_module"}
    torch.testing.assert_close(traced(X), model(X), rtol=1e-4, atol=1e-5)


def test_double_backward_of_a_gradient_penalty():
    # Not 4 channels: there torch 2.13's own second gradient of a 1x1 convolution of stride 2 in channels_last is wrong.
    model = converted(CifarResNet(1, 8))
    plain = plain_twin(model)
    results = []
    for one in (model, plain):
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(one(x).sum(), x, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        penalty.backward()
        results.append([penalty.detach(), *(p.grad for p in one.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_inference_mode():
    model = converted(CifarResNet(1, 8)).eval()
    with torch.inference_mode():
        inside = model(X)
    torch.testing.assert_close(inside, model(X))


def test_a_convolution_that_torch_breaks_on_in_channels_last_gets_contiguous_tensors():
    """oneDNN writes past its memory there (its issue 6035): wrong gradients, in time a crash."""

    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            self.bare = nn.Conv2d(4, 8, 1, 2)
            self.normed = nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.BatchNorm2d(8))

        def forward(self, x):
            x = self.stem(x)
            return self.bare(x) + self.normed(x)

    model = converted(Shortcut())
    exact = plain_twin(model).double()
    grad = torch.randn(4, 8, 4, 4)
    model(X).backward(grad)
    exact(X.double()).backward(grad.double())
    for (name, parameter), twin in zip(model.named_parameters(), exact.parameters()):
        torch.testing.assert_close(parameter.grad.double(), twin.grad, rtol=1e-3, atol=1e-3, msg=name)
