"""What a newcomer sees who asks for help."""

from __future__ import annotations

import dataclasses
import shlex

import pytest

import ganvas as package
from ganvas.cli import COMMANDS, read
from ganvas.training.config import CONFIGS


def test_version_is_that_of_the_package(ganvas):
    assert ganvas("--version") == (0, f"ganvas {package.__version__}\n", "")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command_with_an_example(ganvas, flag):
    code, out, err = ganvas(flag)
    assert (code, err) == (0, "")
    for name, command in COMMANDS.items():
        assert f"    {name} " in out
        assert command.example in out


def test_no_command_at_all_prints_help_and_says_what_is_missing(ganvas):
    code, out, err = ganvas()
    assert code == 2
    assert out == ganvas("--help").out
    assert err == "error: ganvas needs a command: train, sample, predict, evaluate, info\n"


def test_train_without_a_job_prints_the_jobs(ganvas):
    code, out, err = ganvas("train")
    assert code == 2
    assert "train autoencoder" in out
    assert "sample" not in out
    assert err == "error: ganvas train needs a command: classifier, gan, autoencoder\n"


def test_train_help_shows_the_jobs_only(ganvas):
    code, out, err = ganvas("train", "--help")
    assert (code, err) == (0, "")
    assert "train classifier" in out
    assert "evaluate" not in out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_its_usage_and_its_example(ganvas, name):
    code, out, err = ganvas(*name.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: ganvas {name} ")
    assert f"example:\n    {COMMANDS[name].example}\n" in out


@pytest.mark.parametrize("job", CONFIGS)
def test_every_field_of_a_config_is_an_option(ganvas, job):
    out = ganvas("train", job, "--help").out
    for field in dataclasses.fields(CONFIGS[job]):
        assert f"--{field.name.replace('_', '-')}" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_is_a_command_line_that_it_takes(name):
    program, *args = shlex.split(COMMANDS[name].example)
    assert program == "ganvas"
    command = read(args)
    assert type(command).__name__ == COMMANDS[name].path.partition(".")[2]
