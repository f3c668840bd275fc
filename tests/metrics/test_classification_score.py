"""Classification accuracy score: high for a generator that knows its classes, at chance for one that ignores them."""

import pytest
import torch
from torch import nn

from ganvas.metrics import classification_accuracy_score

NUM_CLASSES = 4
IMAGE = (1, 4, 4)


def real_images(labels: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """A bright 2×2 quadrant, the label's, on dark noise."""
    images = 0.2 * torch.randn(len(labels), *IMAGE, generator=source) - 0.6
    rows, columns = 2 * (labels // 2), 2 * (labels % 2)
    for image, row, column in zip(images, rows.tolist(), columns.tolist()):
        image[:, row : row + 2, column : column + 2] += 1
    return images.clamp(-1, 1)


def real_batches(count: int = 200):
    labels = torch.arange(count) % NUM_CLASSES
    images = real_images(labels, torch.Generator().manual_seed(99))
    return list(zip(images.split(64), labels.split(64)))


class QuadrantGenerator(nn.Module):
    """Draws the quadrant of the label it is given, or with ``label_shift`` another one; honest about its latents."""

    def __init__(self, label_shift: int = 0, blind: bool = False) -> None:
        super().__init__()
        self.latent_size, self.num_classes = 16, NUM_CLASSES
        self.label_shift, self.blind = label_shift, blind
        self.norm = nn.BatchNorm2d(1)
        self.calls: list[tuple[bool, torch.Tensor]] = []

    def forward(self, latent: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls.append((self.training, labels))
        drawn = (latent[:, 0] * 1000).long().abs() % NUM_CLASSES if self.blind else (labels + self.label_shift) % 4
        base = 0.2 * latent.reshape(-1, *IMAGE) - 0.6
        bright = torch.zeros(len(latent), 2, 2)
        bright[torch.arange(len(latent)), drawn // 2, drawn % 2] = 1
        return (base + bright.repeat_interleave(2, 1).repeat_interleave(2, 2).unsqueeze(1)).clamp(-1, 1)


def make_classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(128, 4),
    )


def score(generator: nn.Module, **options) -> float:
    settings = {"num_samples": 400, "epochs": 3, "batch_size": 32} | options
    return classification_accuracy_score(generator, make_classifier, real_batches(), **settings)


def test_generator_that_draws_its_labels_scores_high():
    assert score(QuadrantGenerator()) > 0.97


def test_generator_that_draws_the_wrong_class_scores_low():
    assert score(QuadrantGenerator(label_shift=1)) < 0.05


def test_generator_that_ignores_labels_scores_at_chance():
    assert 0.05 < score(QuadrantGenerator(blind=True)) < 0.5


def test_the_seed_alone_decides_what_is_trained():
    def logits_of(seed: int) -> torch.Tensor:
        made = []
        torch.rand(1)  # so that the global random state differs from call to call

        def recorded() -> nn.Module:
            made.append(make_classifier())
            return made[-1]

        classification_accuracy_score(
            QuadrantGenerator(), recorded, real_batches(), num_samples=64, epochs=1, batch_size=32, seed=seed
        )
        return made[0].eval()(real_batches()[0][0])

    assert torch.equal(logits_of(0), logits_of(0))
    assert not torch.equal(logits_of(0), logits_of(1))


def test_global_random_state_and_generator_mode_are_as_before():
    generator = QuadrantGenerator()
    generator.norm.eval()
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    score(generator)
    assert torch.equal(torch.randn(3), expected)
    assert generator.training
    assert not generator.norm.training
    assert {training for training, _ in generator.calls} == {False}


def test_state_is_restored_after_an_error_too():
    class Diverged(QuadrantGenerator):
        def forward(self, latent, labels):
            return super().forward(latent, labels) * torch.nan

    generator = Diverged()
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    with pytest.raises(ValueError, match="generator returned NaN"):
        score(generator)
    assert torch.equal(torch.randn(3), expected)
    assert generator.training


def test_labels_are_balanced_and_the_number_of_samples_is_kept():
    generator = QuadrantGenerator()
    score(generator, num_samples=101)
    labels = torch.cat([labels for _, labels in generator.calls])
    assert labels.bincount().tolist() == [26, 25, 25, 25]


def test_batch_larger_than_the_sample_still_trains():
    assert score(QuadrantGenerator(), num_samples=64, batch_size=1000, epochs=40) > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 3}, "num_samples must be at least the 4 classes, got 3"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 1}, "batch_size at least 2"),
        ({"learning_rate": 0.0}, "learning_rate positive"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_generated(options, message):
    generator = QuadrantGenerator()
    with pytest.raises(ValueError, match=message):
        score(generator, **options)
    assert generator.calls == []


def test_unconditional_generator_is_refused():
    generator = QuadrantGenerator()
    generator.num_classes = None
    with pytest.raises(ValueError, match=r"must be conditional.*num_classes.*None"):
        score(generator)


def test_arguments_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match=r"generator must be an nn\.Module"):
        score(lambda latent, labels: latent)
    with pytest.raises(TypeError, match="make_classifier must be callable"):
        classification_accuracy_score(QuadrantGenerator(), "resnet", real_batches())
