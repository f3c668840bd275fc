"""A run that goes wrong is noticed, taken back to its last good checkpoint with lower rates, and at last given up."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_training_jobs import run_classifier, run_gan, tiny_classifier
from torch import nn
from training_helpers import Recorder

from ganvas import models
from ganvas.training import TrainingFailed
from ganvas.training.faults import DiversityCollapse, StuckDiscriminator, TrainingFault, check_finite
from ganvas.training.metrics_log import read_metrics


class PoisonedAt(nn.Module):
    """A classifier that returns NaN in certain calls of its training, counted over the whole life of the object."""

    def __init__(self, calls: set[int]) -> None:
        super().__init__()
        self.inner = tiny_classifier()
        self._poisoned = calls
        self._calls = 0

    def forward(self, images):
        logits = self.inner(images)
        if self.training:
            self._calls += 1
            if self._calls in self._poisoned:
                return logits * math.nan
        return logits


class CollapsingGenerator(nn.Module):
    """A generator whose images all become one after so many calls in training."""

    def __init__(self, inner: nn.Module, after: int) -> None:
        super().__init__()
        self.inner, self._after, self._calls = inner, after, 0
        self.latent_size, self.num_classes = inner.latent_size, inner.num_classes

    def forward(self, latent, labels):
        self._calls += self.training
        images = self.inner(latent, labels)
        return images if self._calls <= self._after else torch.zeros_like(images) + 0 * images.mean()


def events(folder):
    return [line for line in read_metrics(folder / "metrics.jsonl") if "event" in line and line["event"] != "finished"]


def test_nan_in_one_step_takes_the_run_back_once_with_half_the_rate(tmp_path):
    progress = Recorder()
    run_classifier(tmp_path / "run", model=PoisonedAt({5}), progress=progress)
    fault, recovery = events(tmp_path / "run")
    assert fault == {"step": 5, "epoch": 2, "event": "fault", "message": "train/loss is nan"}
    assert recovery["event"] == "recovery"
    assert recovery["step"] == 3
    assert any("Back to step 3" in line for line in progress.lines)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["event"] == "finished"
    assert math.isfinite(lines[-1]["test/accuracy"])


def test_recovery_halves_the_learning_rate_and_its_schedule(tmp_path):
    run_classifier(tmp_path / "disturbed", model=PoisonedAt({5}))
    run_classifier(tmp_path / "undisturbed")
    last = [
        [line for line in read_metrics(tmp_path / name / "metrics.jsonl") if "train/learning_rate" in line][-1]
        for name in ("disturbed", "undisturbed")
    ]
    assert last[0]["train/learning_rate"] == pytest.approx(last[1]["train/learning_rate"] / 2)


def test_nan_that_comes_back_is_given_up_after_the_bound(tmp_path):
    always = PoisonedAt(set(range(4, 1000)))
    with pytest.raises(TrainingFailed, match=r"after 2 recoveries: train/loss is nan"):
        run_classifier(tmp_path / "run", model=always, max_recoveries=2)
    assert [event["event"] for event in events(tmp_path / "run")] == ["fault", "recovery", "fault", "recovery", "fault"]
    for name in ("model.safetensors", "report.html", "checkpoint"):
        assert (tmp_path / "run" / name).exists()


def test_nan_in_the_first_epoch_goes_back_to_the_start(tmp_path):
    run_classifier(tmp_path / "run", model=PoisonedAt({1}))
    assert events(tmp_path / "run")[1]["step"] == 0


def test_number_of_recoveries_survives_a_resume(tmp_path):
    with pytest.raises(TrainingFailed, match="after 1 recoveries"):
        run_classifier(tmp_path / "run", model=PoisonedAt(set(range(4, 1000))), max_recoveries=1)
    with pytest.raises(TrainingFailed, match="after 1 recoveries"):
        run_classifier(tmp_path / "run", model=PoisonedAt({1}), max_recoveries=1, resume=True)


def test_collapse_of_the_generator_takes_the_run_back(tmp_path):
    generator, discriminator = models.create("dcgan", size=16, channels=1, num_classes=4, width=4, latent_size=8)
    with torch.no_grad():
        generator.label_embedding.weight.mul_(20)  # diverse from the start, so that there is something to lose
        generator.body[-2].weight.mul_(200)
    with pytest.raises(TrainingFailed, match="the generator has collapsed"):
        run_gan(
            tmp_path / "run",
            networks=(CollapsingGenerator(generator, after=4), discriminator),
            max_recoveries=1,
            diversity_floor=0.05,
        )
    assert [event["event"] for event in events(tmp_path / "run")] == ["fault", "recovery", "fault"]


def test_diversity_below_the_floor_from_the_start_is_no_collapse():
    detector = DiversityCollapse(floor=0.2)
    detector.observe({"test/diversity": 0.05}, 0)
    detector.observe({"test/diversity": 0.5}, 0)
    with pytest.raises(TrainingFault, match=r"0\.100 .* the floor is 0\.2"):
        detector.observe({"test/diversity": 0.1}, 0)


def test_discriminator_counts_as_stuck_only_after_steps_on_end():
    detector = StuckDiscriminator(after_steps=100)
    perfect = {"train/real_accuracy": 1.0, "train/fake_accuracy": 1.0}
    detector.observe(perfect, 50)
    assert detector.suspicious
    detector.observe({**perfect, "train/fake_accuracy": 0.99}, 50)
    assert not detector.suspicious
    detector.observe(perfect, 50)
    with pytest.raises(TrainingFault, match="no mistake for 100 steps"):
        detector.observe(perfect, 50)


def test_detectors_take_their_state_along():
    detector, restored = StuckDiscriminator(100), StuckDiscriminator(100)
    detector.observe({"train/real_accuracy": 1.0, "train/fake_accuracy": 1.0}, 60)
    restored.load_state_dict(detector.state_dict())
    with pytest.raises(TrainingFault):
        restored.observe({"train/real_accuracy": 1.0, "train/fake_accuracy": 1.0}, 60)


def test_infinite_weight_is_found_and_a_huge_one_is_not_taken_for_it():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(3e38)
    check_finite({}, {"model": model})
    with torch.no_grad():
        model.bias[0] = math.inf
    with pytest.raises(TrainingFault, match="a weight of the model is NaN or infinite"):
        check_finite({}, {"model": model})
