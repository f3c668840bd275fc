"""A mistake is one line on stderr that says what to do, exit code 2, and nothing is created."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

NEW = ("--data", "digits", "--out", "new")
WRONG_COMMAND_LINES = {
    "misspelt command": (["trian"], "no command 'trian' (did you mean 'train'?)"),
    "misspelt job": (["train", "clasifier"], "no command 'clasifier' (did you mean 'classifier'?)"),
    "unknown option of the program": (["--versoin"], "has no option '--versoin'"),
    "option of no command": (["train", "--epochs", "3"], "ganvas train has no option '--epochs'"),
    "misspelt option": (["train", "gan", *NEW, "--epoch", "3"], "no option --epoch (did you mean '--epochs'?)"),
    "misspelt required option": (["train", "gan", "--dta", "digits"], "no option --dta (did you mean '--data'?)"),
    "option of another job": (["train", "classifier", *NEW, "--r1-gamma", "1"], "no option --r1-gamma"),
    "missing options": (["train", "gan"], "Missing from ganvas train gan: --data STR"),
    "missing run": (["sample", "--out", "grid.png"], "Missing from ganvas sample: RUN"),
    "missing value": (["train", "gan", *NEW, "--epochs"], "Missing value for argument"),
    "text for a whole number": (
        ["train", "gan", *NEW, "--epochs", "ten"],
        "--epochs: must be a whole number, got 'ten'",
    ),
    "fraction for a whole number": (["train", "gan", *NEW, "--epochs", "1.5"], "must be a whole number, got '1.5'"),
    "text for a number": (["train", "gan", *NEW, "--beta1", "x"], "--beta1: must be a number, got 'x'"),
    "value that is no choice": (["train", "gan", *NEW, "--loss", "hing"], "'hinge'"),
    "word too many": (["train", "gan", *NEW, "extra"], "extra"),
    "negative epochs": (["train", "gan", *NEW, "--epochs", "-1"], "epochs must be at least 1, got -1"),
    "no batch": (["train", "gan", *NEW, "--batch-size", "0"], "batch_size must be at least"),
    "no threads": (["train", "gan", *NEW, "--threads", "0"], "threads must be at least 1"),
    "negative threads": (["train", "gan", *NEW, "--threads", "-2"], "threads must be at least 1, got -2"),
    "more threads than any machine has": (
        ["train", "gan", *NEW, "--threads", "100000"],
        "threads must be at most 1024, got 100000",
    ),
    "NaN": (["train", "gan", *NEW, "--gradient-clip", "nan"], "gradient_clip must be positive"),
    "misspelt data": (["train", "gan", "--data", "digts", "--out", "new"], "(did you mean 'digits'?)"),
    "data that needs a folder": (["train", "gan", "--data", "mnist", "--out", "new"], "needs root"),
    "missing data": (["train", "gan", "--data", "mnist", "--root", "no", "--out", "new"], "'no' does not exist"),
    "folder of no images": (["train", "gan", "--data", "folder", "--root", "empty", "--out", "new"], "no images"),
    "misspelt model": (["train", "gan", *NEW, "--model", "dcgn"], "(did you mean 'dcgan'?)"),
    "model of another kind": (["train", "gan", *NEW, "--model", "resnet"], "'resnet' is a classifier"),
    "size that the model does not take": (
        ["train", "gan", *NEW, "--size", "20"],
        "size must be one of 16, 32, 64, 128",
    ),
    "no such device": (["train", "gan", *NEW, "--device", "cuda:99"], "'cuda:99' is not there"),
    "no device": (["train", "gan", *NEW, "--device", "gpu"], "device must be auto, cpu, cuda"),
    "out is a file": (["train", "gan", "--data", "digits", "--out", "file"], "file is a file"),
    "out below a file": (["train", "gan", "--data", "digits", "--out", "file/new"], "file is no folder"),
    "nothing to resume": (["train", "gan", *NEW, "--resume"], "no run to resume"),
    "sample of no run": (["sample", "new", "--out", "grid.png"], "new is no run folder"),
    "predict with no run": (["predict", "empty", "file"], "empty is no run folder"),
    "evaluate of a file": (["evaluate", "file"], "file is no run folder"),
    "misspelt run": (["evaluate", "emty"], "(did you mean 'empty'?)"),
    "unknown option of info": (["info", "--model"], "(did you mean '--models'?)"),
}


@pytest.mark.parametrize(("args", "said"), WRONG_COMMAND_LINES.values(), ids=WRONG_COMMAND_LINES)
def test_mistake_is_one_line_with_exit_code_2_and_nothing_is_created(ganvas, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    outcome = ganvas(*args)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.error.startswith("error: ")
    assert said in outcome.error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file"]


@pytest.mark.parametrize("job", ["classifier", "gan", "autoencoder"])
@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("gpu", "GANVAS_BACKEND must be one of cpu, triton, cuda, reference; got 'gpu'"),
        ("cuda", "GANVAS_BACKEND='cuda' cannot"),
    ],
)
def test_backend_that_cannot_run_is_said_before_anything_is_created(ganvas, tmp_path, monkeypatch, job, backend, said):
    monkeypatch.setenv("GANVAS_BACKEND", backend)
    outcome = ganvas("train", job, "--data", "digits", "--device", "cpu", "--out", tmp_path / "run")
    assert outcome.code == 2
    assert said in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_instruction_set_that_does_not_exist_is_said_before_anything_is_created(tmp_path):
    # In a process of its own: which instruction set runs is decided once.
    program = (sys.executable, "-c", "import sys; from ganvas.cli import main; sys.exit(main())")
    args = ("train", "classifier", "--data", "digits", "--device", "cpu", "--out", "run")
    done = subprocess.run(
        [*program, *args], env={**os.environ, "GANVAS_CPU_ISA": "sse9"}, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: GANVAS_CPU_ISA must be portable, avx2, avx512 or amx; got 'sse9'\n"
    assert list(tmp_path.iterdir()) == []


def test_run_is_not_loaded_with_a_backend_that_cannot_run(ganvas, classifier_run, monkeypatch):
    monkeypatch.setenv("GANVAS_BACKEND", "gpu")
    outcome = ganvas("evaluate", classifier_run)
    assert (outcome.code, outcome.out) == (2, "")
    assert "GANVAS_BACKEND must be one of" in outcome.error


def test_folder_that_holds_a_run_is_left_as_it_is(ganvas, classifier_run):
    before = {path: path.stat().st_mtime_ns for path in classifier_run.rglob("*")}
    outcome = ganvas("train", "gan", "--data", "digits", "--out", classifier_run)
    assert outcome.code == 2
    assert "already holds a run; continue it with --resume, or name another folder" in outcome.error
    assert before == {path: path.stat().st_mtime_ns for path in classifier_run.rglob("*")}


def test_message_of_many_lines_becomes_one(ganvas, train, tmp_path):
    train.error = OSError("cannot be read:\n  a.png\n  b.png")
    outcome = ganvas("train", "gan", "--data", "digits", "--out", tmp_path / "run")
    assert outcome.error == "error: cannot be read: a.png b.png"


class TestMistakesAboutARun:
    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (["--out", "grid.jpg"], "--out must end in .png, got grid.jpg"),
            (["--out", "no/grid.png"], "there is no folder no; make it first"),
            (["--out", "grid.png", "--count", "0"], "--count must be at least 1, got 0"),
            (["--out", "grid.png", "--labels", "11"], "no class '11' (did you mean '1'?); it has 0, 1, 2"),
            (["--out", "grid.png", "--device", "tpu"], "device must be auto, cpu, cuda"),
        ],
    )
    def test_sample(self, ganvas, gan_run, tmp_path, monkeypatch, args, said):
        monkeypatch.chdir(tmp_path)
        outcome = ganvas("sample", gan_run, *args)
        assert outcome.code == 2
        assert said in outcome.error
        assert list(tmp_path.iterdir()) == []

    def test_sample_of_a_classifier(self, ganvas, classifier_run, tmp_path):
        outcome = ganvas("sample", classifier_run, "--out", tmp_path / "grid.png")
        assert outcome.code == 2
        assert "only a gan's can be sampled" in outcome.error

    def test_predict_with_a_gan(self, ganvas, gan_run):
        outcome = ganvas("predict", gan_run, gan_run / "samples" / "best.png")
        assert outcome.code == 2
        assert "only a classifier's predicts" in outcome.error

    def test_predict_without_images(self, ganvas, classifier_run):
        outcome = ganvas("predict", classifier_run)
        assert (outcome.code, outcome.error) == (2, "error: ganvas predict needs image files after the run folder")

    def test_predict_on_an_image_that_is_not_there(self, ganvas, classifier_run, gan_run):
        outcome = ganvas("predict", classifier_run, gan_run / "samples" / "bets.png")
        assert outcome.code == 2
        assert f"(did you mean '{gan_run / 'samples' / 'best.png'}'?)" in outcome.error

    def test_predict_on_a_file_that_is_no_image(self, ganvas, classifier_run):
        outcome = ganvas("predict", classifier_run, classifier_run / "config.json")
        assert outcome.code == 2
        assert "not a PNG, JPEG or WebP image" in outcome.error

    def test_damaged_run(self, ganvas, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"job": "gan"})[:-3])
        outcome = ganvas("evaluate", tmp_path)
        assert outcome.code == 2
        assert "config.json is damaged" in outcome.error
