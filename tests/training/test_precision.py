"""bfloat16: what suits the device unless it is said, kept in the run's config, and what the run was begun with."""

from __future__ import annotations

import pytest
import torch
from tiny_training_jobs import COMMON, run_classifier, tiny_data
from training_helpers import SignalAt, assert_same_results

from ganvas import ops
from ganvas.ops.backends import cpu
from ganvas.training import ClassifierConfig, Interrupted, RunFolderError, preparation
from ganvas.training.run_folder import RunFolder


@pytest.fixture
def prefers(monkeypatch):
    """Sets what suits the device."""
    return lambda bf16: monkeypatch.setattr(ops, "prefers_bfloat16", lambda device: bf16)


def stored(folder):
    return RunFolder(folder).read_description()["config"]["bf16"]


@pytest.mark.parametrize("tiles", [False, True])
def test_cpu_with_tiles_of_bfloat16_prefers_it_and_no_other_does(monkeypatch, tiles):
    pytest.importorskip("ganvas._native")
    monkeypatch.setattr(cpu.native, "has_bfloat16_tiles", lambda: tiles)
    assert ops.prefers_bfloat16(torch.device("cpu")) is tiles
    assert not ops.prefers_bfloat16(torch.device("meta"))
    monkeypatch.setattr(cpu, "native", None)
    assert not ops.prefers_bfloat16(torch.device("cpu"))


def test_device_without_bfloat16_trains_in_float32_unless_told_otherwise(tmp_path, prefers):
    prefers(False)
    assert stored(run_classifier(tmp_path / "run", epochs=1)) is False
    assert stored(run_classifier(tmp_path / "told", epochs=1, bf16=True)) is True


def test_device_with_bfloat16_trains_in_it_unless_told_otherwise(tmp_path, prefers):
    prefers(True)
    assert stored(run_classifier(tmp_path / "run", epochs=1)) is True
    assert stored(run_classifier(tmp_path / "told", epochs=1, bf16=False)) is False


def test_run_is_resumed_in_the_precision_it_was_begun_in_on_whatever_device(tmp_path, prefers):
    for begun, resumed in ((True, False), (False, True)):
        folders = [tmp_path / f"{name}-{begun}" for name in ("run", "undisturbed")]
        prefers(begun)
        run_classifier(folders[1])
        with pytest.raises(Interrupted):
            run_classifier(folders[0], progress=SignalAt(4))
        prefers(resumed)
        run_classifier(folders[0], resume=True)
        assert stored(folders[0]) is begun
        assert_same_results(*folders)


def test_other_precision_on_resume_is_refused(tmp_path, prefers):
    prefers(False)
    with pytest.raises(Interrupted):
        run_classifier(tmp_path / "run", progress=SignalAt(4))
    with pytest.raises(RunFolderError, match="bf16 was False, now True"):
        run_classifier(tmp_path / "run", resume=True, bf16=True)


def test_autocast_is_what_the_config_says(tmp_path, prefers):
    prefers(False)
    for bf16 in (None, False, True):
        config = ClassifierConfig(out=tmp_path / "run", bf16=bf16, **COMMON)
        data = {f"{split}_data": tiny_data(split) for split in ("train", "test")}
        job = preparation.prepare(config, **data, float_range=(0.0, 1.0), resume=False)
        assert job.config.bf16 is bool(bf16)
        with job.autocast():
            assert torch.is_autocast_enabled("cpu") is bool(bf16)
