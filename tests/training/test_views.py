"""Mirrored views: the mean of two probabilities, used alike in training's measurements and afterwards."""

from __future__ import annotations

import torch
from tiny_training_jobs import COMMON, run_classifier, tiny_data
from torch import nn

from ganvas import training
from ganvas.training import SilentProgress, recipe_config
from ganvas.training.metrics_log import read_metrics
from ganvas.training.views import MirrorAveraged


def test_probabilities_are_the_mean_of_the_two_views():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    images = torch.rand(5, 1, 4, 4)
    expected = (network(images).softmax(dim=1) + network(images.flip(3)).softmax(dim=1)) / 2
    torch.testing.assert_close(MirrorAveraged(network)(images).softmax(dim=1), expected)


def test_mirror_image_gets_the_same_answer():
    network = MirrorAveraged(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
    images = torch.rand(5, 1, 4, 4)
    assert torch.equal(network(images), network(images.flip(3)))


def test_steps_do_not_depend_on_the_views(tmp_path):
    plain = run_classifier(tmp_path / "plain", epochs=1)
    mirrored = run_classifier(tmp_path / "mirrored", epochs=1, mirror_views=True)
    losses = [read_metrics(folder / "metrics.jsonl")[0]["train/loss"] for folder in (plain, mirrored)]
    assert losses[0] == losses[1]


def test_run_is_evaluated_afterwards_by_the_views_it_was_measured_by(tmp_path):
    config = recipe_config("fast", out=tmp_path / "run", **{**COMMON, "width": 4, "mirror_views": True})
    data = {"train_data": tiny_data("train"), "test_data": tiny_data("test")}
    training.train_classifier(config, **data, progress=SilentProgress())
    run = training.load_run(config.out)
    images = torch.rand(6, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(run.model(images), run.model(images.flip(3)))
    accuracy = read_metrics(config.out / "metrics.jsonl")[-1]["test/best_accuracy"]
    assert training.evaluate(run, **data) == {"test/accuracy": accuracy}
