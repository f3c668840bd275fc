"""A run that was stopped and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from tiny_training_jobs import JOBS, STEPS, run_autoencoder, run_classifier
from training_helpers import Recorder, SignalAt, assert_same_results

from ganvas.training import CheckpointError, Interrupted, RunFolderError
from ganvas.training.metrics_log import read_metrics


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("step", [1, 3, 5])
def test_resumed_run_equals_the_undisturbed_one(job, step, tmp_path, undisturbed):
    """Steps 1 and 5 are inside an epoch, 1 inside a log window too; 3 is the last one before an evaluation."""
    with pytest.raises(Interrupted):
        JOBS[job](tmp_path / "run", progress=SignalAt(step))
    JOBS[job](tmp_path / "run", resume=True)
    assert_same_results(tmp_path / "run", undisturbed(job))


def test_run_interrupted_in_every_step_equals_the_undisturbed_one(tmp_path, undisturbed):
    for step in range(1, STEPS + 1):
        with pytest.raises(Interrupted):
            run_classifier(tmp_path / "run", resume=step > 1, progress=SignalAt(step))
    run_classifier(tmp_path / "run", resume=True)
    assert_same_results(tmp_path / "run", undisturbed("classifier"))


def test_resuming_a_finished_run_changes_nothing(tmp_path, undisturbed):
    run_classifier(tmp_path / "run")
    run_classifier(tmp_path / "run", resume=True)
    assert_same_results(tmp_path / "run", undisturbed("classifier"))


def test_autoencoder_run_can_be_made_longer(tmp_path, undisturbed):
    run_autoencoder(tmp_path / "run", epochs=2)
    run_autoencoder(tmp_path / "run", epochs=3, resume=True)
    assert_same_results(tmp_path / "run", undisturbed("autoencoder"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_saves_and_says_how_to_go_on(number, tmp_path):
    with pytest.raises(Interrupted, match=r"after step 4, .*--resume") as interruption:
        run_classifier(tmp_path / "run", progress=SignalAt(4, number))
    assert interruption.value.step == 4
    manifests = sorted((tmp_path / "run" / "checkpoint").glob("save-*/manifest.json"))
    assert json.loads(manifests[-1].read_bytes())["step"] == 4


def test_signal_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        run_classifier(tmp_path / "run", progress=SignalAt(1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_random_state_and_threads_of_the_caller_are_untouched(tmp_path):
    threads = torch.get_num_threads()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 4))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run_classifier(tmp_path / "run", model=model)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_log_lines_after_the_checkpoint_are_dropped(tmp_path, undisturbed):
    with pytest.raises(Interrupted):
        run_classifier(tmp_path / "run", progress=SignalAt(5))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "epoch": 2, "train/loss": 1.0}\n{"step": 7, "epo')
    run_classifier(tmp_path / "run", resume=True)
    assert_same_results(tmp_path / "run", undisturbed("classifier"))


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, undisturbed):
    with pytest.raises(Interrupted):
        run_classifier(tmp_path / "run", progress=SignalAt(5))
    newest = max((tmp_path / "run" / "checkpoint").glob("save-*"))
    tensors = newest / "tensors.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    progress = Recorder()
    run_classifier(tmp_path / "run", resume=True, progress=progress)
    assert any(newest.name in line and "SHA-256" in line for line in progress.lines)
    assert "continuing after step 3" in progress.lines
    assert_same_results(tmp_path / "run", undisturbed("classifier"))


def test_only_damaged_checkpoints_are_an_error_that_names_them(tmp_path):
    with pytest.raises(Interrupted):
        run_classifier(tmp_path / "run", progress=SignalAt(1))
    for manifest in (tmp_path / "run" / "checkpoint").glob("save-*/manifest.json"):
        manifest.write_bytes(b'{"format": 1')
    with pytest.raises(CheckpointError, match=r"no usable checkpoint .*manifest\.json is no manifest"):
        run_classifier(tmp_path / "run", resume=True)


def test_other_settings_are_an_error_that_names_the_difference(tmp_path):
    with pytest.raises(Interrupted):
        run_classifier(tmp_path / "run", learning_rate=0.01, progress=SignalAt(1))
    with pytest.raises(RunFolderError, match=r"learning_rate was 0\.01, now 0\.1"):
        run_classifier(tmp_path / "run", learning_rate=0.1, resume=True)


def test_checkpoint_of_another_run_is_an_error_that_names_the_difference(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        with pytest.raises(Interrupted):
            run_classifier(tmp_path / name, seed=seed, progress=SignalAt(1))
    stolen = tmp_path / "a" / "checkpoint"
    (tmp_path / "b" / "checkpoint").rename(tmp_path / "aside")
    stolen.rename(tmp_path / "b" / "checkpoint")
    with pytest.raises(CheckpointError, match="of another run: seed was 1, now 2"):
        run_classifier(tmp_path / "b", seed=2, resume=True)


def test_checkpoint_of_another_model_is_an_error_that_names_the_tensor(tmp_path):
    def model(width):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, width), torch.nn.Linear(width, 4))

    with pytest.raises(Interrupted):
        run_classifier(tmp_path / "run", model=model(8), progress=SignalAt(1))
    with pytest.raises(CheckpointError, match=r"of another model: 1.weight is \(8, 256\) in the file, \(16, 256\)"):
        run_classifier(tmp_path / "run", model=model(16), resume=True)


def test_run_killed_before_its_first_checkpoint_starts_over(tmp_path, undisturbed):
    with pytest.raises(Interrupted):
        run_classifier(tmp_path / "run", progress=SignalAt(1))
    for path in sorted((tmp_path / "run" / "checkpoint").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    run_classifier(tmp_path / "run", resume=True)
    assert_same_results(tmp_path / "run", undisturbed("classifier"))
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["step"] == 2
