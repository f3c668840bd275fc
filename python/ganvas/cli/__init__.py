"""The ``ganvas`` command.

A command is a dataclass: its fields are the options (:mod:`ganvas.cli.arguments` parses them with tyro), its
``execute`` does the work. They are imported when they are asked for, so that a help page does not wait for what it does
not need. Where one option sets the defaults of others, the command has ``with_defaults()``, and the options are read
once more over what it returns, so that those that are given win.

Exit codes: 0 done; 2 bad input, with one line on stderr that says what to do; 1 training gave up, likewise; 130 stopped
by Ctrl-C. A bug keeps its traceback.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ganvas import __version__
from ganvas.cli.arguments import parse
from ganvas.cli.errors import InputError, exit_code, suggestion
from ganvas.cli.output import say, say_error


@dataclass(frozen=True)
class Command:
    """Where a command is implemented, and what its help says."""

    path: str
    summary: str
    example: str


COMMANDS = {
    "train classifier": Command(
        "train.TrainClassifier",
        "train a network that tells classes of images apart",
        "ganvas train classifier --data digits --out runs/classifier",
    ),
    "train gan": Command(
        "train.TrainGAN",
        "train a generator that makes images like those it is shown",
        "ganvas train gan --data digits --out runs/digits",
    ),
    "train autoencoder": Command(
        "train.TrainAutoencoder",
        "train a network that squeezes images into a few numbers and back",
        "ganvas train autoencoder --data digits --out runs/autoencoder",
    ),
    "sample": Command(
        "inference.Sample",
        "draw images from a trained GAN into one PNG",
        "ganvas sample runs/digits --count 64 --out grid.png",
    ),
    "predict": Command(
        "inference.Predict",
        "tell the class of image files with a trained classifier",
        "ganvas predict runs/classifier photo.png",
    ),
    "evaluate": Command(
        "inference.Evaluate",
        "measure a run on its test images",
        "ganvas evaluate runs/digits",
    ),
    "info": Command(
        "info.Info",
        "show version, hardware, and which kernels would run here",
        "ganvas info --models",
    ),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line, ``args`` (the process's own if None, without the program's name); return the exit code."""
    try:
        args = sys.argv[1:] if args is None else list(args)
        if args == ["--version"]:
            say(f"ganvas {__version__}")
        else:
            read(args).execute()
        return 0
    except SystemExit as help_was_printed:
        return int(help_was_printed.code or 0)
    except KeyboardInterrupt as interrupt:
        say_error(str(interrupt) or "interrupted")
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        say_error(f"error: {error}")
        return code


def read(args: list[str]) -> Any:
    """The command that ``args`` ask for, an object with ``execute()``.

    Raises:
        InputError, ValueError, TypeError: what is wrong with ``args``.
        SystemExit: they asked for help, which has been printed.
    """
    name, rest = _split(args)
    if name not in COMMANDS:
        _explain_incomplete(name, rest)
    command = COMMANDS[name]
    module, _, class_name = command.path.partition(".")
    arguments = getattr(importlib.import_module(f"ganvas.cli.{module}"), class_name)
    description = f"{arguments.__doc__}\n\nexample:\n    {command.example}"
    read_options = functools.partial(parse, arguments, rest, prog=f"ganvas {name}", description=description)
    given = read_options()
    return read_options(default=given.with_defaults()) if hasattr(given, "with_defaults") else given


def _split(args: list[str]) -> tuple[str, list[str]]:
    """The words that name a command, or begin the name of one, and what follows them."""
    words = 0
    while words < len(args) and any(f"{name} ".startswith(" ".join(args[: words + 1]) + " ") for name in COMMANDS):
        words += 1
    return " ".join(args[:words]), args[words:]


def _explain_incomplete(name: str, rest: list[str]) -> NoReturn:
    """No command has been named in full: help for who asked for it or typed nothing more, and why it is not enough."""
    commands = {full: command for full, command in COMMANDS.items() if full.startswith(name)}
    if rest[:1] in (["-h"], ["--help"]):
        say(_overview(commands))
        raise SystemExit(0)
    choices = list(dict.fromkeys(full.removeprefix(name).split()[0] for full in commands))
    prog = f"ganvas {name}".rstrip()
    if rest:
        kind = "option" if rest[0].startswith("-") else "command"
        hint = suggestion(rest[0], choices)
        raise InputError(f"{prog} has no {kind} {rest[0]!r}{hint}; it takes one of {', '.join(choices)}")
    say(_overview(commands))
    raise InputError(f"{prog} needs a command: {', '.join(choices)}")


def _overview(commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    lines = [
        "ganvas trains image classifiers and GANs, fast.",
        "",
        "usage: ganvas COMMAND [OPTIONS]",
        "",
        "commands:",
        *(f"    {name:<{width}}  {command.summary}" for name, command in commands.items()),
        "",
        "examples:",
        *(f"    {command.example}" for command in commands.values()),
        "",
        "ganvas COMMAND --help explains a command's options; ganvas --version prints the version.",
    ]
    return "\n".join(lines)
