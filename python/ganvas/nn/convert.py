"""Makes an existing model use the fused operations, in place, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ganvas.nn.examination import examine, find_fusable_runs
from ganvas.nn.fused import FusedSequential, runs_fused
from ganvas.nn.proof import prove
from ganvas.nn.report import ConversionReport
from ganvas.nn.traced_forward import TracedForward, bind, unbind
from ganvas.nn.tracing import has_traceable_type, is_converted


def convert(model: nn.Module, example_input: Tensor | tuple[Any, ...] | None = None) -> ConversionReport:
    """Makes ``model`` execute runs of (convolution | linear), BatchNorm, residual and LeakyReLU | ReLU fused, in place.

    The objects stay what they were, with their parameters, state_dict keys and hooks. A module with a forward of its
    own is traced (``torch.fx``), through the forwards of its children, and gets that trace bound as its forward; called
    with arguments for which the trace does not hold, it runs as it is written. An ``nn.Sequential`` with layers to fuse
    among its own children becomes a :class:`ganvas.nn.FusedSequential`, or is traced as well where it holds such
    modules with norms. Converting twice changes nothing.

    What cannot be traced (control flow that depends on data, for one) is left as it is and called by what surrounds it,
    which is converted all the same, and so are its own children. Left as they are, too: layers with hooks or
    parametrizations and layers of a subclass of the supported types. The report says all of it.

    A trace records what happens to tensors. Anything else that a forward does, such as printing, happens no more.

    Args:
        model: any module.
        example_input: a tensor, or a tuple of positional arguments, for the model's forward. With it the conversion
            proves itself: outputs, running statistics and gradients of every parameter and input before and after, in
            training and evaluation mode, within the tolerances that :mod:`ganvas.nn.proof` states. The model's state
            is afterwards what it was.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: the unconverted model cannot run on ``example_input``.
        ConversionError: the proof failed; what this call converted is plain torch again.
    """
    _check(model)
    forwards: dict[nn.Module, TracedForward] = {}
    converted: dict[str, nn.Module] = {}
    # Children first: what is known of them need not be found out again for each of their ancestors.
    for name, module in reversed(list(model.named_modules())):
        if _convert(module, forwards):
            converted[name] = module
    fused, skipped = examine(model, forwards)
    report = ConversionReport(tuple(reversed(converted)), fused, skipped)
    if example_input is None:
        return report
    try:
        return replace(report, proof=prove(model, example_input))
    except BaseException:
        for module in converted.values():
            _revert(module)
        raise


def revert(model: nn.Module) -> nn.Module:
    """Makes plain torch of ``model`` again, in place, and returns it.

    Every :class:`ganvas.nn.FusedSequential`, converted or built as one, becomes an ``nn.Sequential`` with the same
    modules, keys and parameters; a subclass of it with a forward of its own stays. Every other module has its class's
    forward again.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    _check(model)
    for module in model.modules():
        _revert(module)
    return model


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")


def _convert(module: nn.Module, forwards: dict[nn.Module, TracedForward]) -> bool:
    """Whether ``module`` has been changed. ``forwards`` gets what was traced, to be bound or not."""
    if "forward" in module.__dict__ or runs_fused(module):
        return False
    if type(module) is nn.Sequential and find_fusable_runs(module) and not any(map(_is_traced_with_norms, module)):
        module.__class__ = FusedSequential
        return True
    if not has_traceable_type(module):
        return False
    opaque = {child: reason for child, forward in forwards.items() if (reason := forward.present().reason) is not None}
    forward = forwards[module] = TracedForward(module)
    if not any(variant.fuses_something for variant in forward.trace_both_modes(opaque)):
        return False
    bind(module, forward)
    return True


def _is_traced_with_norms(child: nn.Module) -> bool:
    """Whether a Sequential is traced through this child, whose layers then are neighbours of its own.

    It cannot keep statistics groups apart, which a FusedSequential could; but with such a child neither can that.
    """
    return is_converted(child) and any(isinstance(module, _BatchNorm) for module in child.modules())


def _revert(module: nn.Module) -> None:
    if is_converted(module):
        unbind(module)
    elif type(module).forward is FusedSequential.forward:
        module.__class__ = nn.Sequential
        for attribute in ("_planned", "statistics_groups"):
            module.__dict__.pop(attribute, None)
