"""Chains that add what is their own, a layer's input further on: the same as each layer by itself, with a residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from chains import everything, layer, with_grad
from instruction_sets import passes, with_lesser_instruction_sets
from operators import opcheck_without_gradients
from torch import Tensor

pytest.importorskip("ganvas._native")

from ganvas import _native as native
from ganvas.ops import chain_operators, chain_passes
from ganvas.ops.backends import cpu
from ganvas.ops.backends.cpu import chain as native_chains
from ganvas.ops.backends.cpu.chain import NativeChain
from ganvas.ops.chain import Chain, Layer, conv_bn_leaky_relu_chain
from ganvas.ops.layers import GIVEN, Adds, decode, decode_adds, encode, output_has_kink


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (4, 16, 10, 12), generator=torch.Generator().manual_seed(1)).to(dtype)


LAST = ", after the activation"


def blocks_of(name: str, dtype: torch.dtype = torch.float32, **options) -> tuple[list[Layer], Adds]:
    """Layers, ``options`` of those that add, and what they add."""
    generator = torch.Generator().manual_seed(0)
    if name.endswith(LAST):
        name, options = name.removesuffix(LAST), {**options, "adds_last": True}

    def make(*arguments, **own) -> Layer:
        return layer(*arguments, generator=generator, dtype=dtype, **own)

    def block(before: Layer, width: int, kinds: tuple[str, str] = ("3x3", "3x3")) -> list[Layer]:
        return [before, make(16, width, kinds[0]), make(width, 16, kinds[1], **options)]

    return {
        "two blocks": lambda: (
            [*block(make(16, 16), 24), make(16, 16), make(16, 16, **options)], (None, None, 1, None, 3)
        ),
        "from the input on": lambda: (
            [make(16, 24), make(24, 16, **options), make(16, 20), make(20, 16, **options)], (None, 0, None, 2)
        ),
        "a layer after": lambda: ([*block(make(16, 16), 24), make(16, 20)], (None, None, 1, None)),
        "one convolution each": lambda: (
            [make(16, 16), *(make(16, 16, **options) for _ in range(2)), make(16, 24)], (None, 1, 2, None)
        ),
        "one in the other": lambda: ([*block(make(16, 16), 16), make(16, 16, **options)], (None, None, 2, 1)),
        "a shortcut first": lambda: (
            [make(16, 24), make(24, 16, **options), make(16, 20), make(20, 16, **options)], (None, GIVEN, None, 2)
        ),
        "a shortcut in between": lambda: (
            [*block(make(16, 16), 24), make(16, 16, **options), make(16, 20)],
            (None, None, 1, GIVEN, None),
        ),
        "a shortcut last": lambda: (
            [*block(make(16, 16), 24), make(16, 16), make(16, 16, **options)], (None, None, 1, None, GIVEN)
        ),
        "after given statistics": lambda: (block(make(16, 16, norm=False, bias=True), 24), (None, None, 1)),
        "after no norm": lambda: (block(make(16, 16, norm=None, bias=True), 24), (None, None, 1)),
        "after an activation before the norm": lambda: (
            block(make(16, 16, activation_first=True, bias=True), 24), (None, None, 1)
        ),
        "after pooling": lambda: (block(make(16, 16, max_pool=True), 24), (None, None, 1)),
        "after a negative slope": lambda: (block(make(16, 16, slope=-0.3), 24), (None, None, 1)),
        "pooled in between": lambda: (
            [*block(make(16, 16), 24), make(16, 16, max_pool=True), make(16, 16), make(16, 16, **options)],
            (None, None, 1, None, None, 4),
        ),
        "1x1": lambda: (block(make(16, 16, "1x1"), 24, ("1x1", "1x1")), (None, None, 1)),
        "strides": lambda: (
            block(make(16, 16), 24, ("4x4 stride 2", "4x4 stride 2 transposed")), (None, None, 1)
        ),
    }[name]()  # fmt: skip


BLOCKS = (
    "two blocks", "from the input on", "a layer after", "one convolution each", "one in the other", "a shortcut first",
    "a shortcut in between", "a shortcut last", "after given statistics", "after no norm",
    "after an activation before the norm", "after pooling", "after a negative slope", "pooled in between", "1x1",
    "strides",
    *(
        f"{name}{LAST}"
        for name in (
            "two blocks", "from the input on", "one in the other", "a shortcut first", "a shortcut in between",
            "a shortcut last", "after pooling", "after a negative slope", "pooled in between",
        )
    ),
)  # fmt: skip


def shortcut(adds: Adds, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """What is given, if a layer adds it; all of them put out as many pixels."""
    return -image(dtype=dtype).flip(0) if GIVEN in adds else None


def one_by_one(adds: Adds) -> Callable[..., Tensor]:
    """Each layer as a chain of its own. What is added last torch adds."""

    def run(input: Tensor, layers: list[Layer], groups: int = 1, residual: Tensor | None = None) -> Tensor:
        inputs = []
        for one, added in zip(layers, adds, strict=True):
            inputs.append(input)
            own = residual if added == GIVEN else None if added is None else inputs[added]
            if own is not None and one.adds_last:
                input = conv_bn_leaky_relu_chain(input, [one], groups) + own
            else:
                input = conv_bn_leaky_relu_chain(input, [one], groups, own)
        return input

    return run


def in_one(adds: Adds) -> Callable[..., Tensor]:
    def run(input: Tensor, layers: list[Layer], groups: int = 1, residual: Tensor | None = None) -> Tensor:
        output = Chain(layers, adds)(input, groups, residual)
        assert output is not None
        return output

    return run


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], error: float) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype is tensor.dtype, name
        assert (got[name] - tensor).double().norm() <= error * tensor.double().norm(), name


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("slope", [0.2, 0.0, 1.0])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_step_with_residuals_of_its_own(name, slope, groups):
    layers, adds = blocks_of(name, slope=slope)
    expected = everything(one_by_one(adds), image(), layers, groups, shortcut(adds))
    assert_close(everything(in_one(adds), image(), layers, groups, shortcut(adds)), expected, 2e-5)


@pytest.mark.parametrize("name", [name for name in BLOCKS if "pool" not in name])  # of which bfloat16 makes ties
def test_residuals_of_its_own_in_bfloat16_are_as_exact_as_one_by_one(name):
    layers, adds = blocks_of(name, torch.bfloat16)
    layers = [replace(one, negative_slope=0.9) for one in layers]  # a value on the other side of it changes little
    x = image(dtype=torch.bfloat16)
    exact = everything(one_by_one(adds), x.float(), with_grad(layers, torch.float32), 1, shortcut(adds))
    ours, others = (everything(run(adds), x, layers, 1, shortcut(adds, torch.bfloat16)) for run in (in_one, one_by_one))
    assert ours.keys() == others.keys() == exact.keys()
    for name_, tensor in exact.items():
        assert ours[name_].dtype is others[name_].dtype, name_
        error, other = ((result[name_] - tensor).norm() for result in (ours, others))
        # Half a rounding: over seeds both are some 7e-3 off, but one of the two may be lucky.
        assert error <= 2 * other + 2.0**-9 * tensor.norm(), name_


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_without_gradients_too(name, norm):
    layers, adds = blocks_of(name, norm=norm)
    with torch.no_grad():
        expected = one_by_one(adds)(image(), with_grad(layers), 2, shortcut(adds))
        torch.testing.assert_close(
            in_one(adds)(image(), with_grad(layers), 2, shortcut(adds)), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("threads_", [1, 3])
def test_residuals_of_its_own_give_the_same_bits_again(threads, threads_):
    threads(threads_)
    layers, adds = blocks_of("two blocks")
    first, second = (everything(in_one(adds), image(), layers) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def leaves_of(layers: list[Layer]) -> list[Tensor]:
    return [tensor for one in layers for tensor in one.tensors if tensor is not None]


@pytest.mark.parametrize(
    "name", ["two blocks", "after an activation before the norm", "pooled in between", f"two blocks{LAST}"]
)
def test_a_graph_that_is_retained_gives_the_same_gradients_again(name):
    layers, adds = blocks_of(name)
    layers, x = with_grad(layers), image().requires_grad_()
    output = in_one(adds)(x, layers)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    first = torch.autograd.grad(output, [x, *leaves_of(layers)], grad, retain_graph=True)
    second = torch.autograd.grad(output, [x, *leaves_of(layers)], grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["a shortcut first", f"a shortcut first{LAST}", f"a shortcut last{LAST}"])
def test_the_residual_alone_may_want_a_gradient(name):
    layers, adds = blocks_of(name)
    everywhere = everything(in_one(adds), image(), layers, 1, shortcut(adds))
    for made in ("native", "by layers"):
        residual = shortcut(adds).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: tensor, lambda tensor, made=made: tensor if made == "native" else tensor.contiguous()
        ):
            output = Chain(layers, adds)(image(), 1, residual)
            output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
        torch.testing.assert_close(residual.grad, everywhere["grad of residual"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", range(-1, 5))
def test_what_is_wanted_alone_gets_the_same_gradient(wanted):
    """-1: the input; else a layer's γ, and nothing is asked of those before."""
    layers, adds = blocks_of("two blocks")
    everywhere = everything(in_one(adds), image(), layers)
    own, x = with_grad(layers), image()
    leaf, name = (x, "input") if wanted < 0 else (own[wanted].bn_weight, f"bn_weight {wanted}")
    for other in [x, *leaves_of(own)]:
        other.requires_grad_(other is leaf)
    output = in_one(adds)(x, own)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(leaf.grad, everywhere[f"grad of {name}"])


@pytest.mark.parametrize("name", BLOCKS)
def test_backward_by_layers_where_what_was_saved_comes_back_in_another_layout(monkeypatch, name):
    layers, adds = blocks_of(name)
    expected = everything(in_one(adds), image(), layers, 2, shortcut(adds))
    made = []
    original = chain_passes.run_backward
    monkeypatch.setattr("ganvas.ops.chain.run_backward", lambda *a: made.append(a) or original(*a))

    def unpacked(tensor: Tensor) -> Tensor:
        return tensor.contiguous()

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpacked):
        got = everything(in_one(adds), image(), layers, 2, shortcut(adds))
    assert made
    assert_close(got, expected, 2e-5)


@pytest.mark.parametrize(
    "name", ["two blocks", "one in the other", "a shortcut first", "after no norm", f"a shortcut last{LAST}"]
)
def test_gradients_of_second_order(name):
    layers, adds = blocks_of(name)
    found = []
    for run in (in_one(adds), one_by_one(adds)):
        own, x = with_grad(layers), image().requires_grad_()
        output = run(x, own, 1, shortcut(adds))
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        (of_input,) = torch.autograd.grad(output, x, grad, create_graph=True)
        found.append([of_input, *torch.autograd.grad(of_input.square().sum(), [one.weight for one in own])])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("how", ["", LAST])
def test_the_input_may_be_the_last_residual_besides(how):
    layers, _ = blocks_of(f"from the input on{how}")
    x = image().contiguous(memory_format=torch.channels_last)
    found = []
    for adds in ((None, 0, None, None), (None, None, None, None)):
        own, input = with_grad(layers), x.clone(memory_format=torch.preserve_format).requires_grad_()
        if adds[1] is None:
            output = conv_bn_leaky_relu_chain(conv_bn_leaky_relu_chain(input, own[:2], 1, input), own[2:], 1, input)
        else:
            output = Chain(own, adds)(input, 1, input)
            assert output is not None
        output.square().sum().backward()
        found.append([output, input.grad, *(one.weight.grad for one in own)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# Those that differ in what the operator is told or returns.
OPERATORS = ("two blocks", "from the input on", "a shortcut in between", "pooled in between", "a shortcut last")
OPERATORS = (*OPERATORS, f"a shortcut in between{LAST}", f"a shortcut last{LAST}")


@pytest.mark.parametrize("name", OPERATORS)
def test_in_a_graph_it_computes_the_same(name):
    layers, adds = blocks_of(name)
    torch._dynamo.reset()
    compiled = torch.compile(in_one(adds), backend="aot_eager", fullgraph=True)
    expected = everything(in_one(adds), image(), layers, 2, shortcut(adds))
    got = everything(compiled, image(), layers, 2, shortcut(adds))
    moved = [key for key in expected if key.startswith("running")]  # by torch, not by the kernel
    assert moved or all(not one.batch_statistics for one in layers)
    for key, tensor in expected.items():
        if key in moved:
            torch.testing.assert_close(got[key], tensor, msg=key)
        else:
            assert torch.equal(got[key], tensor), key


@pytest.mark.parametrize("name", BLOCKS)
def test_in_a_graph_the_operator_does_without_the_one_call(monkeypatch, name):
    layers, adds = blocks_of(name)

    def operator(input: Tensor, own: list[Layer], groups: int, residual: Tensor | None, keep: bool = True) -> Tensor:
        return torch.ops.ganvas.conv_bn_leaky_relu_chain(input, residual, *encode(own, adds), groups, keep)[0]

    expected = everything(one_by_one(adds), image(), layers, 2, shortcut(adds))
    monkeypatch.setattr(chain_operators, "_native_chain", lambda *_: None)
    got = everything(operator, image(), layers, 2, shortcut(adds))
    for key in [key for key in expected if key.startswith("running")]:
        del expected[key], got[key]  # the operator's caller moves them
    assert_close(got, expected, 2e-5)
    with torch.no_grad():
        output = operator(image(), with_grad(layers), 2, shortcut(adds), keep=False)
    torch.testing.assert_close(output, expected["output"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_agrees_on_what_the_operator_returns(name):
    layers, adds = blocks_of(name)
    encoded, residual = encode(with_grad(layers), adds), shortcut(adds)
    operators = torch.ops.ganvas
    torch.library.opcheck(
        operators.conv_bn_leaky_relu_chain.default, (image().requires_grad_(), residual, *encoded, 1, True)
    )
    with torch.no_grad():
        output, moments, stored = operators.conv_bn_leaky_relu_chain(image(), residual, *encoded, 1, True)
    result = output if output_has_kink(layers, adds, residual is not None) else None
    parameters = [parameter.detach() for parameter in encoded.parameters]
    arguments = (
        torch.randn_like(output), image(), result, parameters, moments, stored, encoded.integers, encoded.reals,
        residual is not None, True, [True] * len(parameters),
    )  # fmt: skip
    opcheck_without_gradients(operators.conv_bn_leaky_relu_chain_backward.default, arguments)


@pytest.mark.parametrize("name", BLOCKS)
def test_what_layers_add_is_encoded_with_them(name):
    layers, adds = blocks_of(name)
    encoded = encode(layers, adds)
    assert decode_adds(encoded.integers) == adds
    assert [one.adds_last for one in decode(encoded.parameters, None, encoded.integers, encoded.reals)] == [
        one.adds_last for one in layers
    ]
    assert decode_adds(encode(layers).integers) == (None,) * len(layers)


@pytest.mark.parametrize("name", ["two blocks", "a shortcut last"])
def test_a_kink_of_any_slope_may_come_before_what_is_added(name):
    layers, adds = blocks_of(f"{name}{LAST}", slope=-0.3)
    expected = everything(one_by_one(adds), image(), layers, 2, shortcut(adds))
    assert_close(everything(in_one(adds), image(), layers, 2, shortcut(adds)), expected, 2e-5)


def changed(layers: list[Layer], at: int, **changes) -> list[Layer]:
    return [replace(one, **changes) if i == at else one for i, one in enumerate(layers)]


def test_what_cannot_be_one_chain_is_refused_before_any_work():
    layers, adds = blocks_of("two blocks")
    bare = {"batch_statistics": None, "bn_weight": None, "bn_bias": None, "negative_slope": 1.0}
    for case, (own, x) in {
        "a kink whose side the sum does not tell": (changed(layers, 2, negative_slope=-0.5), image()),
        "no activation to add": (changed(layers, 0, **bare), image()),
        "another size": ([layer(16, 16, "3x3 unpadded") if i == 1 else one for i, one in enumerate(layers)], image()),
        "float64": (layers, image().double()),
    }.items():
        assert Chain(own, adds).prepare(x, 1, None) is None, case


@pytest.mark.parametrize("direction", ["forward_with_statistics", "backward_input", "backward_weight"])
def test_where_a_convolution_is_torchs_it_does_not_pay(monkeypatch, direction):
    chosen = native_chains.chosen_convolution

    def choose(geometry, weight, input_shape, dtype, way, backend=None):
        torchs = way == direction and weight.shape[0] == 24
        return None if torchs else chosen(geometry, weight, input_shape, dtype, way, backend)

    for module in (native_chains, cpu):
        monkeypatch.setattr(module, "chosen_convolution", choose)
    layers, adds = blocks_of("two blocks")
    assert Chain(layers, adds).prepare(image(), 1, None) is None
    with torch.no_grad():
        pays = Chain(layers, adds).prepare(image(), 1, None) is not None
    assert pays == (direction != "forward_with_statistics")


def test_a_last_backward_pass_takes_at_most_two_buffers_more_than_without_residuals():
    """Their gradient waits for the block's beginning, while another is settled."""
    layers, adds = blocks_of("two blocks")
    held = []
    for own in (None, adds):
        native.release_workspace()
        output = Chain(layers, own)(image(16, 16, 128, 128).requires_grad_())
        output.sum().backward()
        held.append(native.workspace_bytes_held())
    native.release_workspace()
    largest = output.numel() // 16 * 24 * output.element_size()
    assert held[1] - held[0] <= 2 * largest


def _layer(channels: int = 16, out: int = 16, adds: int = -1, last: bool = False, **changes) -> tuple:
    convolution = native.Convolution(
        native.ConvolutionKind.conv3x3, native.Dtype.float32, False, (2, channels, 8, 8), out, 1
    )
    options = {"norm": native.Norm.batch, "slope": 0.2, "first": False, "pool": False} | changes
    return (
        convolution, convolution, convolution, (144, 9, 3, 1), 0, False, False, options["norm"], 1e-5, options["slope"],
        options["first"], options["pool"], adds, last,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([_layer(), _layer(adds=2)], "layer 1 adds the input of one that comes before, or its own; got 2"),
        ([_layer(adds=-3)], "layer 0 adds the input of one that comes before, or its own; got -3"),
        ([_layer(adds=0, norm=native.Norm.none)], "after its norm, before or after its activation"),
        ([_layer(adds=0, first=True)], "after its norm, before or after its activation"),
        ([_layer(adds=0, pool=True)], "and it does not pool"),
        ([_layer(16, 24, adds=0)], "is like its output; got 16×8×8 for 24×8×8"),
        ([_layer(norm=native.Norm.none, slope=1.0), _layer(adds=1)], "is an activation, or the chain's input"),
        ([_layer(adds=0), _layer(adds=0)], "an input is added once; got layers 0 and 1"),
        ([_layer(adds=GIVEN), _layer(adds=GIVEN)], "what is given is added once; got layers 0 and 1"),
    ],
)
def test_additions_that_do_not_fit_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        native.Chain(layers, 1)


def test_a_layer_that_adds_has_no_residual_beside():
    chain = native.Chain([_layer(adds=0, norm=native.Norm.fixed)], 1)
    with pytest.raises(ValueError, match="the last layer adds an input, and has no residual"):
        chain.forward(8, 8, [8, 0, 0, 0], [8, 8, 0], [0.1], [], 8, 8, 1)


def test_what_is_given_has_to_be_given():
    chain = native.Chain([_layer(adds=GIVEN, norm=native.Norm.fixed), _layer(norm=native.Norm.fixed)], 1)
    with pytest.raises(ValueError, match="a layer adds what is given; got no residual"):
        chain.forward(8, 0, [8, 0, 0, 0] * 2, [8, 8, 0] * 2, [0.1] * 2, [], 8, 8, 1)


def test_what_the_last_layer_adds_last_has_the_gradient_of_the_output():
    chain = native.Chain([_layer(adds=GIVEN, last=True)], 1)
    x = image(2, 16, 8, 8)
    statistics = torch.zeros(chain.statistics_floats)
    with pytest.raises(ValueError, match="what is added last to the output has its gradient"):
        chain.backward(
            x.data_ptr(), x.data_ptr(), 0, [x.data_ptr(), 0, 0, 0], [x.data_ptr(), 0, 0], statistics.data_ptr(),
            0, x.data_ptr(), False, [0, 0, 0, 0], False, 1,
        )  # fmt: skip


def test_what_is_added_has_to_be_kept():
    chain = native.Chain([_layer(norm=native.Norm.fixed), _layer(adds=1, norm=native.Norm.fixed)], 1)
    with pytest.raises(ValueError, match="written must not be null"):
        chain.forward(8, 0, [8, 0, 0, 0] * 2, [8, 8, 0] * 2, [0.1] * 2, [8, 0, 0] * 2, 8, 8, 1)


def test_one_call_forward_and_one_backward(monkeypatch):
    made = []
    for way in ("forward", "backward"):
        original = getattr(NativeChain, way)
        monkeypatch.setattr(NativeChain, way, lambda *a, _o=original, _w=way, **k: (made.append(_w), _o(*a, **k))[1])
    layers, adds = blocks_of("two blocks")
    everything(in_one(adds), image(), layers)
    assert made == ["forward", "backward"]


@with_lesser_instruction_sets
def test_lesser_instruction_sets_pass_the_same_tests(isa):
    passes(__file__, isa, "-k", "residuals or gradients")
