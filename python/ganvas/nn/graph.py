"""Rewrites a traced forward so that its runs of layers execute as one operation each.

Runs are the same as among a Sequential's children (:mod:`ganvas.nn.plan`), and two more things can be part of them:
activations, pooling and upsampling called as functions (``F.relu``, ``x.relu_()``), and the addition of a residual to a
norm's output or to the activation of that. Runs that follow each other directly, the output of one read by the next and
by nothing else, become one step, a ``Line``.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ganvas.nn.line import Line
from ganvas.nn.plan import letter_of
from ganvas.nn.run import CONVOLUTIONS, Run, breaks_on_channels_last
from ganvas.nn.tracing import IN_PLACE_OPERATORS, Trace, has_hooks
from ganvas.ops.layers import Adds


@dataclass(frozen=True, eq=False)
class Group:
    """The nodes of the traced graph that are one run."""

    nodes: tuple[fx.Node, ...]
    run: Run
    addition: fx.Node | None
    """The one among the nodes that adds a residual."""
    names: tuple[str, ...]
    """Of the modules among the layers, as seen from the traced one."""
    types: tuple[str, ...]
    """What the nodes are: types of modules, names of functions."""

    @property
    def input(self) -> fx.Node:
        """What the first node reads."""
        return self.nodes[0].args[0]  # type: ignore[return-value]

    @property
    def residual(self) -> fx.Node | None:
        """What is added to the norm's output, or to the activation of that."""
        if self.addition is None:
            return None
        return next(operand for operand in self.addition.args if operand not in self.nodes)  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class FusedForward:
    """``function(module, *arguments)`` does what the module's forward does."""

    function: Callable[..., Any]
    source: str
    lines: tuple[Line, ...]
    groups: tuple[Group, ...]
    """Those that are more than a convolution."""
    disturbed: tuple[Group, ...]
    """Layers that would be a run, if nothing ran between them that may write to what they read."""

    @property
    def channels_last(self) -> bool:
        """Whether 4-D inputs are converted to channels_last, where native kernels run."""
        return any(group.run.channels_last for group in self.groups)


def fuse(module: nn.Module, trace: Trace) -> FusedForward:
    """Rewrites ``trace``'s graph in place and generates its code."""
    graph = trace.graph
    layers = {node: layer for node in graph.nodes if (layer := _layer(node, module)) is not None}
    position = {node: i for i, node in enumerate(graph.nodes)}
    groups = [group for chain in _chains(graph.nodes, layers) for group in _groups(chain, layers)]
    of_node = {node: group for group in groups for node in group.nodes}

    def undisturbed(members: Iterable[Group]) -> bool:
        """Whether executing the members where the last one's result is due changes nothing for anybody."""
        nodes = {node for group in members for node in group.nodes}
        norms = {layers[node].module for node in nodes if layers[node].letter == "N"}
        first, last = min(map(position.__getitem__, nodes)), max(map(position.__getitem__, nodes))
        between = [node for node, i in position.items() if first < i < last and node not in nodes]
        return not any(_disturbs(node, module, norms, of_node.get(node)) for node in between)

    groups.sort(key=lambda group: position[group.nodes[-1]])
    disturbed = tuple(group for group in groups if not undisturbed([group]))
    groups = [group for group in groups if group not in disturbed]
    lines = [_replace(graph, members) for members in _lines(groups, undisturbed)]
    _call_on_contiguous(graph, module)
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<fused forward of {type(module).__name__}>", "exec"), namespace)
    fused = tuple(group for group in groups if not group.run.is_bare)
    return FusedForward(namespace["forward"], code.src, tuple(lines), fused, disturbed)


@dataclass(frozen=True, eq=False)
class _Layer:
    """What a node is in a run: one letter as in :mod:`ganvas.nn.plan`, and ``+`` for an addition."""

    letter: str
    type: str
    module: nn.Module | None = None
    """Also of an activation that is called as a function: a module that does the same."""


# In C-A-N-A the second activation goes with the norm, the first with the convolution, over whose output it is written.
# A leading in-place activation writes over a tensor from outside, which a fused run would leave as it is: not fused.
_RUN = re.compile(r"U?CN(?:\+[Aa]?|[Aa]\+|[Aa]?P?)|U?C[Aa]N(?![Aa+])P?|U?C[Aa]P?|U?C|N(?:\+[Aa]?|[Aa])|AN(?![Aa+])|N")


def _max_pool(
    input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> nn.Module:  # fmt: skip
    return nn.MaxPool2d(kernel_size, stride or None, padding, dilation, return_indices, ceil_mode)


def _upsampling(
    input: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *_: Any, **__: Any
) -> nn.Module:
    return nn.Upsample(size, scale_factor, mode)  # of nearest neighbours, which the other options do not change


# torch's own signatures, to the module that does the same
_FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    F.relu: lambda input, inplace=False: nn.ReLU(inplace),
    torch.relu: lambda input: nn.ReLU(),
    torch.relu_: lambda input: nn.ReLU(True),
    F.leaky_relu: lambda input, negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope, inplace),
    F.leaky_relu_: lambda input, negative_slope=0.01: nn.LeakyReLU(negative_slope, True),
    "relu": lambda input: nn.ReLU(),
    "relu_": lambda input: nn.ReLU(True),
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    F.interpolate: _upsampling,
}
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE_ADDITIONS = (operator.iadd, "add_")


def _layer(node: fx.Node, root: nn.Module) -> _Layer | None:
    if node.op == "call_module":
        return _module_layer(node, root.get_submodule(str(node.target)))
    if node.op not in ("call_function", "call_method"):
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.target in _FUNCTIONS:
        if len(node.all_input_nodes) > 1:  # a slope, or a size, that is computed
            return None
        module = _FUNCTIONS[node.target](*node.args, **node.kwargs)
        letter = letter_of(module)
        return None if letter == "-" else _Layer(letter, str(name), module)
    if node.target in _ADDITIONS and not node.kwargs and len(node.args) == 2:
        first, second = node.args
        if isinstance(second, fx.Node) and first is not second:
            return _Layer("+", "add")
    return None


def _module_layer(node: fx.Node, module: nn.Module) -> _Layer | None:
    if len(node.args) != 1 or node.kwargs:
        return None
    letter = letter_of(module)
    return None if letter == "-" else _Layer(letter, type(module).__name__, module)


def _chains(nodes: Iterable[fx.Node], layers: dict[fx.Node, _Layer]) -> list[list[fx.Node]]:
    """Layers that follow each other: each one's value is read by the next and by nothing else."""
    chains: list[list[fx.Node]] = []
    ending_in: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if node not in layers:
            continue
        before = _main_input(node, layers)
        if before in ending_in and len(before.users) == 1:
            chain = ending_in.pop(before)
        else:
            chain = []
            chains.append(chain)
        chain.append(node)
        ending_in[node] = chain
    return chains


def _main_input(node: fx.Node, layers: dict[fx.Node, _Layer]) -> fx.Node:
    """The value that a layer continues; of an addition's operands the norm's output that nobody else reads.

    Else it is the activation of such an output.
    """
    if layers[node].letter != "+":
        return node.args[0]  # type: ignore[return-value]
    written, other = node.args
    candidates = [written] if node.target in _IN_PLACE_ADDITIONS else [written, other]
    alone = [operand for operand in candidates if operand in layers and len(operand.users) == 1]  # type: ignore[union-attr,operator]
    for operand in alone:
        if layers[operand].letter == "N":  # type: ignore[index]
            return operand  # type: ignore[return-value]
    for operand in alone:
        before = operand.args[0]  # type: ignore[union-attr]
        if layers[operand].letter in "Aa" and before in layers and layers[before].letter == "N":  # type: ignore[index]
            return operand  # type: ignore[return-value]
    return written  # type: ignore[return-value]


def _groups(chain: list[fx.Node], layers: dict[fx.Node, _Layer]) -> list[Group]:
    groups = []
    for match in _RUN.finditer("".join(layers[node].letter for node in chain)):
        nodes = tuple(chain[match.start() : match.end()])
        by_letter = {layers[node].letter.upper(): node for node in nodes}
        module_of = {letter: layers[node].module for letter, node in by_letter.items()}
        producer, letters = module_of.get("C"), match.group().upper()
        if letters.endswith("C") and type(producer) not in CONVOLUTIONS:
            continue
        names = tuple(str(node.target) for node in nodes if node.op == "call_module")
        run = Run(
            names=names,
            modules=tuple(module for node in nodes if (module := layers[node].module) is not None),
            producer=producer,
            norm=module_of.get("N"),  # type: ignore[arg-type]
            activation=module_of.get("A"),
            order="conv_act_bn" if "AN" in letters else "conv_bn_act",
            channels_last="N" in {layer.letter for layer in layers.values()},
            upsample=module_of.get("U"),
            pool=module_of.get("P"),
            adds_last=letters.endswith("A+"),
        )
        groups.append(Group(nodes, run, by_letter.get("+"), names, tuple(layers[node].type for node in nodes)))
    return groups


def _disturbs(node: fx.Node, root: nn.Module, norms: set[nn.Module | None], group: Group | None) -> bool:
    """Whether ``node`` may write to a tensor that it did not make itself, or to the statistics of one of ``norms``."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if module in norms or not _is_torchs(module) or has_hooks(module):
            return True
        in_place = bool(getattr(module, "inplace", False))
    elif node.op == "call_method":
        in_place = bool(re.search(r"[^_]_$", str(node.target)))
    elif node.op == "call_function":
        name, package = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", None) or "torch"
        if package.split(".")[0] not in ("torch", "_operator", "builtins", "math"):
            return True  # marked by torch.fx.wrap
        in_place = name.endswith("_") or node.target in IN_PLACE_OPERATORS
        in_place = in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
    else:
        return False
    # Within a run what is written to is the run's own.
    return in_place and (group is None or node is group.nodes[0])


def _call_on_contiguous(graph: fx.Graph, root: nn.Module) -> None:
    """Convolutions outside of the lines, which turn out channels_last values, that torch breaks on in this layout."""
    for node in graph.nodes:
        if node.op == "call_module" and node.args and breaks_on_channels_last(root.get_submodule(str(node.target))):
            with graph.inserting_before(node):
                node.update_arg(0, graph.call_method("contiguous", (node.args[0],)))


def _is_torchs(module: nn.Module) -> bool:
    return type(module).forward.__module__.startswith("torch.nn")


def _lines(groups: list[Group], undisturbed: Callable[[Iterable[Group]], bool]) -> list[list[Group]]:
    """Groups that follow each other; then blocks of them, of which each may add its input at its end."""
    lines = _joined([[group] for group in groups], undisturbed)
    while len(longer := _joined(lines, undisturbed)) < len(lines):
        lines = longer
    return lines


def _joined(lines: list[list[Group]], undisturbed: Callable[[Iterable[Group]], bool]) -> list[list[Group]]:
    joined: list[list[Group]] = []
    ending_in: dict[fx.Node, list[Group]] = {}
    for line in lines:
        input = line[0].input
        before = ending_in.get(input)
        if before is not None and _reads_alone(line, input) and undisturbed([*before, *line]):
            del ending_in[input]
            before += line
        else:
            joined.append(before := list(line))
        ending_in[before[-1].nodes[-1]] = before
    return joined


def _reads_alone(line: list[Group], input: fx.Node) -> bool:
    """Whether nothing else reads ``input``, which the line's first layer does; the line may add it, once."""
    readers = set(input.users) - {line[0].nodes[0]}
    if not readers:
        return True
    adding = [group.addition for group in line if group.residual is input]
    return len(adding) == 1 and readers == set(adding)


def _additions(members: list[Group]) -> Adds:
    """Of a line's groups, the one whose input each adds, each of those once; None: none, or what the line is given."""
    position = {group.input: i for i, group in enumerate(members)}
    return tuple(None if group.residual is None else position.pop(group.residual, None) for group in members)


def _replace(graph: fx.Graph, members: list[Group]) -> Line:
    """Puts one call of a line where the last of its nodes stands."""
    adds = _additions(members)
    line = Line(tuple(group.run for group in members), adds)
    nodes = [node for group in members for node in group.nodes]
    residuals = (group.residual if added is None else None for group, added in zip(members, adds))
    with graph.inserting_after(nodes[-1]):
        call = graph.call_function(line, (members[0].input, *residuals))
    nodes[-1].replace_all_uses_with(call)
    for node in reversed(nodes):
        graph.erase_node(node)
    return line
