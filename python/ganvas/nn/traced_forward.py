"""The forward that a converted module has: its own, traced, with runs of layers fused."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ganvas.nn.graph import FusedForward, fuse
from ganvas.nn.run import breaks_on_channels_last, native_layout
from ganvas.nn.tracing import BoundForward, NotTraceable, must_be_called, plain_forward, trace

_MOST_VARIANTS = 8  # of one forward; one that keeps changing runs as it stands
_OWN_ATTRIBUTES = frozenset(nn.Module().__dict__) - {"training"} | {"forward", "_replicate_for_data_parallel"}
_COMPARED_BY_VALUE = frozenset({bool, int, float, str})


class TracedForward(BoundForward):
    """Called in place of ``module``'s forward: the traced one where it holds, else the one of the class.

    The trace holds for tensors as the arguments without default, and for the module as it was traced: the same
    children, the same attributes, training mode included, and no hooks on modules whose forward is part of the trace.
    Where something of this is different, the forward is traced anew; earlier traces are kept. Parameters and buffers
    are read at each call.

    A deep copy of the module, and one that was pickled, get a forward of their own. There is no reference to the
    module, so that it dies when its last user lets it go.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._variants: list[Variant] = []
        self._key = str(id(self))
        _forwards[self._key] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._target()
        variant = self._find(module)
        if variant is not None and variant.fused is not None and not _has_any_global_hook():
            tensors = (*args, *(kwargs[name] for name in variant.arguments[len(args) :] if name in kwargs))
            if (
                len(tensors) == len(variant.arguments) == len(args) + len(kwargs)
                # not isinstance: a traced value of another tracer may pretend to be a tensor
                and all(issubclass(type(tensor), Tensor) for tensor in tensors)
            ):
                return variant.fused.function(module, *tensors)
        return plain_forward(module)(*args, **kwargs)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The class's forward, on arguments in the memory layout that the fused one works in, where torch can."""
        module = self._target()
        variant = self._find(module)
        fused = None if variant is None else variant.fused
        if fused is not None and fused.channels_last and not any(map(breaks_on_channels_last, module.modules())):
            args = tuple(native_layout(a) if isinstance(a, Tensor) else a for a in args)
            kwargs = {name: native_layout(a) if isinstance(a, Tensor) else a for name, a in kwargs.items()}
        return plain_forward(module)(*args, **kwargs)

    def trace_both_modes(self, opaque: dict[nn.Module, str]) -> tuple[Variant, Variant]:
        """Traces ahead, in training and in evaluation mode; ``opaque``: children that are known not to be traceable."""
        module = self._target()
        with _mode(module, True):
            training = self._trace(module, opaque)
        with _mode(module, False):
            return training, self._trace(module, opaque)

    def present(self) -> Variant:
        """What holds for the module as it is now."""
        module = self._target()
        return self._find(module) or self._trace(module)

    def replicate(self) -> nn.Module:
        """The module's ``_replicate_for_data_parallel``. A replica, made for one call, has the class's forward."""
        module = self._target()
        replica = type(module)._replicate_for_data_parallel(module)
        unbind(replica)
        return replica

    # What torch.export and others who ask for a function look at.
    @property
    def __code__(self) -> CodeType:
        return type(self._target()).forward.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(plain_forward(self._target()))

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedForward:
        return TracedForward(copy.deepcopy(self._target(), memo))  # the copy, which is being made

    def __reduce__(self) -> tuple[Any, ...]:
        return TracedForward, (self._target(),)

    def _target(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError("the module that this forward was bound to is gone; a shallow copy has no own one")
        return module

    def _find(self, module: nn.Module) -> Variant | None:
        if torch.compiler.is_dynamo_compiling():
            _trace_for_a_graph(self._key)
        for variant in self._variants:
            if variant.holds(module):
                return variant
        if len(self._variants) >= _MOST_VARIANTS or torch.compiler.is_compiling():
            return None
        return self._trace(module)

    def _trace(self, module: nn.Module, opaque: dict[nn.Module, str] | None = None) -> Variant:
        try:
            traced = trace(module, opaque)
        except NotTraceable as reason:
            variant = Variant((), _Seen.of(module), (), None, str(reason))
        else:
            inlined = tuple((child, _Seen.of(child)) for child in traced.inlined[1:])
            variant = Variant(traced.arguments, _Seen.of(module), inlined, fuse(module, traced), None)
        self._variants.append(variant)
        return variant


_forwards: weakref.WeakValueDictionary[str, TracedForward] = weakref.WeakValueDictionary()


def _trace_for_a_graph(key: str) -> bool:
    """Traces the forward if no trace holds: a copy's that torch.compile meets before it was ever called."""
    forward = _forwards[key]
    module = forward._target()
    known = len(forward._variants) >= _MOST_VARIANTS or any(variant.holds(module) for variant in forward._variants)
    return known or forward._trace(module).fused is not None


# What torch.compiler.assume_constant_result sets, without the second that its import takes: the function is called as a
# graph is made, and is no part of it.
_trace_for_a_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Variant:
    """A forward as it was traced, and when it holds. ``fused`` is None where there is no trace, for a ``reason``."""

    arguments: tuple[str, ...]
    seen: _Seen
    inlined: tuple[tuple[nn.Module, _Seen], ...]
    fused: FusedForward | None
    reason: str | None

    @property
    def fuses_something(self) -> bool:
        return self.fused is not None and any(group.run.why_not() is None for group in self.fused.groups)

    def holds(self, module: nn.Module) -> bool:
        # Plain loops, here and below: this is asked at every call.
        if not self.seen.unchanged(module):
            return False
        for child, seen in self.inlined:  # noqa: SIM110
            if must_be_called(child) or not seen.unchanged(child):
                return False
        return True


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a forward can have read from a module while it was traced, parameters and buffers apart."""

    attributes: tuple[tuple[str, Any], ...]
    children: tuple[nn.Module | None, ...]
    types: tuple[type, ...]

    @classmethod
    def of(cls, module: nn.Module) -> _Seen:
        children = tuple(module._modules.values())
        attributes = tuple((name, value) for name, value in module.__dict__.items() if name not in _OWN_ATTRIBUTES)
        return cls(attributes, children, tuple(map(type, children)))

    def unchanged(self, module: nn.Module) -> bool:
        children = tuple(module._modules.values())
        if children != self.children or tuple(map(type, children)) != self.types:
            return False
        for name, before in self.attributes:
            now = getattr(module, name, None)
            if now is before:
                continue
            if type(now) is not type(before) or type(now) not in _COMPARED_BY_VALUE or now != before:
                return False
        return True


def bind(module: nn.Module, forward: TracedForward) -> None:
    """Sets ``forward`` on the instance."""
    module.__dict__["forward"] = forward
    module.__dict__["_replicate_for_data_parallel"] = forward.replicate


def unbind(module: nn.Module) -> None:
    """The class's forward again."""
    del module.__dict__["forward"], module.__dict__["_replicate_for_data_parallel"]


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """The flags themselves: ``module.train()`` may be overridden and do more."""
    flags = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in flags:
            child.training = training
        yield
    finally:
        for child, before in flags:
            child.training = before
