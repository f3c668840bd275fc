"""The table of networks: a builder function registers itself under a name, and its parameters are the options.

Builders live beside their networks::

    @register("mlp", kind="classifier")
    def mlp(num_classes: int = 10, channels: int = 3, size: int = 32) -> Classifier:
        \"\"\"One hidden layer of 128.\"\"\"          # the first line is what describe() shows
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

KINDS = ("classifier", "gan", "autoencoder")

Builder = TypeVar("Builder", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Entry:
    kind: str
    summary: str
    build: Callable[..., Any]
    defaults: dict[str, Any]


_entries: dict[str, _Entry] = {}


def create(name: str, **options: Any) -> Any:
    """A new network, its parameters drawn from torch's global generator.

    Args:
        name: one of :func:`names`.
        options: any of :func:`defaults`; the others keep their default.

    Returns:
        An ``nn.Module``; for a GAN the pair ``(generator, discriminator)``.

    Raises:
        ValueError: a name or an option that does not exist, or an option's value that is not accepted.
    """
    entry = _entry(name)
    for option in options:
        if option not in entry.defaults:
            raise ValueError(f"{name} has no option '{option}'{_accepted(option, entry.defaults)}")
    return entry.build(**options)


def names(kind: str | None = None) -> tuple[str, ...]:
    """The names of one kind of network; of all, kind by kind, if none is given.

    Raises:
        ValueError: a kind that does not exist.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    kinds = KINDS if kind is None else (kind,)
    return tuple(name for kind in kinds for name, entry in _entries.items() if entry.kind == kind)


def kind(name: str) -> str:
    """``"classifier"``, ``"gan"`` or ``"autoencoder"``. Raises ValueError as :func:`create`."""
    return _entry(name).kind


def defaults(name: str) -> dict[str, Any]:
    """The options of a network and their default values. Raises ValueError as :func:`create`."""
    return dict(_entry(name).defaults)


def describe(name: str) -> str:
    """One line: the kind, what it is, the options with their defaults. Raises ValueError as :func:`create`."""
    entry = _entry(name)
    options = ", ".join(f"{option}={value!r}" for option, value in entry.defaults.items())
    return f"{entry.kind}: {entry.summary} ({options})"


def register(name: str, *, kind: str) -> Callable[[Builder], Builder]:
    """Decorator that enters a builder: its parameters (all with defaults) become the options of ``name``.

    Raises:
        ValueError: a name that is taken, a kind that does not exist, a parameter without a default, no docstring.
    """

    def enter(build: Builder) -> Builder:
        if name in _entries:
            raise ValueError(f"a network named '{name}' is registered already")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        parameters = inspect.signature(build).parameters
        without = [option for option, parameter in parameters.items() if parameter.default is parameter.empty]
        if without:
            raise ValueError(f"options of '{name}' need a default, there is none for {', '.join(without)}")
        summary = (inspect.getdoc(build) or "").partition("\n")[0].rstrip(".")
        if not summary:
            raise ValueError(f"the builder of '{name}' needs a docstring: its first line describes the network")
        options = {option: parameter.default for option, parameter in parameters.items()}
        _entries[name] = _Entry(kind, summary, build, options)
        return build

    return enter


def _entry(name: str) -> _Entry:
    if name not in _entries:
        raise ValueError(f"there is no network named {name!r}{_accepted(name, _entries)}")
    return _entries[name]


def _accepted(given: Any, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(str(given), known, n=1)
    suggestion = f" (did you mean '{close[0]}'?)" if close else ""
    return f"{suggestion}; there are {', '.join(known)}"
