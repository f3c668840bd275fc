"""Symbolic traces of a module's forward (torch.fx), or the reason why there is none.

``torch.fx`` records what happens to a value and forgets the rest. What it would get wrong in silence is refused here: a
forward that draws random numbers or sets attributes while it is traced, that switches gradients or autocast, or that
computes tensors out of nothing. ``x += y`` is recorded as what it is, where fx writes ``x = x + y``.
"""

from __future__ import annotations

import copy
import inspect
import operator
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from ganvas.nn.fused import FusedSequential
from ganvas.nn.run import PRODUCERS

IN_PLACE_OPERATORS: tuple[Callable[[Any, Any], Any], ...] = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
)  # fmt: skip


class NotTraceable(Exception):
    """Why a module's forward cannot be traced, in words."""


class Trace:
    """What a module's forward does.

    Attributes:
        graph: placeholders for the arguments that have no default, calls of torch's functions and of modules.
        arguments: the placeholders' names.
        inlined: the modules whose forward is part of the graph, the traced one first, and the ``nn.Identity`` s in it.
        opaque: modules that the graph calls since they could not be traced, with the reason.
    """

    def __init__(self, graph: fx.Graph, arguments: tuple[str, ...], tracer: _Tracer) -> None:
        self.graph = graph
        self.arguments = arguments
        self.inlined: tuple[nn.Module, ...] = tuple(dict.fromkeys(tracer.inlined))
        self.opaque: dict[nn.Module, str] = tracer.opaque


def trace(module: nn.Module, opaque: dict[nn.Module, str] | None = None) -> Trace:
    """Traces ``module``'s forward through those of its children; a child that can't be traced is called as it is.

    Arguments with a default are taken to be left at it, all others to be tensors.

    Args:
        opaque: children that are known not to be traceable.

    Raises:
        NotTraceable: with the reason.
    """
    arguments = _required_arguments(module)
    found = dict(opaque or {})
    while True:
        tracer = _Tracer(arguments, found)
        try:
            with _switches_show(), _nothing_else_changes(module.modules()):
                return Trace(tracer.trace(module), arguments, tracer)
        except _OpaqueChild as child:
            found[child.module] = child.reason  # and once more, this time calling it
        except NotTraceable:
            raise
        except Exception as error:
            raise NotTraceable(_first_line(error)) from error
        finally:
            tracer.__dict__.clear()  # fx leaves a cycle of closures behind, which would keep the module alive


def has_traceable_type(module: nn.Module) -> bool:
    """Whether ``module`` is no layer itself but calls layers: its author's own class, or a Sequential."""
    if is_parametrized(module) or isinstance(module, (_BatchNorm, *PRODUCERS)):
        return False
    forward = type(module).forward
    if isinstance(module, FusedSequential):
        return forward is FusedSequential.forward  # one that calls it looks at more than can be traced
    return isinstance(module, nn.Sequential) or not forward.__module__.startswith("torch.nn")


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """``module``'s forward as its class has it; a FusedSequential's children are called one by one."""
    cls = nn.Sequential if type(module).forward is FusedSequential.forward else type(module)
    return cls.forward.__get__(module)


def must_be_called(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward: hooks, a forward of its own, statistics groups."""
    state = module.__dict__
    return bool(
        has_hooks(module)
        or "statistics_groups" in state
        or ("forward" in state and not isinstance(state["forward"], BoundForward))
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class BoundForward:
    """A forward that ``convert`` has set on an instance; what the class's forward does."""


def is_converted(module: nn.Module) -> bool:
    """Whether ``convert`` has bound ``module``'s forward anew."""
    return isinstance(module.__dict__.get("forward"), BoundForward)


class _OpaqueChild(Exception):
    def __init__(self, module: nn.Module, reason: str) -> None:
        super().__init__(reason)
        self.module = module
        self.reason = reason


class _Value(fx.Proxy):
    """A traced value. In-place operators are recorded as such."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return self.__dict__.get("pretends") or type(self)

    def __getattr__(self, name: str) -> Any:
        if self.__class__ is Tensor and not hasattr(Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return super().__getattr__(name)


def _in_place(function: Callable[..., Any]) -> Callable[[_Value, Any], Any]:
    def record(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _operator in IN_PLACE_OPERATORS:
    setattr(_Value, f"__{_operator.__name__}__", _in_place(_operator))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else a forward could compute with a buffer's present value, or write to it

    def __init__(self, arguments: tuple[str, ...], opaque: dict[nn.Module, str]) -> None:
        super().__init__()
        self.arguments = arguments
        self.opaque = opaque
        self.inlined: list[nn.Module] = []
        self.modes = _modes()

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        self.modes = _modes()
        self.inlined.append(self.root)
        values = [self.create_proxy("placeholder", name, (), {}) for name in self.arguments]
        for value in values:
            value.__dict__["pretends"] = Tensor  # what the caller of the traced forward makes sure of
        return root_fn, [self.root, *values]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise NotTraceable("it switches gradients, autocast or saved tensors on or off")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            raise NotTraceable("it makes tensors that depend on no input")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.opaque or must_be_called(m) or not has_traceable_type(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.is_leaf_module(m, ""):
            if type(m) is nn.Identity and not must_be_called(m):
                self.inlined.append(m)
                return args[0]
            return super().call_module(m, forward, args, kwargs)
        self.inlined.append(m)
        try:
            with _nothing_else_changes([m]):
                return super().call_module(m, plain_forward(m), args, kwargs)
        except _OpaqueChild:
            raise
        except Exception as error:
            raise _OpaqueChild(m, _first_line(error)) from error


def _required_arguments(module: nn.Module) -> tuple[str, ...]:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = tuple(p.name for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty)
    if not required:
        raise NotTraceable("it takes no argument that is sure to be there")
    return required


def _first_line(error: Exception) -> str:
    if isinstance(error, NotTraceable):
        return str(error)
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"it cannot be traced: {message}"


def _modes() -> tuple[Any, ...]:
    """What decides beside the arguments what a torch function does."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


@contextmanager
def _nothing_else_changes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts random states and the modules' attributes back.

    Raises:
        NotTraceable: the block drew random numbers or set an attribute.
    """
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    # A module's __dict__ and its dictionaries of parameters, buffers and children; then the containers in all of them.
    slots: list[dict[str, Any]] = [slot for module in modules for slot in (module.__dict__, *_registries(module))]
    containers = [(key, value) for slot in slots for key, value in slot.items() if isinstance(value, (list, dict, set))]
    named = [*(("", slot) for slot in slots), *containers]
    before = [copy.copy(container) for _, container in named]
    changed: set[str] = set()
    try:
        yield
    finally:
        for (name, container), contents in zip(named, before):
            changed |= {name or key for key in _put_back(container, contents)}
        drew = not torch.equal(torch.get_rng_state(), torch_state) or random.getstate() != python_state
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
    if changed:
        raise NotTraceable(f"it sets attributes: {', '.join(sorted(changed))}")
    if drew:
        raise NotTraceable("it draws random numbers to decide what to do")


def _registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return cast(dict[str, Any], module._parameters), module._buffers, cast(Any, module._modules)


def _put_back(container: Any, contents: Any) -> list[str]:
    """Gives ``container`` the ``contents`` again that it had; the keys (or "") under which it had others."""
    if isinstance(container, dict):
        keys = container.keys() | contents.keys()
        changed = [str(key) for key in keys if container.get(key, container) is not contents.get(key, contents)]
    else:
        changed = [] if list(map(id, container)) == list(map(id, contents)) else [""]
    if changed and isinstance(container, list):
        container[:] = contents
    elif changed:
        container.clear()
        container.update(contents)
    return changed


@contextmanager
def _switches_show() -> Iterator[None]:
    """Gradients are on, and autocast is to a dtype that nobody asks for: a forward that switches them then shows."""
    devices = ("cpu", "cuda")
    before = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices]
    try:
        for device in devices:
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.float64)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for device, (enabled, dtype) in zip(devices, before):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
