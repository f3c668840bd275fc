"""``ganvas train``: options become the config, the end says where everything is, --resume continues."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganvas import training
from ganvas.cli import read
from ganvas.cli.job import resume_command
from ganvas.training import AutoencoderConfig, ClassifierConfig, GANConfig


@pytest.mark.parametrize(
    ("job", "config"),
    [("classifier", ClassifierConfig), ("gan", GANConfig), ("autoencoder", AutoencoderConfig)],
)
def test_options_that_are_not_given_are_those_of_the_dataclass(ganvas, train, tmp_path, job, config):
    assert ganvas("train", job, "--data", "digits", "--out", tmp_path / "run").code == 0
    assert train.calls == [(config(data="digits", out=tmp_path / "run"), False)]


def test_options_of_every_type_reach_the_config(ganvas, train, tmp_path):
    words = "--data folder --root photos --epochs 3 --threads=2 --gradient-clip 1e-1 --bf16 --no-conditional"
    words += " --loss hinge --r1_gamma 0.5 --seed 7 --device cpu --model mlp_conv_gan --skip-unreadable"
    assert ganvas("train", "gan", *words.split(), "--out", tmp_path / "run").code == 0
    assert train.config == GANConfig(
        data="folder",
        root=Path("photos"),
        out=tmp_path / "run",
        epochs=3,
        threads=2,
        gradient_clip=0.1,
        bf16=True,
        conditional=False,
        loss="hinge",
        r1_gamma=0.5,
        seed=7,
        device="cpu",
        model="mlp_conv_gan",
        skip_unreadable=True,
    )


@pytest.mark.parametrize(("words", "bf16"), [([], None), (["--bf16"], True), (["--no-bf16"], False)])
def test_bf16_is_on_off_or_left_to_the_device(ganvas, train, tmp_path, words, bf16):
    assert ganvas("train", "gan", "--data", "digits", "--out", tmp_path / "run", *words).code == 0
    assert train.config.bf16 is bf16


def test_the_end_says_the_numbers_and_where_everything_is(ganvas, train, tmp_path):
    out = tmp_path / "run"
    code, text, _ = ganvas("train", "classifier", "--data", "digits", "--out", out)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in text.splitlines() if line)
    assert lines == {
        "run": str(out),
        "test/accuracy": "0.9877",
        "samples": str(out / "samples" / "best.png"),
        "report": str(out / "report.html"),
    }


class TestResume:
    def test_is_passed_on_while_the_run_is_unfinished(self, ganvas, train, tmp_path):
        train.error = training.Interrupted(tmp_path, 3)
        ganvas("train", "gan", "--data", "digits", "--out", tmp_path)
        train.error = None
        assert ganvas("train", "gan", "--data", "digits", "--out", tmp_path, "--resume").code == 0
        assert [resume for _, resume in train.calls] == [False, True]

    def test_of_a_finished_run_says_so_and_trains_nothing(self, ganvas, train, tmp_path):
        ganvas("train", "gan", "--data", "digits", "--out", tmp_path)
        code, out, _ = ganvas("train", "gan", "--data", "digits", "--out", tmp_path, "--resume")
        assert code == 0
        assert f"the run in {tmp_path} is finished, there is nothing to resume" in out
        assert str(tmp_path / "report.html") in out
        assert len(train.calls) == 1

    @pytest.mark.parametrize("other", [["gan", "--epochs", "9"], ["gan", "--seed", "1"], ["gan"], ["classifier"]])
    def test_of_a_finished_run_with_other_settings_is_left_to_training(self, ganvas, train, tmp_path, other):
        ganvas("train", "gan", "--data", "digits", "--out", tmp_path, "--epochs", 3)
        ganvas("train", *other, "--data", "digits", "--out", tmp_path, "--resume")
        assert len(train.calls) == 2


@given(
    st.builds(
        GANConfig,
        data=st.sampled_from(["digits", "folder"]),
        out=st.sampled_from([Path("runs/digits"), Path("my runs/it's")]),
        root=st.none() | st.just(Path("my photos")),
        epochs=st.none() | st.integers(1, 1000),
        gradient_clip=st.none() | st.floats(1e-6, 1e6),
        generator_learning_rate=st.floats(1e-9, 1.0),
        bf16=st.none() | st.booleans(),
        cuda_graph=st.booleans(),
        conditional=st.booleans(),
        loss=st.sampled_from(["bce", "wgan"]),
    )
)
def test_resume_command_means_the_same_config(config):
    program, *args = shlex.split(resume_command(config))
    command = read(args)
    assert program == "ganvas"
    assert command.resume
    assert command.config == config


def test_real_run_cannot_be_started_twice_but_resumed_when_finished(ganvas, classifier_run):
    config = training.load_run(classifier_run).config
    changed = {"data", "model", "epochs", "threads"}
    words = [word for name in sorted(changed) for word in (f"--{name}", getattr(config, name))]
    again = ("train", "classifier", *words, "--out", classifier_run)
    assert ganvas(*again).code == 2
    assert "is finished" in ganvas(*again, "--resume").out
    refused = ganvas(*again, "--resume", "--seed", config.seed + 1)
    assert refused.code == 2
    assert "seed" in refused.error
    assert {field.name for field in dataclasses.fields(config)} >= changed
