"""A command's dataclass, filled from the command line by tyro; whatever is wrong is said in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import typing
from collections.abc import Sequence
from typing import TypeVar, cast

from ganvas.cli.errors import InputError, suggestion

if os.environ.get("NO_COLOR"):
    # tyro looks at the terminal only; this is its own switch, and it is read once, at import.
    os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

Arguments = TypeVar("Arguments")

_registry = ConstructorRegistry()


def parse(
    arguments: type[Arguments], args: Sequence[str], *, prog: str, description: str, default: Arguments | None = None
) -> Arguments:
    """``args`` as an ``arguments`` object. ``--help`` prints the help and raises SystemExit(0).

    default: where the options come from that ``args`` leave out; the dataclass's own defaults if None.

    Raises:
        InputError: an unknown, missing or unusable option.
        ValueError, TypeError: what the dataclass itself refuses.
    """
    _check_names(arguments, args, prog)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            command = tyro.cli(
                arguments,
                args=list(args),
                prog=prog,
                description=description,
                default=default,
                config=(tyro.conf.DisallowNone,),
                registry=_registry,
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        raise InputError(f"{_first_paragraph(complaint.getvalue())}; see {prog} --help") from None
    return cast(Arguments, command)


def _check_names(arguments: type, args: Sequence[str], prog: str) -> None:
    """Raise InputError at the first option that does not exist: tyro would complain of the missing ones instead."""
    known = {"--help", *_options(arguments)}
    for arg in args:
        name = arg.partition("=")[0].replace("_", "-")
        if arg.startswith("--") and name not in known:
            raise InputError(f"{prog} has no option {name}{suggestion(name, known)}; see {prog} --help")


def _options(arguments: type) -> list[str]:
    types = typing.get_type_hints(arguments)
    options = []
    for field in dataclasses.fields(arguments):
        if dataclasses.is_dataclass(types[field.name]):
            options += _options(types[field.name])
            continue
        name = field.name.replace("_", "-")
        options += [f"--{name}", f"--no-{name}"] if types[field.name] in (bool, bool | None) else [f"--{name}"]
    return options


@_registry.primitive_rule
def _number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """int, float, and either of them or None: a plain message in place of Python's own."""
    kinds = [kind for kind in typing.get_args(info.type) or (info.type,) if kind is not type(None)]
    if kinds not in ([int], [float]):
        return None
    (kind,) = kinds

    def read(words: list[str]) -> int | float:
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"must be a {'whole ' if kind is int else ''}number, got {words[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, (int, float)),
        str_from_instance=lambda value: [str(value)],
    )


def _first_paragraph(box: str) -> str:
    """What stands in tyro's frame above its first rule, in one line; below it help is repeated.

    ::

        ╭─ Title ────────────────────╮          Title
        │ What is wrong.             │        -----------------------
        │ ────────────────────────── │         What is wrong.
        │ For full helptext, see ... │         ----------------------
        ╰────────────────────────────╯         For full helptext, see ...
    """
    words: list[str] = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]:
        text = line.strip().strip("│|").strip()
        is_rule = not text.strip("─-╰╯")
        if is_rule and words:
            break
        words += [] if is_rule else text.removesuffix("(required)").split()
    return " ".join(words).removeprefix("Error parsing ").removesuffix(".")
