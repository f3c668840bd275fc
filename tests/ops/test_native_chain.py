"""Chains in one native call: the same kernels, called from C++ as Python calls them layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from chains import everything, layer, with_grad
from instruction_sets import passes, with_lesser_instruction_sets
from torch import Tensor

pytest.importorskip("ganvas._native")

from ganvas import _native as native
from ganvas.ops import tuning
from ganvas.ops.backends import cpu
from ganvas.ops.backends.cpu import chain as native_chains
from ganvas.ops.backends.cpu import convolution
from ganvas.ops.backends.cpu.chain import NativeChain
from ganvas.ops.chain import Chain, Layer, conv_bn_leaky_relu_chain


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The native calls that were made, by name; a pass that was left to Python is not among them."""
    made: list[str] = []

    def recording(name: str):
        original = getattr(NativeChain, name)

        def record(*arguments, **options):
            result = original(*arguments, **options)
            if result is not None:
                made.append(name)
            return result

        return record

    for name in ("forward", "backward"):
        monkeypatch.setattr(NativeChain, name, recording(name))
    return made


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (4, 16, 8, 8), generator=torch.Generator().manual_seed(1)).to(dtype)


def chain_of(name: str) -> list[Layer]:
    generator = torch.Generator().manual_seed(0)

    def make(*arguments, **options) -> Layer:
        return layer(*arguments, generator=generator, **options)

    return {
        "batch statistics": lambda: [make(16, 24), make(24, 17), make(17, 16, "3x3 unpadded")],
        "given statistics": lambda: [make(16, 24, norm=False, bias=True), make(24, 16, norm=False, slope=0.0)],
        "no norm": lambda: [make(16, 24, norm=None, bias=True), make(24, 20, norm=None, bias=True)],
        "activation first": lambda: [
            make(16, 24, activation_first=True, bias=True),
            make(24, 16, norm=False, activation_first=True, bias=True),
            make(16, 16, activation_first=True, bias=True, affine=False),
        ],
        "pooling": lambda: [make(16, 24, max_pool=True), make(24, 20, norm=None, bias=True, max_pool=True)],
        "pooling in the middle": lambda: [make(16, 24, max_pool=True), make(24, 16), make(16, 16, bias=True)],
        "pooling twice, then no norm": lambda: [
            make(16, 16, norm=None, max_pool=True), make(16, 16, activation_first=True, max_pool=True),
            make(16, 16, norm=None),
        ],
        "strides": lambda: [
            make(16, 24, "stride 2"), make(24, 16, "4x4 stride 2 transposed"), make(16, 32, "4x4 stride 2"),
            make(32, 16, "upsampled", bias=True), make(16, 40, "1x1"),
        ],
        "convolutions alone": lambda: [
            make(16, 24, norm=None, slope=1.0, bias=True), make(24, 16), make(16, 16, norm=None, slope=1.0, bias=True)
        ],
        "one convolution alone": lambda: [make(16, 24, norm=None, slope=1.0)],
        "one layer": lambda: [make(16, 24)],
    }[name]()  # fmt: skip


CHAINS = (
    "batch statistics", "given statistics", "no norm", "activation first", "pooling", "pooling in the middle",
    "pooling twice, then no norm", "strides", "convolutions alone", "one convolution alone", "one layer",
)  # fmt: skip


def layer_by_layer(monkeypatch, input: Tensor, layers: Sequence[Layer], *options) -> dict[str, Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "native_chain", lambda *_: None)
        return everything(conv_bn_leaky_relu_chain, input, layers, *options)


def assert_the_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", CHAINS)
def test_a_step_has_the_same_bits_as_layer_by_layer(monkeypatch, calls, name, groups):
    expected = layer_by_layer(monkeypatch, image(), chain_of(name), groups)
    assert_the_same(everything(conv_bn_leaky_relu_chain, image(), chain_of(name), groups), expected)
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("name", CHAINS)
def test_without_gradients_too(monkeypatch, calls, name):
    layers = chain_of(name)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(cpu, "native_chain", lambda *_: None)
        expected = conv_bn_leaky_relu_chain(image(), with_grad(layers))
    with torch.no_grad():
        assert torch.equal(conv_bn_leaky_relu_chain(image(), with_grad(layers)), expected)
    assert calls == ["forward"]


@pytest.mark.parametrize("forward", ["winograd", "direct"])
@pytest.mark.parametrize("backward", [("winograd", "direct"), ("direct", "winograd")])
def test_each_direction_may_take_another_family(monkeypatch, calls, forward, backward):
    families = {"forward_with_statistics": forward}
    families["backward_input"], families["backward_weight"] = backward
    monkeypatch.setattr(convolution, "_fastest", lambda makes, *arguments: families[arguments[-1]])
    expected = layer_by_layer(monkeypatch, image(), chain_of("batch statistics"), 2)
    assert_the_same(everything(conv_bn_leaky_relu_chain, image(), chain_of("batch statistics"), 2), expected)
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_with_a_residual(monkeypatch, calls, slope, norm):
    generator = torch.Generator().manual_seed(0)
    layers = [layer(16, 24, generator=generator), layer(24, 16, norm=norm, slope=slope, generator=generator)]
    options = (2, torch.randn(4, 16, 8, 8, generator=generator))
    expected = layer_by_layer(monkeypatch, image(), layers, *options)
    assert_the_same(everything(conv_bn_leaky_relu_chain, image(), layers, *options), expected)
    assert calls == ["forward", "backward"]


def gradients_with_itself_added(x: Tensor, layers: Sequence[Layer], same: bool) -> list[Tensor]:
    """Of the chain's input, where it is also the residual or a copy is, and of the first weight."""
    x, layers = x.clone(memory_format=torch.preserve_format).requires_grad_(), with_grad(layers)
    residual = x if same else x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = conv_bn_leaky_relu_chain(x, layers, 2, residual)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output))
    return [x.grad if same else x.grad + residual.grad, layers[0].weight.grad]


@pytest.mark.parametrize("slope", [0.2, 1.0])
@pytest.mark.parametrize(
    "kinds", [("3x3", "3x3"), ("1x1", "3x3"), ("4x4 stride 2", "4x4 stride 2 transposed"), ("3x3",)]
)
def test_a_residual_that_is_the_input(calls, kinds, slope):
    """Its gradient is added where the input's is written."""
    generator = torch.Generator().manual_seed(0)
    layers = [layer(16, 16, kind, slope=slope, generator=generator) for kind in kinds]
    x = image(4, 16, 10, 10).contiguous(memory_format=torch.channels_last)
    expected, got = (gradients_with_itself_added(x, layers, same) for same in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert calls == ["forward", "backward"] * 2


def test_a_residual_that_is_the_input_in_bfloat16(calls):
    layers = [replace(one, weight=one.weight.bfloat16()) for one in (layer(16, 24), layer(24, 16), layer(16, 16))]
    x = image(4, 16, 10, 10, dtype=torch.bfloat16)
    expected, got = (gradients_with_itself_added(x, layers, same) for same in (False, True))
    torch.testing.assert_close(got[0].float(), expected[0].float(), rtol=2**-6, atol=2**-6)
    assert torch.equal(got[1], expected[1])
    assert calls == ["forward", "backward"] * 2


def test_a_residual_that_is_the_input_where_neither_wants_a_gradient(calls):
    x, layers = image(), [layer(16, 24), layer(24, 16)]
    weights = []
    for residual in (x, x.clone()):
        own = with_grad(layers)
        conv_bn_leaky_relu_chain(x, own, 1, residual).square().sum().backward()
        weights.append([one.weight.grad for one in own])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert calls == ["forward", "backward"] * 2


@pytest.mark.parametrize("name", ["batch statistics", "activation first", "pooling in the middle", "strides"])
def test_in_bfloat16(monkeypatch, calls, name):
    layers = [
        replace(one, weight=one.weight.bfloat16(), bias=None if one.bias is None else one.bias.bfloat16())
        for one in chain_of(name)
    ]
    x = image(dtype=torch.bfloat16)
    expected = layer_by_layer(monkeypatch, x, layers)
    assert_the_same(everything(conv_bn_leaky_relu_chain, x, layers), expected)
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["batch statistics", "given statistics", "activation first", "strides"])
def test_of_bfloat16_parameters_and_statistics(monkeypatch, calls, name, groups):
    """As ``model.bfloat16()`` has them. Running statistics are rounded once, layer by layer more often."""
    layers = []
    for one in chain_of(name):
        fields = ("weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var")
        values = {field: getattr(one, field) for field in fields}
        layers.append(replace(one, **{field: v if v is None else v.bfloat16() for field, v in values.items()}))
    x = image(dtype=torch.bfloat16)
    expected = layer_by_layer(monkeypatch, x, layers, groups)
    got = everything(conv_bn_leaky_relu_chain, x, layers, groups)
    assert calls == ["forward", "backward"]
    for statistics in ("running_mean", "running_var"):
        for key in [key for key in expected if key.startswith(statistics)]:
            assert got[key].dtype is torch.bfloat16
            torch.testing.assert_close(got.pop(key), expected.pop(key), rtol=2**-6, atol=2**-6)
    assert_the_same(got, expected)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    "narrow", [("weight", "bias"), ("weight", "bias", "running_mean"), ("running_mean", "running_var")]
)
def test_of_values_of_several_dtypes(monkeypatch, calls, narrow, norm):
    """None loses digits because another one has fewer."""
    layers = [layer(16, 24, norm=norm, bias=True, affine=False), layer(24, 16, norm=norm, bias=True, affine=False)]
    layers = [replace(one, **{name: getattr(one, name).bfloat16() for name in narrow}) for one in layers]
    x = image(dtype=layers[0].weight.dtype)
    expected = layer_by_layer(monkeypatch, x, layers)
    got = everything(conv_bn_leaky_relu_chain, x, layers)
    assert calls == ["forward", "backward"]
    for key in [key for key in expected if key.startswith("running")]:  # moved in torch, rounded more often
        assert got[key].dtype is expected[key].dtype
        error = 2**-6 if got[key].dtype is torch.bfloat16 else 1e-6
        torch.testing.assert_close(got.pop(key), expected.pop(key), rtol=error, atol=error)
    assert_the_same(got, expected)


def test_a_bfloat16_weight_with_gaps_leaves_the_chain_to_python(calls):
    (one,) = chain_of("one layer")
    wider = torch.zeros(48, 16, 3, 3, dtype=torch.bfloat16)
    wider[::2] = one.weight
    x = image(dtype=torch.bfloat16)
    with torch.no_grad():
        expected = conv_bn_leaky_relu_chain(x, [replace(one, weight=one.weight.bfloat16())])
        assert torch.equal(conv_bn_leaky_relu_chain(x, [replace(one, weight=wider[::2])]), expected)
    assert calls == ["forward"]


def saved_of(output: Tensor) -> list[Tensor]:
    return [tensor for tensor in output.grad_fn.saved_tensors if tensor is not None]


def gradients_of(leaves: Sequence[Tensor]) -> list[Tensor]:
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["batch statistics", "pooling in the middle", "pooling", "strides"])
def test_a_graph_that_is_retained_gives_the_same_gradients_again(calls, name, dtype):
    x, layers = image(dtype=dtype).requires_grad_(), with_grad(chain_of(name), dtype)
    leaves = [x, *(tensor for one in layers for tensor in one.tensors if tensor is not None)]
    output = conv_bn_leaky_relu_chain(x, layers)
    before = [tensor.clone() for tensor in saved_of(output)]
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    output.backward(grad, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(saved_of(output), before, strict=True))
    first = gradients_of(leaves)
    output.backward(grad)
    assert all(torch.equal(a, b) for a, b in zip(gradients_of(leaves), first, strict=True))
    assert calls == ["forward", "backward", "backward"]


def test_a_last_backward_pass_takes_one_buffer_beside_what_forward_kept():
    native.release_workspace()
    held = []
    for retain_graph in (True, False):
        output = conv_bn_leaky_relu_chain(image(16, 16, 128, 128), with_grad([layer(16, 16) for _ in range(3)]))
        output.sum().backward(retain_graph=retain_graph)
        held.append(native.workspace_bytes_held())
        native.release_workspace()
    assert held[0] - held[1] == output.numel() * output.element_size()


def test_what_hooks_hold_stays_as_it_was(calls):
    held = []

    def hold(tensor: Tensor) -> Tensor:
        held.append((tensor, tensor.clone()))
        return tensor

    layers = with_grad(chain_of("batch statistics"))
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        output = conv_bn_leaky_relu_chain(image(), layers)
    output.sum().backward()
    assert all(torch.equal(tensor, copy) for tensor, copy in held)
    assert calls == ["forward", "backward"]


def test_a_backward_pass_that_fails_half_way_is_not_run_on_what_it_left(monkeypatch):
    layers = with_grad(chain_of("batch statistics"))
    output = conv_bn_leaky_relu_chain(image(), layers)

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(native_chains, "_addresses", fail)
        with pytest.raises(MemoryError):
            output.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


PLACES = ["input", *(f"{name} {i}" for i in range(3) for name in ("weight", "bias", "bn_weight", "bn_bias"))]


@pytest.mark.parametrize("wanted", PLACES)
def test_what_is_wanted_alone_gets_the_same_gradient(calls, wanted):
    layers = chain_of("activation first")
    layers[2] = replace(layers[2], bn_weight=torch.ones(16), bn_bias=torch.zeros(16))
    everywhere = everything(conv_bn_leaky_relu_chain, image(), layers)
    own = with_grad(layers)
    leaves = {"input": image()}
    for i, one in enumerate(own):
        for name in ("weight", "bias", "bn_weight", "bn_bias"):
            leaves[f"{name} {i}"] = getattr(one, name)
    for place, leaf in leaves.items():
        leaf.requires_grad_(place == wanted)
    output = conv_bn_leaky_relu_chain(leaves["input"], own)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(leaves[wanted].grad, everywhere[f"grad of {wanted}"])
    assert all(leaf.grad is None for place, leaf in leaves.items() if place != wanted)
    assert calls == ["forward", "backward"] * 2


@pytest.mark.parametrize("direction", ["backward_input", "backward_weight"])
def test_torchs_convolution_may_be_the_faster_one_backward(monkeypatch, calls, direction):
    chosen = native_chains.chosen_convolution

    def choose(geometry, weight, input_shape, dtype, way, backend=None):
        return None if way == direction else chosen(geometry, weight, input_shape, dtype, way, backend)

    layers = chain_of("pooling in the middle")
    expected = everything(conv_bn_leaky_relu_chain, image(), layers, 2)
    for module in (native_chains, cpu):
        monkeypatch.setattr(module, "chosen_convolution", choose)
    got = everything(conv_bn_leaky_relu_chain, image(), layers, 2)
    assert calls == ["forward", "backward", "forward"]
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-3 * tensor.abs().max().item(), msg=name)


def test_a_convolution_of_torchs_forward_leaves_the_chain_to_python(calls):
    layers = [layer(16, 24), layer(24, 16, "grouped"), layer(16, 16)]
    conv_bn_leaky_relu_chain(image(), layers)
    assert calls == []


@pytest.mark.parametrize("kind", ["double", "every second value"])
def test_statistics_that_no_kernel_reaches_leave_the_chain_to_python(calls, kind):
    (one,) = chain_of("one layer")
    odd = torch.zeros(48)[::2] if kind == "every second value" else torch.zeros(24, dtype=torch.float64)
    conv_bn_leaky_relu_chain(image(), [replace(one, running_mean=odd)])
    assert calls == []


def test_batches_are_counted_where_autograd_sees_it():
    (one,) = chain_of("one layer")
    counted = replace(one, batches=torch.tensor(5))
    chain = Chain([counted])
    version = counted.batches._version
    for groups in (1, 2):
        chain(image(), groups)
    assert counted.batches == 8
    assert counted.batches._version >= version + 2


def test_weights_that_overlap_get_a_gradient_of_their_own():
    (one,) = chain_of("one layer")
    expanded = torch.randn(24, 16, 3, 3).div(12)[:, :1].expand(24, 16, 3, 3)
    got = everything(conv_bn_leaky_relu_chain, image(), [replace(one, weight=expanded)])
    leaf = expanded.detach().requires_grad_()
    conv_bn_leaky_relu_chain(image(), [replace(one, weight=leaf)]).backward(
        torch.randn(4, 24, 8, 8, generator=torch.Generator().manual_seed(1))
    )
    torch.testing.assert_close(leaf.grad, got["grad of weight 0"])


def test_choices_that_were_forgotten_are_made_again(monkeypatch, tmp_path):
    monkeypatch.setenv("GANVAS_CACHE_DIR", str(tmp_path))
    chain = Chain(chain_of("one layer"))
    x = image()
    first = chain.prepare(x, 1, None)
    assert chain.prepare(x, 1, None) is first
    tuning.clear()
    assert chain.prepare(x, 1, None) is not first


@pytest.mark.parametrize(
    "change",
    [
        lambda one: setattr(one.weight, "data", one.weight.data.contiguous(memory_format=torch.channels_last)),
        lambda one: setattr(one.weight, "data", one.weight.data.bfloat16()),
        lambda one: setattr(one.bn_weight, "data", torch.ones(48)[::2]),
    ],
)
def test_a_tensor_of_another_layout_is_looked_at_again(change):
    (one,) = chain_of("one layer")
    chain = Chain([one])
    first = chain.prepare(image(), 1, None)
    change(one)
    assert chain.prepare(image(), 1, None) is not first


def test_a_pruned_weight_is_not_read_as_it_was():
    """The smaller tensor begins where the larger one did."""
    (one,) = chain_of("one layer")
    chain = Chain([one])
    chain(image())
    for name in ("weight", "bn_weight", "bn_bias", "running_mean", "running_var"):
        tensor = getattr(one, name)
        tensor.data = tensor.data[:20]
    output = chain(image())
    assert torch.equal(output, conv_bn_leaky_relu_chain(image(), with_grad([one])))
    assert output.shape[1] == 20


def _convolution(channels: int = 16, out: int = 16, side: int = 8) -> native.Convolution:
    return native.Convolution(
        native.ConvolutionKind.conv3x3, native.Dtype.float32, False, (2, channels, side, side), out, 1
    )


def _layer(convolution: native.Convolution, norm: native.Norm = native.Norm.batch, max_pool: bool = False) -> tuple:
    return (
        convolution, convolution, convolution, (144, 9, 3, 1), 0, False, False, norm, 1e-5, 0.2, False, max_pool, -1,
        False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "groups", "message"),
    [
        ([], 1, "a chain has at least one layer; got none"),
        ([_layer(_convolution(16, 24)), _layer(_convolution(16))], 1, "a layer of 2×16×8×8 after one that .* 2×24×8×8"),
        ([_layer(_convolution(), max_pool=True), _layer(_convolution())], 1, "after one that puts out 2×16×4×4"),
        ([_layer(_convolution())], 3, "groups must divide the batch of 2; got 3"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layers, groups, message):
    with pytest.raises(ValueError, match=message):
        native.Chain(layers, groups)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": 0}, "input must not be null"),
        ({"output": 6}, "output must be aligned to 4 bytes; got address 6"),
        ({"parameters": [8, 0, 0]}, "each layer has 4 parameters; got 3 for 1 layers"),
        ({"parameters": [0, 0, 0, 0]}, "weight must not be null"),
        ({"moving": [8, 0, 0]}, "running_mean and running_var go together"),
        ({"moving": [0, 0, 0]}, "fixed statistics must be given"),
        ({"momenta": []}, "each layer has a momentum; got 0 for 1 layers"),
        ({"statistics": 0}, "statistics must not be null"),
        ({"kept": [0, 0, 0], "statistics": 8}, "stored must not be null"),
    ],
)
def test_addresses_are_validated_before_any_work(changes, message):
    chain = native.Chain([_layer(_convolution(), native.Norm.fixed)], 1)
    arguments = {
        "input": 8, "residual": 0, "parameters": [8, 0, 0, 0], "moving": [8, 8, 0], "momenta": [0.1], "kept": [],
        "statistics": 8, "output": 8, "threads": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        chain.forward(*{**arguments, **changes}.values())


def test_a_gradient_that_is_not_made_is_refused():
    x, weight = image(2, 16, 8, 8), torch.zeros(16, 16, 3, 3)
    forward, *others = _layer(_convolution(), native.Norm.none)
    chain = native.Chain([(forward, None, None, *others[2:])], 1)
    statistics = torch.zeros(chain.statistics_floats)
    for gradients, grad_input in (([weight.data_ptr(), 0, 0, 0], 0), ([0, 0, 0, 0], x.data_ptr())):
        with pytest.raises(ValueError, match="is asked for, but not made here"):
            chain.backward(
                x.data_ptr(), x.data_ptr(), 0, [weight.data_ptr(), 0, 0, 0], [x.data_ptr(), 0, 0],
                statistics.data_ptr(), grad_input, 0, False, gradients, False, 1,
            )  # fmt: skip


def test_a_residual_that_is_the_input_has_no_gradient_of_its_own():
    x, weight = image(2, 16, 8, 8), torch.zeros(16, 16, 3, 3)
    chain = native.Chain([_layer(_convolution(), native.Norm.none)], 1)
    statistics = torch.zeros(chain.statistics_floats)
    with pytest.raises(ValueError, match="the gradient of a residual that is the input has no place"):
        chain.backward(
            x.data_ptr(), x.data_ptr(), 0, [weight.data_ptr(), 0, 0, 0], [x.data_ptr(), 0, 0], statistics.data_ptr(),
            x.data_ptr(), x.data_ptr(), True, [0, 0, 0, 0], False, 1,
        )  # fmt: skip


@with_lesser_instruction_sets
def test_lesser_instruction_sets_pass_the_same_tests(isa):
    passes(__file__, isa, "-k", "same_bits or residual")
