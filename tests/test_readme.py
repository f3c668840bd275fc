"""What the README shows works as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ganvas.cli import COMMANDS, read

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SHELL_LINES = [line for language, block in BLOCKS if not language for line in block.splitlines()]


def test_python_example_fuses_both_runs_of_layers_and_proves_it(capsys):
    (example,) = (block for language, block in BLOCKS if language == "python")
    assert len(example.splitlines()) <= 10
    exec(compile(example, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.startswith("2 runs fused, 0 layers skipped")
    assert "Conv2d + BatchNorm2d + LeakyReLU" in out
    assert "gradient" in out


@pytest.mark.parametrize(
    "line", ["pip install . && ganvas train gan --data digits --out runs/digits", 'pip install ".[test]" && pytest']
)
def test_the_two_commands_stand_on_lines_of_their_own(line):
    assert line in SHELL_LINES


def test_the_first_command_is_one_that_ganvas_takes():
    command = SHELL_LINES[0].partition(" && ")[2]
    assert read(shlex.split(command)[1:]).config.out == Path("runs/digits")


def test_every_command_and_option_that_is_shown_exists(capsys):
    shown = [line.removeprefix("ganvas ") for line in SHELL_LINES if line.startswith("ganvas ")]
    jobs = "classifier|gan|autoencoder"
    lines = [line.replace(jobs, job) for line in shown for job in (jobs.split("|") if jobs in line else [jobs])]
    named = {name: line for line in lines for name in COMMANDS if f"{line} ".startswith(f"{name} ")}
    assert named.keys() == COMMANDS.keys()
    assert len(lines) == len(named)
    for name, line in named.items():
        with pytest.raises(SystemExit, match="0"):
            read([*name.split(), "--help"])
        help_text = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", line):
            assert option in help_text


def test_every_path_that_is_named_is_there():
    paths = [path for path in re.findall(r"`([\w./]+)`", README) if "/" in path and not path.startswith("runs/")]
    assert len(paths) >= 6
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "python" / "ganvas" / path).exists(), path
