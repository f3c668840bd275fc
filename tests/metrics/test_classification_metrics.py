"""Accuracy and confusion matrix: equal to scikit-learn's, independent of the cut into batches, strict about input."""

import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix
from torch import nn

from ganvas.metrics import ClassificationMetrics, evaluate_classifier

NUM_CLASSES = 5


def predictions(count: int = 97, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, NUM_CLASSES, generator=source)
    labels = torch.randint(NUM_CLASSES, (count,), generator=source)
    return logits, labels


def gathered(logits: torch.Tensor, labels: torch.Tensor, batch_size: int) -> ClassificationMetrics:
    metrics = ClassificationMetrics(NUM_CLASSES)
    for some_logits, some_labels in zip(logits.split(batch_size), labels.split(batch_size)):
        metrics.update(some_logits, some_labels)
    return metrics


@pytest.mark.parametrize("batch_size", [1, 10, 97])
def test_accuracy_and_confusion_matrix_equal_sklearn_for_any_batch_size(batch_size):
    logits, labels = predictions()
    metrics = gathered(logits, labels, batch_size)
    assert metrics.accuracy() == accuracy_score(labels, logits.argmax(1))
    expected = confusion_matrix(labels, logits.argmax(1), labels=range(NUM_CLASSES))
    assert metrics.confusion_matrix().tolist() == expected.tolist()
    assert metrics.count == 97


def test_rows_are_true_classes_and_columns_are_predictions():
    metrics = ClassificationMetrics(3)
    metrics.update(torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([1]))
    assert metrics.confusion_matrix().tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_per_class_accuracy_is_nan_for_an_absent_class():
    metrics = ClassificationMetrics(3)
    metrics.update(torch.tensor([[9.0, 0, 0], [0, 9.0, 0]]), torch.tensor([0, 0]))
    per_class = metrics.per_class_accuracy()
    assert per_class[0] == 0.5
    assert per_class[1:].isnan().all()


def test_returned_matrix_is_a_copy():
    logits, labels = predictions()
    metrics = gathered(logits, labels, 97)
    metrics.confusion_matrix().zero_()
    assert metrics.count == 97


def test_reset_forgets():
    logits, labels = predictions()
    metrics = gathered(logits, labels, 97)
    metrics.reset()
    with pytest.raises(ValueError, match="no samples"):
        metrics.accuracy()


def test_infinite_logits_are_scores_like_others_but_nan_is_refused():
    metrics = ClassificationMetrics(2)
    metrics.update(torch.tensor([[-torch.inf, 0.0]]), torch.tensor([1]))
    assert metrics.accuracy() == 1.0
    with pytest.raises(ValueError, match="NaN"):
        metrics.update(torch.tensor([[torch.nan, 0.0]]), torch.tensor([1]))


def test_empty_batch_adds_nothing():
    metrics = ClassificationMetrics(2)
    metrics.update(torch.empty(0, 2), torch.empty(0, dtype=torch.int64))
    assert metrics.count == 0


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64), r"logits must have shape \(N, 5\)"),
        (torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64), r"logits must have shape \(N, 5\)"),
        (torch.zeros(4, 5), torch.zeros(3, dtype=torch.int64), r"labels must have shape \(4,\)"),
        (torch.zeros(4, 5), torch.zeros(4), "labels must be integers"),
        (torch.zeros(2, 5), torch.tensor([0, 5]), r"labels must lie in \[0, 5\), got values from 0 to 5"),
        (torch.zeros(2, 5), torch.tensor([-1, 0]), r"labels must lie in \[0, 5\), got values from -1 to 0"),
    ],
)
def test_batches_that_do_not_fit_are_refused_and_leave_no_trace(logits, labels, message):
    metrics = ClassificationMetrics(NUM_CLASSES)
    with pytest.raises(ValueError, match=message):
        metrics.update(logits, labels)
    assert metrics.count == 0


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        ClassificationMetrics(1)


class ModeRecorder(nn.Module):
    """Predicts the class written in the first pixel, and notes how it was run."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append((self.training, torch.is_grad_enabled()))
        return self.dropout(self.scale * nn.functional.one_hot(images[:, 0, 0, 0].long(), NUM_CLASSES).float())


def test_evaluate_classifier_runs_in_evaluation_mode_without_gradients_and_restores_each_mode():
    classifier = ModeRecorder()
    classifier.dropout.eval()  # frozen by the caller inside of a model in training: must stay so
    labels = torch.arange(20) % NUM_CLASSES
    images = labels.float().reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    metrics = evaluate_classifier(classifier, zip(images.split(6), labels.split(6)), NUM_CLASSES)
    assert metrics.accuracy() == 1.0
    assert set(classifier.seen) == {(False, False)}
    assert classifier.training
    assert not classifier.dropout.training


def test_evaluate_classifier_restores_the_mode_after_an_error():
    classifier = ModeRecorder()
    with pytest.raises(ValueError, match="labels must lie in"):
        evaluate_classifier(classifier, [(torch.zeros(1, 1, 1, 1), torch.tensor([7]))], NUM_CLASSES)
    assert classifier.training


def test_evaluate_classifier_refuses_no_batches():
    with pytest.raises(ValueError, match="no samples"):
        evaluate_classifier(ModeRecorder(), [], NUM_CLASSES)
