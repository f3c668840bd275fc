"""What training sets for the whole process, and puts back: the choice of convolutions on GPUs."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_training_jobs import JOBS

from ganvas.training import SilentProgress
from ganvas.training.random_state import reproducible

FLAGS = ("deterministic", "benchmark")


def cudnn():
    return tuple(getattr(torch.backends.cudnn, flag) for flag in FLAGS)


@pytest.fixture(params=list(itertools.product([False, True], repeat=2)))
def of_the_user(request, monkeypatch):
    for flag, value in zip(FLAGS, request.param):
        monkeypatch.setattr(torch.backends.cudnn, flag, value)
    return request.param


@pytest.mark.parametrize("deterministic", [True, False])
def test_cudnn_measures_its_convolutions_only_where_bits_may_differ(deterministic, of_the_user):
    with reproducible(0, None, torch.device("cpu"), deterministic=deterministic):
        assert cudnn() == (deterministic, not deterministic)
    assert cudnn() == of_the_user


def test_settings_are_put_back_after_an_error(of_the_user):
    threads = torch.get_num_threads()
    with pytest.raises(ValueError), reproducible(0, threads + 1, torch.device("cpu")):
        raise ValueError
    assert cudnn() == of_the_user
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("deterministic", [True, False])
def test_training_runs_as_the_config_says(job, deterministic, tmp_path):
    seen = set()

    class Watching(SilentProgress):
        def advance(self, images):
            seen.add(cudnn())

    JOBS[job](tmp_path / "run", epochs=1, deterministic=deterministic, progress=Watching())
    assert seen == {(deterministic, not deterministic)}
