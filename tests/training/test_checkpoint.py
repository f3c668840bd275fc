"""Checkpoints: what they hold, what is left when writing one fails, what is refused when one is read."""

from __future__ import annotations

import errno
import json
import math

import pytest
import torch
from tiny_training_jobs import run_classifier
from training_helpers import assert_same_results

from ganvas.training import CheckpointError, CheckpointSaveError, durable, state
from ganvas.training.checkpoint import Checkpoint, CheckpointStore, difference
from ganvas.training.optimizers import make_optimizer


def checkpoint(step: int, *, good: bool = False, value: float = 1.0) -> Checkpoint:
    return Checkpoint({"weight": torch.full((3,), value)}, step=step, epoch=0, good=good, identity={"seed": 0})


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoint", "0.0")


def steps(store):
    return [json.loads((path / "manifest.json").read_bytes())["step"] for path in store.paths()]


def test_state_comes_back_with_every_type_it_had():
    tree = {
        "tensors": [torch.arange(3), torch.tensor(2.5, dtype=torch.bfloat16), torch.zeros(0, 4)],
        "by index": {0: torch.ones(2), 1: {"step": torch.tensor(7.0)}},
        "tuple": (0.9, 0.999),
        "plain": [None, True, 3, "text", math.pi],
        "not finite": [math.inf, -math.inf],
        "marked": {"$": "not a mark of ours"},
    }
    tensors, plain = state.flatten(tree)
    restored = state.unflatten(tensors, json.loads(json.dumps(plain, allow_nan=False)))
    for ours, theirs in zip(restored.pop("tensors"), tree.pop("tensors")):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert torch.equal(restored["by index"].pop(0), tree["by index"].pop(0))
    assert restored["by index"].pop(1) == tree["by index"].pop(1)
    assert restored == tree


def test_nan_comes_back_as_nan():
    tensors, plain = state.flatten({"loss": math.nan})
    assert math.isnan(state.unflatten(tensors, plain)["loss"])


def test_state_of_an_unknown_type_is_refused_with_its_path():
    with pytest.raises(TypeError, match="/parts/clock is object"):
        state.flatten({"parts": {"clock": object()}})


def test_stored_tensors_do_not_change_with_the_originals():
    original = torch.zeros(2)
    tensors, _ = state.flatten({"a": original})
    original.add_(1)
    assert torch.equal(tensors["a"], torch.zeros(2))


def test_optimizer_state_keeps_the_memory_format_of_its_parameters():
    """A fused step walks a parameter and its state side by side in memory."""
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = make_optimizer("adam", model, 1e-3)
    model(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    restored = make_optimizer("adam", model, 1e-3)
    restored.load_state_dict(state.unflatten(*state.flatten(optimizer.state_dict())))
    assert restored.state[model.weight]["exp_avg"].stride() == model.weight.stride()
    assert torch.equal(restored.state[model.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])


def test_newest_checkpoint_is_loaded(store):
    for step in (1, 2, 3):
        store.save(checkpoint(step, value=step))
    loaded, complaints = store.load({"seed": 0})
    assert (loaded.step, complaints) == (3, [])
    assert torch.equal(loaded.state["weight"], torch.full((3,), 3.0))


def test_nothing_is_loaded_where_nothing_was_saved(store):
    assert store.load({"seed": 0}) is None


def test_newest_two_and_the_newest_good_checkpoint_are_kept(store):
    for step, good in ((1, True), (2, True), (3, False), (4, False), (5, False)):
        store.save(checkpoint(step, good=good))
    assert steps(store) == [2, 4, 5]
    loaded, _ = store.load({"seed": 0}, good=True)
    assert loaded.step == 2


def test_checkpoints_sort_by_number_beyond_six_digits(store):
    store.save(checkpoint(1))
    store.paths()[0].rename(store.folder / "save-999999")
    store.save(checkpoint(2))
    assert [path.name for path in store.paths()] == ["save-999999", "save-1000000"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_to_any_file_falls_back_to_the_checkpoint_before(name, damage, store):
    store.save(checkpoint(1))
    file = store.save(checkpoint(2)) / name
    data = file.read_bytes()
    if damage == "flip":
        file.write_bytes(data[:1].swapcase().translate(bytes(255 - i for i in range(256))) + data[1:])
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()
    loaded, complaints = store.load({"seed": 0})
    assert loaded.step == 1
    assert len(complaints) == 1
    assert "save-000002 is damaged" in complaints[0]
    assert name in complaints[0]


def test_checkpoint_of_a_later_format_says_which_version_wrote_it(store):
    path = store.save(checkpoint(1)) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2, "ganvas": "9.9"}))
    with pytest.raises(CheckpointError, match=r"written by ganvas 9.9 in format 2"):
        store.load({"seed": 0})


def test_identity_is_compared_by_name(store):
    store.save(checkpoint(1))
    with pytest.raises(CheckpointError, match="of another run: seed was 0, now 1"):
        store.load({"seed": 1})


def test_difference_names_missing_values_and_counts_the_rest():
    found = dict.fromkeys("abcdef", 1)
    assert difference(found, {}, limit=1) == "a was 1, now nothing and 5 more"
    assert difference(found, dict(found)) == ""


@pytest.fixture
def full_disk(monkeypatch):
    """Makes every file beyond so many fail half-way, as a full disk does."""

    def after(files: int) -> None:
        real, count = durable.write_bytes, 0

        def write(path, data):
            nonlocal count
            count += 1
            if count > files:
                path.write_bytes(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            real(path, data)

        monkeypatch.setattr(durable, "write_bytes", write)

    return after


@pytest.mark.parametrize("files", [0, 1, 2])
def test_full_disk_leaves_the_older_checkpoint_and_nothing_half_written(files, store, full_disk):
    store.save(checkpoint(1))
    before = {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}
    full_disk(files)
    with pytest.raises(CheckpointSaveError, match=r"step 2 .*No space left on device.*step 1 is intact.*--resume"):
        store.save(checkpoint(2))
    assert {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in store.folder.iterdir()] == ["save-000001"]


def test_run_that_met_a_full_disk_resumes_to_the_undisturbed_result(tmp_path, undisturbed, full_disk, monkeypatch):
    with monkeypatch.context() as patch:
        # config.json, three files of the first checkpoint, twice the weights, one file of the second checkpoint.
        full_disk(7)
        with pytest.raises(CheckpointSaveError, match=r"step 3 could not be written .* step 0 is intact"):
            run_classifier(tmp_path / "run")
        patch.undo()
    monkeypatch.undo()
    assert not list((tmp_path / "run").rglob("*.tmp"))
    run_classifier(tmp_path / "run", resume=True)
    assert_same_results(tmp_path / "run", undisturbed("classifier"))


def test_replaced_file_is_the_old_one_until_it_is_complete(tmp_path, full_disk):
    path = tmp_path / "model.safetensors"
    durable.replace_file(path, b"old")
    full_disk(0)
    with pytest.raises(OSError, match="No space left"):
        durable.replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_a_killed_process_are_removed_and_never_loaded(store):
    store.save(checkpoint(1))
    leftover = store.folder / ".writing-save-000002"
    leftover.mkdir()
    (leftover / "manifest.json").write_text("{}")
    assert store.load({"seed": 0})[0].step == 1
    store.remove_leftovers()
    assert not leftover.exists()
    assert store.save(checkpoint(2)).name == "save-000002"
