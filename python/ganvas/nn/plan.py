"""Finds the runs among a Sequential's children."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from ganvas.nn.line import Line
from ganvas.nn.run import ACTIVATIONS, CONVOLUTIONS, NORMS, PRODUCERS, Run

UPSAMPLINGS = frozenset({nn.Upsample, nn.UpsamplingNearest2d})

# One letter per child: U upsampling, C producer, N norm, A activation, a in-place activation, P pooling, - else.
# In C-A-N-A the second activation goes with the norm, the first with the convolution, over whose output it is written.
# A leading in-place activation writes over a tensor from outside, which a fused run would leave as it is: not fused.
_RUN = re.compile("U?C(?:N[Aa]|[Aa]N(?![Aa])|N|[Aa])P?|N[Aa]|AN(?![Aa])|N")


def find_runs(children: Mapping[str, nn.Module | None]) -> list[Run]:
    """The fusable runs, in order, judged by the modules' exact types."""
    names, modules = list(children), list(children.values())
    letters = "".join(map(letter_of, modules))
    channels_last = "N" in letters
    runs = []
    for start, end in _spans(letters):
        by_role = {letter.upper(): module for letter, module in zip(letters[start:end], modules[start:end])}
        runs.append(
            Run(
                names=tuple(names[start:end]),
                modules=tuple(modules[start:end]),  # type: ignore[arg-type]
                producer=by_role.get("C"),
                norm=by_role.get("N"),  # type: ignore[arg-type]
                activation=by_role.get("A"),
                order="conv_act_bn" if "AN" in letters[start:end].upper() else "conv_bn_act",
                channels_last=channels_last,
                upsample=by_role.get("U"),
                pool=by_role.get("P"),
            )
        )
    return runs


def plan(children: Mapping[str, nn.Module]) -> tuple[Line | nn.Module, ...]:
    """What a FusedSequential executes: its runs, neighbouring ones together, and the other children as they are.

    A convolution that belongs to no run is one here: native kernels may be the faster ones, and read what is pending.
    """
    runs = find_runs(children)
    channels_last = any(run.channels_last for run in runs)
    run_of = {name: run for run in runs for name in run.names}
    for name, module in children.items():
        if name not in run_of and type(module) in CONVOLUTIONS:
            run_of[name] = Run((name,), (module,), module, None, None, "conv_bn_act", channels_last)
    steps: list[Line | nn.Module] = []
    for name, module in children.items():
        run = run_of.get(name)
        if run is None:
            steps.append(module)
        elif name == run.names[0]:
            before = steps[-1] if steps else None
            if isinstance(before, Line):
                steps[-1] = Line((*before.runs, run))
            else:
                steps.append(Line((run,)))
    return tuple(steps)


@torch.compiler.assume_constant_result  # a compiler that traces a first call cannot look into a regular expression
def _spans(letters: str) -> tuple[tuple[int, int], ...]:
    return tuple(match.span() for match in _RUN.finditer(letters))


def letter_of(module: nn.Module | None) -> str:
    """What a module is in a run, as above."""
    kind = type(module)
    if kind in PRODUCERS:
        return "C"
    if kind in NORMS:
        return "N"
    if kind in ACTIVATIONS:
        return "a" if module.inplace else "A"  # type: ignore[union-attr]
    if kind in UPSAMPLINGS and _is_nearest_twofold(module):  # type: ignore[arg-type]
        return "U"
    if kind is nn.MaxPool2d and _is_2x2(module):  # type: ignore[arg-type]
        return "P"
    return "-"


def _is_nearest_twofold(module: nn.Upsample) -> bool:
    return module.size is None and module.mode == "nearest" and module.scale_factor in (2, (2, 2))


def _is_2x2(pool: nn.MaxPool2d) -> bool:
    pairs = {"kernel_size": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}
    if pool.ceil_mode or pool.return_indices:
        return False
    return all(getattr(pool, name) in (pair, pair[0]) for name, pair in pairs.items())
