"""A FusedSequential lives with the rest of torch: copies, files, replicas, compilers, tracers, higher gradients."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from cifar_resnet import CifarResNet
from ganvas.nn import ConvBNLeakyReLU, FusedSequential, convert, statistics_groups


def _model() -> FusedSequential:
    return FusedSequential(
        ConvBNLeakyReLU(3, 8, 3, padding=1, negative_slope=0.2),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, 6),
        nn.LeakyReLU(0.2),
        nn.Linear(6, 1),
    )


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent_and_compute_the_same(clone):
    model = _model()
    model(X)
    copied = clone(model)
    assert type(copied) is FusedSequential
    assert type(copied[0]) is ConvBNLeakyReLU
    assert torch.equal(copied.eval()(X), model.eval()(X))
    with torch.no_grad():
        copied[0].conv.weight.zero_()
    assert model[0].conv.weight.any()
    assert not torch.equal(copied(X), model(X))


def test_state_dicts_pass_between_fused_and_plain(plain_twin):
    model = _model()
    model(X)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain = plain_twin(_model())
    plain.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(model.eval()(X), plain.eval()(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_changes_the_dtype_after_a_forward(dtype):
    model = _model()
    model(X)
    assert model.to(dtype)(X.to(dtype)).dtype == dtype


def test_a_data_parallel_replica_runs_its_own_children():
    model = _model().eval()
    expected = model(X)
    replica = model._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(child) for name, child in model._modules.items()}
    with torch.no_grad():
        replica._modules["7"].bias.add_(1.0)
    torch.testing.assert_close(replica(X), expected + 1)
    assert torch.equal(model(X), expected)


def _small() -> FusedSequential:
    return FusedSequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 2, 3), nn.ReLU())


def _compiled(model: nn.Module):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("warm", [True, False], ids=["planned before", "planned while traced"])
def test_compiles_in_one_graph_and_once(warm):
    model = _small()
    eager = copy.deepcopy(model)
    if warm:
        model(X), eager(X)
    compiled = _compiled(model)
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got, expected = compiled(X), eager(X)
        got.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(got, expected)
    for (name, parameter), twin in zip(model.named_parameters(), eager.parameters()):
        torch.testing.assert_close(parameter.grad, twin.grad, rtol=1e-4, atol=1e-4, msg=name)
    for (name, buffer), twin in zip(model.named_buffers(), eager.buffers()):
        torch.testing.assert_close(buffer, twin, msg=name)


@pytest.mark.slow
def test_a_compiled_model_follows_mode_and_statistics_groups():
    model = _model()
    eager = copy.deepcopy(model)
    compiled = _compiled(model)
    compiled(X), eager(X)
    with statistics_groups(model, 2), statistics_groups(eager, 2):
        torch.testing.assert_close(compiled(X), eager(X))
    torch.testing.assert_close(compiled(X), eager(X))
    model.eval(), eager.eval()
    torch.testing.assert_close(compiled(X), eager(X))


def test_a_model_compiled_before_it_was_converted_still_runs():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    compiled = _compiled(model)
    x = torch.randn(5, 4)
    before = compiled(x)
    convert(model)
    torch.testing.assert_close(compiled(x), before)


@pytest.mark.parametrize("training", [True, False])
def test_exports(training):
    model = _model().train(training)
    expected = copy.deepcopy(model)(X)
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), expected)


IMAGES = torch.randn(4, 16, 10, 12, generator=torch.Generator().manual_seed(4))
CHAIN = torch.ops.ganvas.conv_bn_leaky_relu_chain.default


def _wide() -> FusedSequential:
    """With channels enough for native convolutions."""
    return FusedSequential(
        nn.Conv2d(16, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.LeakyReLU(0.2),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 16, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
    )


def _residual() -> nn.Module:
    model = CifarResNet(1, 16)
    convert(model)
    return model


def _recorded(graphs: list[torch.fx.GraphModule], backend: str = "aot_eager"):
    """A backend of torch.compile that keeps what it is given."""

    def compile(graph: torch.fx.GraphModule, inputs):
        graphs.append(copy.deepcopy(graph))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    return compile


def _chains(graph: torch.fx.GraphModule) -> int:
    return sum(node.target in (CHAIN, CHAIN.overloadpacket) for node in graph.graph.nodes)


# model, an input, and how many chains it consists of
NATIVE = {
    "Sequential": (_wide, IMAGES, 1),
    "bfloat16": (lambda: _wide().bfloat16(), IMAGES.bfloat16(), 1),
    "ResNet": (_residual, torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5)), 5),
}


def _assert_compiled_step_equals_the_eager_one(step, kind: str, backend: str) -> None:
    make, x, chains = NATIVE[kind]
    model, graphs = make(), []
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=_recorded(graphs, backend), fullgraph=True)
    got, expected = step(compiled, x), step(eager, x)
    assert [_chains(graph) for graph in graphs] == [chains]
    for (name, tensor), twin in zip(got.tensors().items(), expected.tensors().values(), strict=True):
        torch.testing.assert_close(tensor, twin, msg=name)


@pytest.mark.parametrize("kind", NATIVE)
def test_a_compiled_training_step_runs_the_native_convolutions(step, kind):
    _assert_compiled_step_equals_the_eager_one(step, kind, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("kind", NATIVE)
def test_a_training_step_compiled_by_inductor_runs_the_native_convolutions(step, kind):
    _assert_compiled_step_equals_the_eager_one(step, kind, "inductor")


@pytest.mark.parametrize("kind", ["Sequential", "bfloat16", pytest.param("ResNet", marks=pytest.mark.slow)])
def test_compiled_inference_runs_the_native_convolutions(kind):
    make, x, chains = NATIVE[kind]
    model, graphs = make(), []
    model(x)
    model.eval()
    compiled = torch.compile(model, backend=_recorded(graphs), fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    assert [_chains(graph) for graph in graphs] == [chains]
    with torch.inference_mode():
        assert torch.equal(compiled(x), model(x))


def test_one_graph_takes_batches_of_any_size(step):
    model, graphs = _wide(), []
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=_recorded(graphs), fullgraph=True, dynamic=True)
    for batch in (4, 3, 7):
        with torch._dynamo.config.patch(error_on_recompile=batch != 4):
            got = step(compiled, IMAGES.repeat(2, 1, 1, 1)[:batch])
        expected = step(eager, IMAGES.repeat(2, 1, 1, 1)[:batch])
        for (name, tensor), twin in zip(got.tensors().items(), expected.tensors().values(), strict=True):
            torch.testing.assert_close(tensor, twin, msg=name)
    assert _chains(graphs[-1]) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "strict"),
    [
        ("Sequential", False),
        ("Sequential", True),
        ("ResNet", False),
        pytest.param("ResNet", True, marks=pytest.mark.slow),
    ],
)
def test_an_exported_program_holds_the_native_convolutions_after_a_round_trip(kind, training, strict):
    make, x, chains = NATIVE[kind]
    model = make().train(training)
    twin = copy.deepcopy(model)
    batch = {0: torch.export.Dim("batch", max=64)}
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=(batch,), strict=strict), file)
    file.seek(0)
    program = torch.export.load(file)
    assert _chains(program.graph_module) == chains
    loaded = program.module()
    for images in (x, torch.cat([x, x + 1])):
        torch.testing.assert_close(loaded(images), twin(images))
    expected = dict(twin.named_buffers())
    for name, buffer in loaded.named_buffers():
        torch.testing.assert_close(buffer, expected[name], msg=name)


def test_an_exported_program_can_be_trained():
    model = _wide()
    loaded = torch.export.export(copy.deepcopy(model), (IMAGES,)).module()
    for net in (model, loaded):
        net(IMAGES).square().mean().backward()
    for (name, parameter), twin in zip(loaded.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad, msg=name)


def test_fx_traces_the_plain_layers():
    model = _model().eval()
    traced = torch.fx.symbolic_trace(model)
    assert {"0.conv", "0.bn", "0.act"} <= {node.target for node in traced.graph.nodes if node.op == "call_module"}
    torch.testing.assert_close(traced(X), model(X))


def test_double_backward_of_a_gradient_penalty(plain_twin):
    fused = _model()
    plain = plain_twin(fused)
    penalties = []
    for model in (fused, plain):
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        penalty.backward()
        penalties.append(penalty)
    torch.testing.assert_close(*penalties)
    for (name, parameter), twin in zip(fused.named_parameters(), plain.parameters()):
        if twin.grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, twin.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_gradgradcheck_through_a_whole_stack():
    model = FusedSequential(nn.Linear(3, 4), nn.LeakyReLU(0.2), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.ReLU()).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, x)
    assert torch.autograd.gradgradcheck(model, x)


def test_functional_calls_use_the_parameters_given():
    model = _model().eval()
    zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    assert not torch.func.functional_call(model, zeros, (X,)).any()


def test_inference_mode():
    model = _model().eval()
    with torch.inference_mode():
        inside = model(X)
    assert torch.equal(inside, model(X))
