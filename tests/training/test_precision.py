"""bfloat16: what suits the device unless it is said, kept in the run's config, and what the run was begun with."""

from __future__ import annotations

import pytest
import torch
from tiny_training_jobs import COMMON, run_classifier, tiny_data
from training_helpers import SignalAt, assert_same_results

from ganvas.training import ClassifierConfig, Interrupted, RunFolderError, preparation
from ganvas.training.run_folder import RunFolder


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As far as the default is concerned."""
    monkeypatch.setattr(preparation, "has_bfloat16", lambda device: True)


def stored(folder):
    return RunFolder(folder).read_description()["config"]["bf16"]


def test_cpu_trains_in_float32_unless_told_otherwise(tmp_path):
    assert stored(run_classifier(tmp_path / "run", epochs=1)) is False
    assert stored(run_classifier(tmp_path / "told", epochs=1, bf16=True)) is True


def test_gpu_with_bfloat16_trains_in_it_unless_told_otherwise(tmp_path, on_a_gpu):
    assert stored(run_classifier(tmp_path / "run", epochs=1)) is True
    assert stored(run_classifier(tmp_path / "told", epochs=1, bf16=False)) is False


def test_run_is_resumed_in_the_precision_it_was_begun_in_on_whatever_device(tmp_path, monkeypatch):
    for begun, resumed in ((True, False), (False, True)):
        folders = [tmp_path / f"{name}-{begun}" for name in ("run", "undisturbed")]
        monkeypatch.setattr(preparation, "has_bfloat16", lambda device, begun=begun: begun)
        run_classifier(folders[1])
        with pytest.raises(Interrupted):
            run_classifier(folders[0], progress=SignalAt(4))
        monkeypatch.setattr(preparation, "has_bfloat16", lambda device, resumed=resumed: resumed)
        run_classifier(folders[0], resume=True)
        assert stored(folders[0]) is begun
        assert_same_results(*folders)


def test_other_precision_on_resume_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        run_classifier(tmp_path / "run", progress=SignalAt(4))
    with pytest.raises(RunFolderError, match="bf16 was False, now True"):
        run_classifier(tmp_path / "run", resume=True, bf16=True)


def test_autocast_is_what_the_config_says(tmp_path):
    for bf16 in (None, False, True):
        config = ClassifierConfig(out=tmp_path / "run", bf16=bf16, **COMMON)
        data = {f"{split}_data": tiny_data(split) for split in ("train", "test")}
        job = preparation.prepare(config, **data, float_range=(0.0, 1.0), resume=False)
        assert job.config.bf16 is bool(bf16)
        with job.autocast():
            assert torch.is_autocast_enabled("cpu") is bool(bf16)
