"""convert(model, example_input) proves itself, notices a wrong operation, and leaves no trace."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ganvas.nn import ConvBNLeakyReLU, ConversionError, FusedSequential, convert, observation, proof
from ganvas.nn import run as run_module


def _model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.3),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
    )


EXAMPLE = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_right_conversion_holds_in_both_modes(dtype):
    report = convert(_model().to(dtype), EXAMPLE.to(dtype))
    assert report.proof is not None
    compared = {(one.mode, one.kind) for one in report.proof.comparisons}
    assert compared == {
        (mode, kind) for mode in ("training", "evaluation") for kind in ("output", "statistic", "gradient")
    }
    assert all(one.tolerance < 1 for one in report.proof.comparisons if one.kind != "gradient")
    gradients = {one.name for one in report.proof.comparisons if one.kind == "gradient"}
    assert gradients == {"input 0", *(name for name, _ in _model().named_parameters())}
    assert "fused against plain torch on the example input" in str(report)


WRONG = {
    "eps": lambda options: options | {"eps": options["eps"] * 1000},
    "slope": lambda options: options | {"negative_slope": options["negative_slope"] * 1.01},
    "order": lambda options: options | {"order": "conv_bn_act"},
    "momentum": lambda options: options | {"momentum": options["momentum"] * 1.01},
    "statistics": lambda options: options | {"training": False},
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_operation_is_noticed_and_the_model_left_plain(monkeypatch, kind):
    right = run_module.batch_norm_leaky_relu
    monkeypatch.setattr(
        run_module, "batch_norm_leaky_relu", lambda *tensors, **options: right(*tensors, **WRONG[kind](options))
    )
    model = _model()
    with pytest.raises(ConversionError, match="the fused model differs from the plain one") as error:
        convert(model, EXAMPLE)
    assert "TOO LARGE" in str(error.value)
    assert not any(isinstance(module, FusedSequential) for module in model.modules())


def test_a_wrong_gradient_is_noticed(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    right = run_module.batch_norm_leaky_relu
    monkeypatch.setattr(
        run_module, "batch_norm_leaky_relu", lambda x, *rest, **options: right(Wrong.apply(x), *rest, **options)
    )
    with pytest.raises(ConversionError, match=r"gradient .* 0\.weight  TOO LARGE"):
        convert(_model(), EXAMPLE)


def test_a_missing_gradient_is_noticed(monkeypatch):
    right = run_module.batch_norm_leaky_relu
    monkeypatch.setattr(
        run_module, "batch_norm_leaky_relu", lambda x, *rest, **options: right(x.detach(), *rest, **options)
    )
    with pytest.raises(ConversionError, match="inf of"):
        convert(_model(), EXAMPLE)


def test_a_failing_operation_is_noticed_and_the_model_left_plain(monkeypatch):
    def fail(*tensors, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(run_module, "batch_norm_leaky_relu", fail)
    model = _model()
    with pytest.raises(ConversionError, match=r"the fused model fails in training mode .* no such kernel"):
        convert(model, EXAMPLE)
    assert type(model) is nn.Sequential


def test_a_failed_proof_leaves_what_was_fused_before(monkeypatch):
    model = nn.Sequential(ConvBNLeakyReLU(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    monkeypatch.setattr(run_module, "batch_norm_leaky_relu", lambda x, *rest, **options: x)
    with pytest.raises(ConversionError):
        convert(model, EXAMPLE)
    assert [type(child) for child in model] == [ConvBNLeakyReLU, nn.Sequential]


def test_nothing_of_the_models_state_is_touched():
    model = _model()
    model[1].eval()  # a mixture of modes
    model[0].bias.requires_grad_(False)
    model(EXAMPLE).sum().backward()
    state = copy.deepcopy(model.state_dict())
    objects = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    modes = [module.training for module in model.modules()]
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    example, random_state = EXAMPLE.clone(), torch.get_rng_state()
    convert(model, example)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(example, EXAMPLE)
    assert not example.requires_grad
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert id(tensor) == objects[name], name
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) if name not in grads else torch.equal(parameter.grad, grads[name]), name
    assert not model[0].bias.requires_grad


def test_state_is_put_back_after_a_failure_too(monkeypatch):
    monkeypatch.setattr(run_module, "batch_norm_leaky_relu", lambda x, *rest, **options: x)
    model = _model().eval()
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ConversionError):
        convert(model, EXAMPLE)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_buffer_replaced_in_forward_is_put_back():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return x

    model = nn.Sequential(Counter(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    buffer = model[0].calls
    convert(model, torch.randn(6, 4))
    assert model[0].calls is buffer
    assert buffer == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_compared_where_they_are_switched_off_around_it(context):
    model = _model()
    with context():
        proof = convert(model, EXAMPLE).proof
        assert not torch.is_grad_enabled()
    weight = next(one for one in proof.comparisons if (one.kind, one.name) == ("gradient", "0.weight"))
    assert weight.tolerance > 0


class _TwoInputs(nn.Module):
    """Takes an image and labels, returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x, labels):
        return {"logits": self.body(x + self.embed(labels)), "labels": labels}


def test_several_arguments_and_structured_outputs():
    report = convert(_TwoInputs(), (torch.randn(6, 4), torch.randint(0, 3, (6,))))
    names = {one.name for one in report.proof.comparisons}
    assert {"input 0", "embed.weight", "output 0"} <= names
    assert "output 1" not in names


def test_a_model_that_is_fused_already_is_compared_with_its_plain_self(monkeypatch):
    model = FusedSequential(*_model())
    right = run_module.batch_norm_leaky_relu
    monkeypatch.setattr(
        run_module, "batch_norm_leaky_relu", lambda *tensors, **options: right(*tensors, **WRONG["eps"](options))
    )
    with pytest.raises(ConversionError):
        convert(model, EXAMPLE)


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (_model(), torch.randn(8, 4, 8, 8), "the plain model fails on example_input in training mode: .*channels"),
        (_model(), torch.randn(1, 3, 4, 8), "the plain model fails on example_input in training mode"),
        (nn.Sequential(nn.LazyLinear(4), nn.ReLU()), torch.randn(2, 3), "0.weight, 0.bias still waits"),
        (nn.Identity(), torch.ones(2, dtype=torch.long), "no floating-point tensor"),
    ],
)
def test_an_example_that_the_plain_model_cannot_use_is_refused(model, example, message):
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        convert(model, example)
    assert [type(module) for module in model.modules()] == classes


def test_nan_in_the_same_places_is_equal_and_elsewhere_not(monkeypatch):
    def model():
        stack = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.LeakyReLU(0.2)).double()
        stack[0].weight.data[0, 0] = float("nan")
        return stack

    example = torch.randn(6, 2, dtype=torch.float64)
    convert(model(), example)
    right = run_module.batch_norm_leaky_relu
    monkeypatch.setattr(
        run_module, "batch_norm_leaky_relu", lambda *tensors, **options: right(*tensors, **options).nan_to_num(0.0)
    )
    with pytest.raises(ConversionError, match="inf of"):
        convert(model(), example)


def test_models_without_parameters_or_norms_prove_their_outputs():
    report = convert(nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.ReLU()), torch.randn(6, 4))
    assert {one.name for one in report.proof.comparisons if one.kind == "gradient"} == {"input 0"}


@pytest.mark.parametrize("allowed", [True, False])
def test_on_a_gpu_float32_may_mean_tf32(monkeypatch, allowed):
    monkeypatch.setattr(observation, "uses_tf32", lambda: allowed)
    on_gpu = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    single = torch.finfo(torch.float32).eps
    assert observation._coarsest_epsilon([on_gpu]) == (2**-10 if allowed else single)
    assert observation._coarsest_epsilon([torch.empty(1)]) == single


@pytest.mark.parametrize("allowed", [True, False])
def test_on_a_cpu_products_of_float32_may_be_rounded(monkeypatch, allowed):
    monkeypatch.setattr(observation, "rounds_float32", lambda: allowed)
    expected = torch.finfo(torch.bfloat16 if allowed else torch.float32).eps
    assert observation._coarsest_epsilon([torch.empty(1)]) == expected
    assert observation._coarsest_epsilon([torch.empty(1).double()]) == torch.finfo(torch.float64).eps


@pytest.mark.parametrize(
    ("wrong", "holds", "examples"),
    [
        ([("gradient", 1)], True, 2),
        ([("gradient", 2)], True, 3),
        ([("gradient", 3)], False, 3),
        ([("gradient", 1), ("output", 1)], False, 1),
        ([("statistic", 1)], False, 1),
    ],
)
def test_gradients_alone_are_looked_at_again_near_the_example(monkeypatch, wrong, holds, examples):
    """A kink's side that rounding decides is another one there."""
    seen = []

    def compare(model, arguments):
        seen.append(arguments[0])
        kinds = {kind for kind, times in wrong if len(seen) <= times}
        return [
            proof.Comparison("training", kind, kind, 1.0 if kind in kinds else 0.0, 0.5)
            for kind in ("output", "statistic", "gradient")
        ]

    monkeypatch.setattr(proof, "_compare", compare)
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    if holds:
        assert proof.prove(nn.Conv2d(3, 4, 1), x).holds
    else:
        with pytest.raises(proof.ConversionError, match="differs from the plain one"):
            proof.prove(nn.Conv2d(3, 4, 1), x)
    assert len(seen) == examples
    assert torch.equal(seen[0], x)
    for other in seen[1:]:
        assert other.is_contiguous(memory_format=torch.channels_last)
        assert not torch.equal(other, x)
        assert ((other - x).abs() <= x.abs() / 63).all()
