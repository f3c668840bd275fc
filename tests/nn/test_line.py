"""Runs that execute as chains: what nn.Sequential computes, in every way a model is used."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("ganvas._native")

from ganvas import _native as native
from ganvas.nn import FusedSequential, statistics_groups
from ganvas.ops.chain import Chain


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: more would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def chains(monkeypatch) -> list[int]:
    """The lengths of the chains that were executed."""
    lengths: list[int] = []

    def record(chain, *arguments):
        lengths.append(len(chain.layers))
        return run(chain, *arguments)

    run = Chain.run
    monkeypatch.setattr(Chain, "run", record)
    return lengths


def stack(*, momentum: float | None = 0.1, slope: float = 0.2) -> FusedSequential:
    """A discriminator's body: three layers, one of them without a norm, one in the other order."""
    return FusedSequential(
        nn.Conv2d(16, 24, 3, padding=1),
        nn.LeakyReLU(slope),
        nn.Conv2d(24, 17, 3, padding=1, bias=False),
        nn.BatchNorm2d(17, momentum=momentum),
        nn.LeakyReLU(slope),
        nn.Conv2d(17, 20, 3),
        nn.LeakyReLU(slope),
        nn.BatchNorm2d(20, momentum=momentum),
    )


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (4, 16, 7, 9), generator=torch.Generator().manual_seed(2))


MODELS: dict[str, tuple[Callable[[], FusedSequential], list[int]]] = {
    "both orders and no norm": (stack, [3]),
    "cumulative average": (lambda: stack(momentum=None), [3]),
    "relu": (
        lambda: FusedSequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU()),
        [2],
    ),
    "three channels first": (
        lambda: FusedSequential(
            nn.Conv2d(16, 3, 1), nn.Tanh(), nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)
        ),
        [2],
    ),
    "strides, groups, dilation and large kernels": (
        lambda: FusedSequential(
            nn.Conv2d(16, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.LeakyReLU(0.1),
            nn.Conv2d(16, 32, 5, padding=2, groups=2),
            nn.LeakyReLU(0.1),
            nn.BatchNorm2d(32),
            nn.Conv2d(32, 16, 3, padding=2, dilation=2),
            nn.BatchNorm2d(16, affine=False),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.BatchNorm2d(16, track_running_stats=False),
            nn.ReLU(),
        ),
        [4],
    ),
    "transposed": (
        lambda: FusedSequential(
            nn.ConvTranspose2d(16, 24, 4, stride=2, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(24, 16, 3, stride=2, output_padding=1),
            nn.BatchNorm2d(16),
            nn.LeakyReLU(0.2, inplace=True),
        ),
        [2],
    ),
    "pooling and upsampling": (
        lambda: FusedSequential(
            nn.Conv2d(16, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.LeakyReLU(0.1),
            nn.MaxPool2d(2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(24, 16, 3, padding=1),
            nn.LeakyReLU(0.1),
        ),
        [2],
    ),
    "a convolution alone at the end": (
        lambda: FusedSequential(
            nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1), nn.Tanh()
        ),
        [2],
    ),
    "convolutions alone, one of them written over": (
        lambda: FusedSequential(nn.Conv2d(16, 16, 3, bias=False), nn.SiLU(inplace=True), nn.Conv2d(16, 16, 3)),
        [1, 1],
    ),
    "an unknown layer between": (
        lambda: FusedSequential(
            nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.GELU(), nn.Conv2d(16, 16, 3), nn.LeakyReLU()
        ),
        [1, 1],
    ),
    "a norm without a convolution": (
        lambda: FusedSequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        [1],
    ),
    "padding by words": (
        lambda: FusedSequential(
            nn.Conv2d(16, 16, 3, padding="same"), nn.ReLU(), nn.Conv2d(16, 16, 3, padding="valid"), nn.ReLU()
        ),
        [2],
    ),
    "padding by words, more of it on one side": (
        lambda: FusedSequential(nn.Conv2d(16, 16, 4, padding="same"), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()),
        [1],
    ),
    "other padding modes": (
        lambda: FusedSequential(
            nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()
        ),
        [1],
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_as_accurate_as_plain_torchs(chains, step, plain_twin, assert_as_accurate, name, training):
    make, expected = MODELS[name]
    fused = make().train(training)
    plain, exact = plain_twin(fused), plain_twin(fused).double()
    for _ in range(2):
        ours = step(fused, image())
        assert_as_accurate(ours, step(plain, image()), step(exact, image().double()))
    assert chains == 2 * expected


def test_a_model_in_bfloat16(chains, step, plain_twin, assert_as_accurate):
    fused = stack().bfloat16()
    plain, exact = plain_twin(fused), plain_twin(fused).double()
    x = image().bfloat16()
    assert_as_accurate(step(fused, x), step(plain, x), step(exact, x.double()))
    assert chains == [3]


def test_under_autocast_parameters_stay_float32(chains, step, plain_twin, assert_as_accurate):
    fused = FusedSequential(*stack(), nn.AvgPool2d(2), nn.Conv2d(20, 16, 3, padding=1), nn.ReLU())
    plain, exact = plain_twin(fused), plain_twin(fused).double()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = step(fused, image()), step(plain, image())
    assert_as_accurate(ours, theirs, step(exact, image().double()))
    for name, expected in theirs.tensors().items():
        assert ours.tensors()[name].dtype == expected.dtype, name
    assert chains == [3, 1], "also where the input is bfloat16 already"


def test_float64_runs_no_chain(chains, step, plain_twin):
    fused = stack().double()
    plain = plain_twin(fused)
    got, expected = step(fused, image().double()), step(plain, image().double())
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(got.tensors()[name], tensor, rtol=1e-10, atol=1e-10, msg=name)
    assert chains == []


@pytest.mark.parametrize("momentum", [0.3, None])
def test_statistics_groups_equal_one_call_per_group(plain_twin, momentum):
    fused = stack(momentum=momentum)
    apart = plain_twin(fused)
    x = image(6, 16, 7, 9)
    with statistics_groups(fused, 3):
        together = fused(x)
    torch.testing.assert_close(together, torch.cat([apart(part) for part in x.chunk(3)]), rtol=1e-4, atol=1e-5)
    for (name, buffer), twin in zip(fused.named_buffers(), apart.buffers()):
        torch.testing.assert_close(buffer, twin, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_a_norm_used_twice_in_a_chain_updates_twice(chains, step, momentum):
    norm = nn.BatchNorm2d(16, momentum=momentum)
    convolutions = [nn.Conv2d(16, 16, 3, bias=False) for _ in range(2)]
    fused = FusedSequential(convolutions[0], norm, nn.ReLU(), convolutions[1], norm, nn.ReLU())
    plain = nn.Sequential(*copy.deepcopy(list(fused)))  # one deepcopy of the list keeps the norm shared
    assert plain[1] is plain[4]
    for _ in range(2):
        got, expected = step(fused, image()).tensors(), step(plain, image()).tensors()
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4 * tensor.abs().max().item(), msg=name)
    assert norm.num_batches_tracked == 4
    assert sum(chains) == 4


def test_a_convolution_used_twice_gets_both_gradients(step):
    conv = nn.Conv2d(16, 16, 3, padding=1)
    fused = FusedSequential(conv, nn.LeakyReLU(0.2), conv, nn.BatchNorm2d(16), nn.ReLU())
    plain = nn.Sequential(*copy.deepcopy(list(fused)))
    got, expected = step(fused, image()).tensors(), step(plain, image()).tensors()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4 * tensor.abs().max().item(), msg=name)


@pytest.mark.parametrize("frozen", ["0.weight", "2.weight", "5.bias", "3.weight", "7.bias"])
def test_frozen_parameters_get_no_gradient(step, frozen):
    fused = stack()
    expected = step(copy.deepcopy(fused), image()).gradients
    fused.get_parameter(frozen).requires_grad_(False)
    got = step(fused, image()).gradients
    assert f"grad of {frozen}" not in got
    assert all(torch.equal(gradient, expected[name]) for name, gradient in got.items())


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "eps": lambda model: setattr(model[3], "eps", 0.5),
    "momentum": lambda model: setattr(model[3], "momentum", 0.7),
    "cumulative average": lambda model: setattr(model[3], "momentum", None),
    "slope": lambda model: setattr(model[4], "negative_slope", 0.6),
    "padding": lambda model: setattr(model[2], "padding", (2, 2)),
    "stride": lambda model: setattr(model[2], "stride", (2, 2)),
    "data": lambda model: setattr(model[2].weight, "data", 2 * model[2].weight.data),
    "memory layout": lambda model: model.to(memory_format=torch.channels_last),
    "values in place": lambda model: model[3].weight.data.neg_(),
    "weight": lambda model: setattr(model[2], "weight", nn.Parameter(3 * model[2].weight.detach())),
    "no bias": lambda model: setattr(model[5], "bias", None),
    "no weight of the norm": lambda model: setattr(model[3], "weight", None),
    "running mean": lambda model: setattr(model[3], "running_mean", torch.ones(17)),
    "frozen": lambda model: model[3].bias.requires_grad_(False),
    "state": lambda model: model.load_state_dict({name: value / 2 for name, value in model.state_dict().items()}),
    "evaluation": lambda model: model.eval(),
    "evaluation of a norm": lambda model: model[3].eval(),
    "dtype": lambda model: model.double().float(),
    "precision": lambda model: torch.set_float32_matmul_precision("medium"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_since_the_last_call_counts(chains, step, plain_twin, change):
    fused = stack()
    plain = plain_twin(fused)
    step(fused, image()), step(plain, image())
    precision = torch.get_float32_matmul_precision()
    try:
        for model in (fused, plain):
            CHANGES[change](model)
        got, expected = step(fused, image()), step(plain, image())
    finally:
        torch.set_float32_matmul_precision(precision)
    assert chains[-1] == 3
    assert got.gradients.keys() == expected.gradients.keys()
    for name, tensor in expected.tensors().items():
        if change == "precision":  # rounded, a pixel or two may be on the other side of a kink; of tiles, a few more
            most = 1e-1 if native.has_bfloat16_tiles() else 5e-2
            assert (got.tensors()[name] - tensor).double().norm() <= most * tensor.double().norm(), name
            continue
        torch.testing.assert_close(
            got.tensors()[name], tensor, rtol=2e-2, atol=1e-2 * tensor.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("position", range(8))
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_a_member_with_a_hook_leaves_the_chain_and_the_hook_fires(chains, position, register):
    fused, fired = stack(), []
    x = image().requires_grad_()
    before = fused(x)
    handle = getattr(fused[position], register)(lambda *arguments: fired.append(register))
    output = fused(x)
    output.sum().backward()
    assert fired == [register]
    torch.testing.assert_close(output, before, rtol=1e-4, atol=1e-4)
    assert sum(chains) < 3 + 3, "its layer runs outside of a chain"
    handle.remove()
    fused(x)
    assert chains[-1] == 3


def test_global_hooks_see_every_layer(chains):
    fused, seen = stack(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        fused(image())
    finally:
        handle.remove()
    assert seen == [*map(type, fused), FusedSequential]
    assert chains == []


def test_a_hook_on_the_sequential_itself_sees_its_output():
    fused, seen = stack(), []
    fused.register_forward_hook(lambda module, inputs, output: seen.append(output))
    output = fused(image())
    assert seen[0] is output


def test_weight_norm_and_other_parametrizations_are_applied(step, plain_twin):
    fused = stack()
    nn.utils.parametrizations.weight_norm(fused[2])
    with torch.no_grad():
        fused[2].parametrizations.weight.original0.mul_(2.0)
    plain = plain_twin(fused)
    got, expected = step(fused, image()), step(plain, image())
    torch.testing.assert_close(got.output, expected.output, rtol=1e-4, atol=1e-4)
    assert got.gradients.keys() == expected.gradients.keys()


@pytest.mark.parametrize(
    ("children", "shape"),
    [
        ([nn.Conv2d(16, 16, 3), nn.ReLU()], (2, 16, 2, 9)),
        ([nn.Conv2d(16, 16, 3), nn.ReLU()], (2, 15, 9, 9)),
        ([nn.Conv2d(16, 16, 3), nn.ReLU()], (2, 16, 9)),
        ([nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(17, 16, 3), nn.ReLU()], (2, 16, 9, 9)),
        ([nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 9), nn.ReLU()], (2, 16, 9, 9)),
        ([nn.Conv2d(16, 16, 3), nn.ReLU(), nn.MaxPool2d(2)], (2, 16, 3, 3)),
    ],
)
def test_what_torch_refuses_is_refused_in_its_words(children, shape):
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        nn.Sequential(*children)(torch.randn(shape))
    with pytest.raises(type(theirs.value)) as ours:
        FusedSequential(*children)(torch.randn(shape))
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("norm", "shape", "message"),
    [
        (nn.BatchNorm2d(17), (2, 16, 9, 9), r"bn_weight must have shape \(16,\).* got \(17,\)"),
        (nn.BatchNorm2d(16), (1, 16, 3, 3), "more than 1 value per channel"),
        (nn.BatchNorm1d(16), (2, 16, 9, 9), "expected 2D or 3D input"),
    ],
)
def test_what_a_norm_does_not_take_is_refused(norm, shape, message):
    with pytest.raises(ValueError, match=message):
        FusedSequential(nn.Conv2d(16, 16, 3), norm, nn.ReLU())(torch.randn(shape))


def test_a_refused_input_leaves_the_counters_alone():
    fused = FusedSequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 9), nn.ReLU())
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        fused(image())
    assert fused[1].num_batches_tracked <= 1


@pytest.mark.parametrize("replace", ["weight", "bn"])
def test_parameters_of_another_size_are_refused_and_not_read_past_their_end(replace):
    fused = FusedSequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
    if replace == "weight":
        fused[0].weight = nn.Parameter(torch.randn(48, 16, 3, 3))  # pruning that forgot the norm
    else:
        fused[1].weight = nn.Parameter(torch.randn(16))
    with pytest.raises((RuntimeError, ValueError), match=r"32|\(16,\)"):
        fused(image())


@pytest.mark.parametrize("shape", [(0, 16, 7, 9), (1, 16, 5, 5), (1, 16, 3, 4)])
def test_empty_and_smallest_batches(step, plain_twin, assert_as_accurate, shape):
    fused = FusedSequential(nn.Conv2d(16, 16, 3), nn.LeakyReLU(0.2), nn.Conv2d(16, 17, 3, padding=2), nn.ReLU())
    plain, exact = plain_twin(fused), plain_twin(fused).double()
    x = image(*shape)
    assert_as_accurate(step(fused, x), step(plain, x), step(exact, x.double()))


def test_inference_mode_and_no_grad_compute_the_same(chains):
    fused = stack().eval()
    expected = fused(image())
    with torch.inference_mode():
        inside = fused(image())
    with torch.no_grad():
        free = fused(image())
    assert torch.equal(inside, free)
    torch.testing.assert_close(inside, expected.detach())  # raw outputs are rounded between the layers: here to float32
    assert chains == [3, 3, 3]


def test_training_in_inference_mode_moves_the_statistics(plain_twin):
    fused = stack()
    plain = plain_twin(fused)
    with torch.inference_mode():
        fused(image()), plain(image())
    for buffer, twin in zip(fused.buffers(), plain.buffers()):
        torch.testing.assert_close(buffer, twin, rtol=1e-4, atol=1e-5)


def test_double_backward_of_a_gradient_penalty(plain_twin):
    fused = stack()
    plain = plain_twin(fused)
    for model in (fused, plain):
        x = image().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (gradient.flatten(1).norm(dim=1) - 1).square().mean().backward()
    for (name, parameter), twin in zip(fused.named_parameters(), plain.parameters()):
        scale = twin.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, twin.grad, rtol=2e-3, atol=2e-3 * scale + 1e-4, msg=name)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_goes_the_way_plain_torchs_goes(chains, plain_twin, optimizer):
    def losses(model: nn.Module) -> list[float]:
        head = nn.Linear(20, 3, dtype=next(model.parameters()).dtype)
        with torch.no_grad():
            head.weight.copy_(torch.linspace(-0.2, 0.2, 60).view(3, 20)), head.bias.zero_()
        updates = optimizer(
            [*model.parameters(), *head.parameters()], lr=0.05 if optimizer is torch.optim.SGD else 2e-3
        )
        generator, found = torch.Generator().manual_seed(5), []
        for _ in range(15):
            labels = torch.randint(0, 3, (12,), generator=generator)
            images = torch.randn(12, 16, 7, 7, generator=generator) + labels[:, None, None, None]
            loss = F.cross_entropy(head(model(images.to(head.weight.dtype)).mean((2, 3))), labels)
            updates.zero_grad()
            loss.backward()
            updates.step()
            found.append(loss.item())
        return found

    fused = stack()
    plain, exact = plain_twin(fused), plain_twin(fused).double()
    ours, theirs, right = losses(fused), losses(plain), losses(exact)
    assert right[-1] < 0.7 * right[0], "a net that learns nothing compares nothing"
    for got, torchs, expected in zip(ours, theirs, right):
        # Rounding errors grow from step to step, in torch as here: Adam divides by roots of what may be rounding noise.
        assert abs(got - expected) <= 3 * abs(torchs - expected) + 2e-3 * right[0]
    assert len(chains) == 15


def test_functional_calls_use_the_tensors_given(chains):
    fused = stack().eval()
    zeros = {name: torch.zeros_like(parameter) for name, parameter in fused.named_parameters()}
    assert not torch.func.functional_call(fused, zeros, (image(),)).any()
    doubled = {name: (2 * p.detach()).requires_grad_() for name, p in fused.named_parameters()}
    torch.func.functional_call(fused, doubled, (image(),)).sum().backward()
    assert all(parameter.grad is None for parameter in fused.parameters())
    assert all(given.grad is not None for given in doubled.values())
    assert chains == [3, 3]


def test_function_transforms_run_as_plain_torch(chains, plain_twin):
    fused = stack().eval()
    plain, parameters = plain_twin(fused).eval(), dict(fused.named_parameters())

    def loss(model):
        return lambda parameters, x: torch.func.functional_call(model, parameters, (x,)).square().sum()

    got, expected = (torch.func.grad(loss(model))(parameters, image()) for model in (fused, plain))
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=name)
    per_sample = torch.vmap(torch.func.grad(loss(fused)), in_dims=(None, 0))(parameters, image()[:, None])
    torch.testing.assert_close(
        per_sample["0.weight"].sum(0),
        expected["0.weight"],
        rtol=1e-3,
        atol=1e-3 * expected["0.weight"].abs().max().item(),
    )
    assert chains == []


def test_compiled_models_compute_the_same(plain_twin):
    fused = stack()
    eager = copy.deepcopy(fused)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        got, expected = compiled(image()), eager(image())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        got.sum().backward(), expected.sum().backward()
    for (name, parameter), twin in zip(fused.named_parameters(), eager.parameters()):
        torch.testing.assert_close(parameter.grad, twin.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_copies_are_independent(chains):
    fused = stack()
    expected = fused(image())
    copied = copy.deepcopy(fused)
    with torch.no_grad():
        copied[0].weight.zero_()
    assert chains == [3]
    assert torch.equal(fused(image()), expected)
    assert not torch.equal(copied(image()), expected)


def test_checkpointing_recomputes_the_same(step):
    fused = stack()
    expected = step(copy.deepcopy(fused), image())

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = fused

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    got = step(Checkpointed(), image())
    assert torch.equal(got.output, expected.output)
    for name, gradient in expected.gradients.items():
        assert torch.equal(got.gradients[name.replace("of ", "of body.") if "input" not in name else name], gradient)


def test_tensors_that_share_memory_are_not_written_to():
    fused, x = FusedSequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True)), image()
    alias = x.view(-1)
    fused[0].bias = nn.Parameter(fused[0].weight.detach().view(-1)[:16])
    before, weight = alias.clone(), fused[0].weight.detach().clone()
    output = fused(x.requires_grad_())
    output.sum().backward()
    assert torch.equal(alias, before)
    assert torch.equal(fused[0].weight, weight)
    torch.testing.assert_close(output, nn.Sequential(*fused)(x), rtol=1e-4, atol=1e-5)


def test_a_weight_changed_between_forward_and_backward_is_torchs_own_error():
    fused = stack()
    output = fused(image())
    with torch.no_grad():
        fused[2].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_steps_in_several_threads_equal_steps_in_one():
    def gradients(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        fused = models[seed]
        x = torch.randn(3, 16, 7, 9, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        output = fused(x)
        output.square().sum().backward()
        return [output.detach(), x.grad, *(p.grad.clone() for p in fused.parameters())]

    originals = [stack() for _ in range(6)]
    models = copy.deepcopy(originals)
    expected = [gradients(seed) for seed in range(6)]
    models = copy.deepcopy(originals)
    with ThreadPoolExecutor(3, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for got, alone in zip(pool.map(gradients, range(6)), expected):
            assert all(map(torch.equal, got, alone))


def test_backward_may_run_in_another_thread_than_forward():
    fused = stack()
    output = fused(image()).sum()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(output.backward).result()
    assert all(parameter.grad is not None for parameter in fused.parameters())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_threads_it_does_not_have():
    torch.set_num_threads(2)
    fused, x = stack().eval(), image(32, 16, 24, 24).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = fused(x)  # the parent's threads now run
    child = os.fork()
    if child == 0:
        with torch.no_grad():
            output = fused(x)
        torch.set_num_threads(1)  # as torch's data loader does: its own operators would wait
        os._exit(0 if torch.allclose(output, expected, rtol=1e-4, atol=1e-4) else 1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            assert status == 0
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hung")


def _kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Of the distinct storages that autograd keeps for the backward pass, input and parameters left out."""
    others = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(size for address, size in kept.items() if address not in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chain_keeps_at_most_half_of_what_torch_keeps(plain_twin, dtype):
    layers = [(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2)) for _ in range(4)]
    fused = FusedSequential(*(module for layer in layers for module in layer)).to(dtype)
    x = image(8, 16, 24, 24).to(dtype).contiguous(memory_format=torch.channels_last)
    kept, torchs = _kept_bytes(fused, x), _kept_bytes(plain_twin(fused), x)
    assert kept <= 0.5 * torchs
    assert kept == pytest.approx(4 * x.numel() * x.element_size(), rel=0.01), "one tensor of each layer"
