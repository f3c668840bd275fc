"""What of a model runs fused, what does not, and why: the body of the conversion report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ganvas.nn.fused import runs_fused
from ganvas.nn.plan import find_runs
from ganvas.nn.report import FusedRun, Skipped
from ganvas.nn.run import NORMS, PRODUCERS, Run, why_not_plain
from ganvas.nn.traced_forward import TracedForward, Variant
from ganvas.nn.tracing import is_converted


def examine(
    model: nn.Module, forwards: Mapping[nn.Module, TracedForward]
) -> tuple[tuple[FusedRun, ...], tuple[Skipped, ...]]:
    """Every run that executes fused in ``model`` as it is, and every layer that could have been part of one.

    A run is reported once, where the outermost forward that holds it executes it.

    Args:
        forwards: traces of modules that are bound to them, or not since there is nothing to fuse in them.
    """
    fused: list[FusedRun] = []
    skipped: list[Skipped] = []
    covered: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in covered:
            continue
        forward = module.__dict__["forward"] if is_converted(module) else forwards.get(module)
        variant = None if forward is None else forward.present()
        if variant is not None and variant.fused is not None:
            covered.update(child for child, _ in variant.inlined)
            runs, left = _examine_trace(name, module, variant)
        else:
            runs, left = _examine_children(name, module, None if variant is None else variant.reason)
        fused += runs
        skipped += left
    return tuple(fused), tuple(skipped)


def find_fusable_runs(sequential: nn.Sequential) -> list[Run]:
    """The runs among a Sequential's own children that nothing keeps from being fused."""
    return [run for run in find_runs(sequential._modules) if run.why_not() is None]


def _examine_trace(name: str, module: nn.Module, variant: Variant) -> tuple[list[FusedRun], list[Skipped]]:
    assert variant.fused is not None
    runs: list[FusedRun] = []
    skipped: list[Skipped] = []
    settled: set[nn.Module] = set()
    for group in (*variant.fused.groups, *variant.fused.disturbed):
        settled.update(group.run.modules)
        reason = "between its layers runs what may write to their input" if group in variant.fused.disturbed else None
        _settle(name, group.run, [_join(name, layer) for layer in group.names], group.types, reason, runs, skipped)
    parents = {module, *(child for child, _ in variant.inlined)}
    for parent_name, parent in module.named_modules(prefix=name):
        if parent in parents:
            children = {n: child for n, child in parent._modules.items() if child not in settled}
            skipped += _left(parent_name, children, "its parent's forward does not call it, or not with one tensor")
    return runs, skipped


def _examine_children(name: str, module: nn.Module, reason: str | None) -> tuple[list[FusedRun], list[Skipped]]:
    """``reason``: why the module's forward is not traced, where that was tried."""
    own_forward = None
    if not runs_fused(module) and (type(module) is not nn.Sequential or "forward" in module.__dict__):
        own_forward = f"its parent's forward is its own ({type(module).__name__})"
    runs: list[FusedRun] = []
    skipped: list[Skipped] = []
    if reason is not None and any(isinstance(child, (_BatchNorm, *PRODUCERS)) for child in module.modules()):
        skipped.append(Skipped(name, type(module).__name__, reason))
    settled: set[str] = set()
    for run in find_runs(module._modules) if isinstance(module, nn.Sequential) else ():
        types = tuple(type(child).__name__ for child in run.modules)
        _settle(name, run, [_join(name, layer) for layer in run.names], types, own_forward, runs, skipped)
        settled.update(run.names)
    children = {n: child for n, child in module._modules.items() if n not in settled}
    return runs, skipped + _left(name, children, own_forward)


def _settle(
    container: str,
    run: Run,
    names: Sequence[str],
    types: Sequence[str],
    reason: str | None,
    fused: list[FusedRun],
    skipped: list[Skipped],
) -> None:
    """Adds the run to ``fused``, or its layers to ``skipped``: for ``reason``, or what the run itself says."""
    reason = reason or run.why_not()
    if reason is not None:
        skipped += [Skipped(layer, type(module).__name__, reason) for layer, module in zip(names, run.modules)]
        return
    if run.producer is not None and (hooked := why_not_plain(run.producer)) is not None:
        skipped.append(Skipped(names[0], types[0], f"{hooked}; called as it is"))
        names, types = names[1:], types[1:]
    fused.append(FusedRun(container, tuple(names), tuple(types)))


def _left(parent: str, children: Mapping[str, nn.Module | None], reason: str | None) -> list[Skipped]:
    """Norms, and layers that could have been before one, that are in no run; ``reason`` where their type has none."""
    found = []
    for name, child in children.items():
        why = None if child is None else _why_type(child)
        if why is None and isinstance(child, _BatchNorm):
            why = reason
        if why is not None:
            found.append(Skipped(_join(parent, name), type(child).__name__, why))
    return found


def _why_type(module: nn.Module) -> str | None:
    """Why a layer of a fusable kind is not of a type that a run is made of, or None."""
    if not isinstance(module, (_BatchNorm, *PRODUCERS)):
        return None
    if is_parametrized(module):
        return "it is parametrized"
    if isinstance(module, LazyModuleMixin):
        return "it is not initialised before its first input: run the model once, then convert"
    if isinstance(module, _BatchNorm) and type(module) not in NORMS:
        accepted = " or ".join(sorted(norm.__name__ for norm in NORMS))
        return f"its type is not exactly {accepted}, so its forward may be its own"
    return None


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent and child else parent or child
