"""``ganvas sample``, ``predict`` and ``evaluate`` on real runs of the digits."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ganvas import training
from ganvas.training.metrics_log import read_metrics


def test_sample_writes_a_grid_of_as_many_tiles_as_images(ganvas, gan_run, tmp_path):
    out = tmp_path / "grid.png"
    outcome = ganvas("sample", gan_run, "--count", 30, "--out", out)
    assert outcome == (0, f"30 images in {out}\n", "")
    with Image.open(out) as grid:
        width, height = grid.size
    # Ten classes, one a column.
    assert (width - 1) // 10 == (height - 1) // 3


def test_sample_is_the_same_for_the_same_seed_only(ganvas, gan_run, tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, seed in zip(paths, (5, 5, 6)):
        ganvas("sample", gan_run, "--count", 4, "--out", path, "--seed", seed)
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again
    assert first != other


def test_sample_draws_the_classes_that_are_named_in_turn(ganvas, gan_run, tmp_path, monkeypatch):
    asked = []

    def sample(run, count, *, labels, seed):
        asked.append(labels)
        return torch.zeros(count, 1, 8, 8)

    monkeypatch.setattr(training, "sample", sample)
    assert ganvas("sample", gan_run, "--count", 5, "--labels", "7", "3", "--out", tmp_path / "grid.png").code == 0
    assert asked == [[7, 3, 7, 3, 7]]


def test_predict_prints_path_class_and_probability(ganvas, classifier_run, tmp_path):
    digits = load_digits()
    paths = []
    for index in (0, 1):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray((digits.images[index] * 255 / 16).astype("uint8")).save(paths[-1])
    code, out, err = ganvas("predict", classifier_run, *paths)
    assert (code, err) == (0, "")
    expected = training.predict(training.load_run(classifier_run), paths)
    assert out.splitlines() == [f"{path}  {name}  {probability:.3f}" for path, name, probability in expected]


def test_evaluate_finds_the_accuracy_that_training_logged(ganvas, classifier_run):
    best = max(
        line["test/accuracy"] for line in read_metrics(classifier_run / "metrics.jsonl") if "test/accuracy" in line
    )
    code, out, err = ganvas("evaluate", classifier_run)
    assert (code, err) == (0, "")
    name, value = out.split()
    assert name == "test/accuracy"
    assert float(value) == pytest.approx(best, abs=1e-6)


def test_evaluate_looks_for_the_data_where_root_says(ganvas, classifier_run, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(classifier_run, moved)
    description = json.loads((moved / "config.json").read_text())
    description["config"].update(data="folder", root="gone")
    (moved / "config.json").write_text(json.dumps(description))
    digits = load_digits()
    for index in range(200):
        folder = tmp_path / "data" / str(digits.target[index])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[index] * 255 / 16).astype("uint8")).save(folder / f"{index}.png")
    assert "'gone' does not exist" in ganvas("evaluate", moved).error
    assert ganvas("evaluate", moved, "--root", tmp_path / "data").out.startswith("test/accuracy ")
