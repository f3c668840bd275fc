"""What ends a command: bad input, a run that gave up, Ctrl-C, a closed pipe, a bug."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ganvas import training
from ganvas.cli.errors import exit_code

TRAIN = ("train", "gan", "--data", "digits", "--out")


def raised(error: Exception) -> Exception:
    """``error`` as if code outside of ganvas had raised it."""
    try:
        raise error
    except type(error) as caught:
        return caught


def caught(call, *args: object) -> Exception:
    with pytest.raises((ValueError, TypeError, OSError)) as info:
        call(*args)
    return info.value


class TestWhatIsBadInput:
    def test_a_value_that_ganvas_refuses(self):
        assert exit_code(caught(torch.nn.Module.__call__, _Refusing())) == 2

    def test_an_error_of_the_file_system(self):
        assert exit_code(caught(Path("nowhere").read_bytes)) == 2

    @pytest.mark.parametrize("error", [ValueError("shape"), TypeError("dtype"), RuntimeError("CUDA"), KeyError("x")])
    def test_not_an_error_that_other_code_raises(self, error):
        assert exit_code(raised(error)) is None

    def test_not_a_mistake_in_the_code_of_ganvas(self):
        # Python's own TypeError, although the innermost frame is one of ganvas.
        error = caught(training.RunConfig.to_json, None)
        assert type(error) is TypeError
        assert exit_code(error) is None


class _Refusing(torch.nn.Module):
    def forward(self) -> None:
        training.load_run("nowhere")


def test_a_bug_keeps_its_traceback(ganvas, train, tmp_path):
    train.error = raised(ValueError("expected a 4D tensor"))
    with pytest.raises(ValueError, match="expected a 4D tensor"):
        ganvas(*TRAIN, tmp_path / "run")


def test_a_run_that_gave_up_exits_with_1(ganvas, train, tmp_path):
    train.error = training.TrainingFailed("gave up at step 7 (epoch 1): train/loss is nan")
    outcome = ganvas(*TRAIN, tmp_path / "run")
    assert (outcome.code, outcome.error) == (1, "error: gave up at step 7 (epoch 1): train/loss is nan")


def test_full_disk_exits_with_2(ganvas, train, tmp_path):
    train.error = training.CheckpointSaveError("no space left on device; the previous checkpoint is intact")
    outcome = ganvas(*TRAIN, tmp_path / "run")
    assert (outcome.code, outcome.error) == (2, f"error: {train.error}")


class TestCtrlC:
    def test_after_the_folder_is_made_says_how_to_resume(self, ganvas, train, tmp_path):
        out = tmp_path / "my run"
        train.error = training.Interrupted(out, step=7)
        outcome = ganvas(*TRAIN, out, "--epochs", 5, "--no-conditional")
        assert outcome.code == 130
        assert "interrupted after step 7" in outcome.error
        command = f"ganvas train gan --data digits --out '{out}' --epochs 5 --no-conditional --resume"
        assert outcome.error.endswith(command)

    def test_before_the_folder_is_made_has_nothing_to_resume(self, ganvas, monkeypatch, tmp_path):
        def train(*args: object, **options: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(training, "train", train)
        outcome = ganvas(*TRAIN, tmp_path / "run")
        assert (outcome.code, outcome.error) == (130, "interrupted")
