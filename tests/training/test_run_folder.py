"""Which folders a run may use, what is refused before anything is created, and what its files hold."""

from __future__ import annotations

import json
import os

import pytest
import torch
from tiny_training_jobs import run_classifier, run_gan, tiny_data
from training_helpers import Recorder

from ganvas import training
from ganvas.training import ClassifierConfig, GANConfig, RunFolderError, SilentProgress
from ganvas.training.metrics_log import MetricsLog, read_metrics
from ganvas.training.run_folder import RunFolder


def test_folder_with_a_run_is_refused_without_resume(tmp_path):
    run_classifier(tmp_path / "run", epochs=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(RunFolderError, match="already holds a run; continue it with --resume, or name another"):
        run_classifier(tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_resume_without_a_run_is_refused_and_creates_nothing(tmp_path):
    with pytest.raises(RunFolderError, match="holds no run to resume; leave out --resume"):
        run_classifier(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(RunFolderError, match="is a file; name a folder"):
        run_classifier(tmp_path / "run")


def test_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="is no folder; name another"):
        run_classifier(tmp_path / "file" / "run")


def test_files_that_a_run_would_overwrite_are_not_touched(tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(RunFolderError, match=r"holds report\.html, which a run would overwrite"):
        run_classifier(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("call", ["os.replace", "pathlib.Path.mkdir"])
def test_run_killed_while_its_folder_is_made_can_be_started_or_resumed(call, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with folder.lock():
        monkeypatch.setattr(call, killed)
        with pytest.raises(KeyboardInterrupt):
            folder.create({})
        monkeypatch.undo()
    folder.check(resume=folder.config.exists())


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run_classifier(tmp_path, epochs=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="no permission to write"):
        run_classifier(tmp_path / "run")


def test_second_process_in_the_same_folder_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.lock(), pytest.raises(RunFolderError, match="another process is training"), RunFolder(tmp_path).lock():
        pass
    with RunFolder(tmp_path).lock():
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "digitz"}, "digits"),
        ({"data": "mnist", "root": "/nonexistent"}, "does not exist"),
        ({"model": "resnett"}, "did you mean 'resnet'"),
        ({"model": "dcgan"}, "is a gan; this job takes one of"),
        ({"device": "cuda:99"}, "not there"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda"),
    ],
)
def test_mistake_in_the_config_creates_nothing(changes, message, tmp_path):
    config = ClassifierConfig(**{"data": "digits", "out": tmp_path / "run", **changes})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        training.train(config, progress=SilentProgress())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 20}, "size must be one of 16, 32, 64, 128"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing needs kind"),
        ({"model": "mlp_conv_gan", "size": 32}, "size must be 28"),
    ],
)
def test_mistake_in_a_gan_config_creates_nothing(changes, message, tmp_path):
    config = GANConfig(**{"data": "digits", "out": tmp_path / "run", **changes})
    with pytest.raises(ValueError, match=message):
        training.train(config, progress=SilentProgress())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be positive"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be at least 0 and less than 1"),
        ({"epochs": "ten"}, TypeError, "epochs must be a number"),
    ],
)
def test_config_refuses_values_that_no_run_could_use(changes, error, message):
    with pytest.raises(error, match=message):
        ClassifierConfig(data="digits", out="run", **changes)


def test_only_one_of_two_data_sets_is_refused(tmp_path):
    with pytest.raises(ValueError, match="given together"):
        training.train_classifier(ClassifierConfig(data="x", out=tmp_path / "run"), train_data=tiny_data("train"))


def test_data_sets_of_different_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the same size; got 16 and 8"):
        training.train_classifier(
            ClassifierConfig(data="x", out=tmp_path / "run"),
            train_data=tiny_data("train"),
            test_data=tiny_data("test", size=8),
        )


def test_config_of_an_unknown_type_is_refused():
    with pytest.raises(TypeError, match="config must be one of ClassifierConfig"):
        training.train({"data": "digits"})


def test_every_log_line_is_json_that_any_reader_takes(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(1, 1, {"train/loss": float("nan"), "test/accuracy": float("-inf"), "count": 3})

    def refuse(constant):
        raise AssertionError(constant)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line, parse_constant=refuse)
    assert values == {"step": 1, "epoch": 1, "train/loss": "nan", "test/accuracy": "-inf", "count": 3}


def test_log_is_cut_back_to_the_length_a_checkpoint_knew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, 1, {})
        length = log.length
        log.write(2, 1, {})
    with MetricsLog(path, length=length) as log:
        log.write(3, 1, {})
    assert [line["step"] for line in read_metrics(path)] == [1, 3]


def test_unfinished_last_line_is_left_out_when_reading(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "epoch": 1}\n{"step": 2, "ep')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_other_thread_count_on_resume_is_said(tmp_path):
    run_classifier(tmp_path / "run", epochs=1)
    progress = Recorder()
    run_classifier(tmp_path / "run", epochs=1, resume=True, threads=2, progress=progress)
    assert any("last bits" in line and "threads was 1, now 2" in line for line in progress.lines)


def test_weights_that_do_not_fit_are_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save_weights("model", torch.nn.Linear(2, 3), step=1)
    with pytest.raises(RunFolderError, match=r"weight is \(3, 2\) in the file, \(4, 2\) in the model"):
        folder.load_weights("model", torch.nn.Linear(2, 4))
    with pytest.raises(RunFolderError, match="the file has bias, the model has not"):
        folder.load_weights("model", torch.nn.Linear(2, 3, bias=False))
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(RunFolderError, match="is damaged"):
        folder.load_weights("model", torch.nn.Linear(2, 3))


def test_presets_fill_in_what_suits_the_data_and_keep_what_was_given():
    from ganvas.training.presets import with_presets

    config = with_presets(GANConfig(data="digits", out="run", epochs=7))
    assert (config.epochs, config.size) == (7, 16)
    assert config.width is not None
    assert with_presets(GANConfig(data="mnist", out="run", model="mlp_conv_gan")).size == 28
    assert with_presets(GANConfig(data="my set", out="run")) == with_presets(
        GANConfig(data="my set", out="run", epochs=with_presets(GANConfig(data="folder", out="run")).epochs)
    )


def test_dataset_smaller_than_a_batch_trains_in_one_batch_an_epoch(tmp_path):
    run_gan(tmp_path / "run", batch_size=1000, epochs=1)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 1
