"""Colour is for terminals, and NO_COLOR turns it off."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import pytest

from ganvas.cli.output import say, say_error, say_pairs


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_terminal(monkeypatch) -> Callable[..., str]:
    """Calls a function and returns what it has written to a terminal."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def call(function: Callable[..., None], *args: object) -> str:
        stream = Terminal()
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            function(*args)
        return stream.getvalue()

    return call


def test_a_terminal_shows_colour(on_terminal):
    assert on_terminal(say_error, "error: no") == "\x1b[31merror: no\x1b[0m\n"


def test_no_color_leaves_plain_text_on_a_terminal(on_terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert on_terminal(say_error, "error: no") == "error: no\n"
    assert on_terminal(say_pairs, {"run": "runs/digits"}) == "run  runs/digits\n"


def test_a_file_gets_plain_text(capsys):
    say_pairs({"run": "runs/digits", "report": "report.html"})
    assert capsys.readouterr().out == "run     runs/digits\nreport  report.html\n"


def test_brackets_and_long_lines_are_printed_as_they_are(capsys):
    text = "FD[digits-cnn@1a2b3c] [red]" + "x" * 300
    say(text)
    assert capsys.readouterr().out == text + "\n"
