"""Recipes: what they set, that given fields win, that the fast one learns, and that its runs can be resumed."""

from __future__ import annotations

import pytest
from tiny_training_jobs import COMMON, STEPS, tiny_data
from training_helpers import SignalAt, assert_same_results

from ganvas.training import ClassifierConfig, Interrupted, SilentProgress, recipe_config, train_classifier
from ganvas.training.metrics_log import read_metrics
from ganvas.training.recipes import recipe_fields


def run_fast(out, *, resume=False, progress=None, **changes):
    return train_classifier(
        recipe_config("fast", out=out, **{**COMMON, "width": 4, **changes}),
        train_data=tiny_data("train"),
        test_data=tiny_data("test"),
        resume=resume,
        progress=progress or SilentProgress(),
    )


def test_standard_is_the_defaults_of_the_config():
    assert recipe_config("standard", data="mnist", out="run") == ClassifierConfig(data="mnist", out="run")


def test_fast_on_mnist_is_one_epoch_of_a_narrow_fast_cnn():
    assert recipe_config("fast", data="mnist", out="run") == ClassifierConfig(
        data="mnist", out="run", model="fast_cnn", width=16, epochs=1, shift=0, learning_rate=6e-3
    )


def test_data_set_without_settings_of_its_own_gets_those_of_a_folder():
    assert recipe_fields("fast", "my photos") == recipe_fields("fast", "folder") != recipe_fields("fast", "mnist")


@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_characters_are_never_mirrored(data):
    config = recipe_config("fast", data=data, out="run")
    assert (config.flip, config.mirror_views) == (False, False)


def test_given_fields_win_even_where_they_are_the_standard_ones():
    given = {"model": "resnet", "learning_rate": 4e-3, "epochs": 3, "flip": False, "batch_size": 128}
    config = recipe_config("fast", data="folder", out="run", **given)
    assert {name: getattr(config, name) for name in given} == given
    assert config.mirror_views


def test_unknown_recipe_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="recipe must be one of standard, fast; got 'fsat'"):
        recipe_config("fsat", data="digits", out="run")


def test_fast_learns_the_digits_in_seconds(tmp_path):
    config = recipe_config("fast", data="digits", out=tmp_path / "run", threads=1)
    train_classifier(config, progress=SilentProgress())
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["test/accuracy"] >= 0.95


def test_interrupted_fast_run_equals_the_undisturbed_one(tmp_path):
    run_fast(tmp_path / "undisturbed")
    for step in range(1, STEPS + 1):
        with pytest.raises(Interrupted):
            run_fast(tmp_path / "run", resume=step > 1, progress=SignalAt(step))
    run_fast(tmp_path / "run", resume=True)
    assert_same_results(tmp_path / "run", tmp_path / "undisturbed")


def epochs_measured(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    return [line["epoch"] for line in lines if "test/accuracy" in line and "event" not in line]


@pytest.mark.parametrize(("every", "epochs"), [(1, [1, 2, 3]), (2, [2, 3]), (3, [3]), (9, [3])])
def test_the_last_epoch_is_measured_and_before_it_every_so_many(every, epochs, tmp_path):
    assert epochs_measured(run_fast(tmp_path / "run", evaluate_every=every)) == epochs


def test_target_ends_the_run_at_the_measurement_that_reaches_it(tmp_path):
    folder = run_fast(tmp_path / "run", evaluate_every=2, target_accuracy=0.0)
    assert epochs_measured(folder) == [2]
    assert read_metrics(folder / "metrics.jsonl")[-1]["event"] == "finished"


def test_target_that_is_not_reached_changes_nothing(tmp_path):
    run_fast(tmp_path / "without", epochs=1)
    run_fast(tmp_path / "with", epochs=1, target_accuracy=0.9999)
    assert_same_results(tmp_path / "with", tmp_path / "without")


def test_run_that_reached_its_target_is_not_trained_on_when_resumed(tmp_path):
    settings = {"evaluate_every": 1, "target_accuracy": 0.0}
    run_fast(tmp_path / "undisturbed", **settings)
    run_fast(tmp_path / "run", **settings)
    run_fast(tmp_path / "run", resume=True, **settings)
    assert_same_results(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize("target", [1.0, 99, -0.1])
def test_target_that_is_no_share_is_refused(target):
    with pytest.raises(ValueError, match="target_accuracy must be at least 0 and less than 1"):
        ClassifierConfig(data="digits", out="run", target_accuracy=target)
