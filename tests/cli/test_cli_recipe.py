"""``ganvas train classifier --recipe``: the recipe's settings, except where an option is given."""

from __future__ import annotations

import shlex

import pytest

from ganvas.cli import read
from ganvas.cli.job import resume_command
from ganvas.training import recipe_config


def config(*words):
    return read(["train", "classifier", "--out", "run", *words]).config


@pytest.mark.parametrize("data", ["digits", "mnist", "cifar10", "folder"])
def test_recipe_sets_what_is_not_given(data):
    assert config("--recipe", "fast", "--data", data) == recipe_config("fast", data=data, out="run")


def test_no_recipe_is_the_recipe_standard():
    assert config("--data", "mnist") == config("--data", "mnist", "--recipe", "standard")
    assert config("--data", "mnist").model == "resnet"


@pytest.mark.parametrize("first", [True, False])
def test_given_options_win_wherever_they_stand_and_whatever_the_standard_is(first):
    given = ["--model", "resnet", "--batch-size", "128", "--no-flip", "--learning-rate", "4e-3"]
    recipe = ["--data", "folder", "--recipe=fast"]
    expected = {"model": "resnet", "batch_size": 128, "flip": False, "learning_rate": 4e-3}
    read_config = config(*given, *recipe) if first else config(*recipe, *given)
    assert read_config == recipe_config("fast", data="folder", out="run", **expected)


def test_resume_command_of_a_recipe_means_the_same_config():
    fast = config("--data", "folder", "--recipe", "fast", "--epochs", "3")
    _, *args = shlex.split(resume_command(fast))
    assert read(args).config == fast


def test_resume_is_kept(ganvas, train, tmp_path):
    words = ["train", "classifier", "--recipe", "fast", "--data", "digits", "--out", tmp_path / "run"]
    assert ganvas(*words, "--resume").code == 0
    assert [resume for _, resume in train.calls] == [True]


def test_unknown_recipe_is_one_line_that_names_the_known_ones(ganvas, tmp_path):
    outcome = ganvas("train", "classifier", "--data", "digits", "--out", tmp_path / "run", "--recipe", "fsat")
    assert (outcome.code, outcome.out) == (2, "")
    assert "'standard'" in outcome.error
    assert "'fast'" in outcome.error
    assert list(tmp_path.iterdir()) == []
