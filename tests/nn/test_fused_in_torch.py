"""A FusedSequential lives with the rest of torch: copies, files, replicas, compilers, tracers, higher gradients."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

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
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
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
