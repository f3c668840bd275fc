"""Batches: what they contain, and that order and augmentation depend on seed, epoch and batch index alone."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from ganvas.data import Augmentation, BatchLoader, InMemoryDataset, load, to_float
from ganvas.data.image_files import available_cores

AUGMENTATION = Augmentation(flip=True, shift=2, cutout=3)
COUNT = 23


@pytest.fixture
def in_memory():
    pixels = torch.randint(0, 256, (COUNT, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(COUNT) % 2
    return InMemoryDataset(name="noise", class_names=("a", "b"), channels=3, size=8, images=pixels, labels=labels)


@pytest.fixture
def streamed(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(noise):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "test").mkdir()
    Image.fromarray(noise[0]).save(tmp_path / "test" / "a.png")
    (tmp_path / "test" / "a").mkdir()
    Image.fromarray(noise[0]).save(tmp_path / "test" / "a" / "0.png")
    return load("folder", root=tmp_path, memory_limit=1)


class RandomTransforms(torch.utils.data.Dataset):
    """As a torchvision set with random transforms: each item draws from the three global generators."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        image = torch.full((3, 8, 8), index / 100)
        image[0, 0, :3] = torch.tensor([torch.rand(()), np.random.rand(), random.random()])  # noqa: NPY002
        return image, index % 2


@pytest.fixture(params=["in_memory", "streamed", "foreign"])
def dataset(request):
    return RandomTransforms() if request.param == "foreign" else request.getfixturevalue(request.param)


def same(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(torch.equal(a, b) for pair in zip(first, second) for a, b in zip(*pair))


def loader_of(dataset, **options):
    return BatchLoader(dataset, 5, **({"augmentation": AUGMENTATION, "num_workers": 0} | options))


def test_batches_are_floats_in_unit_range_in_the_native_layout(dataset):
    images, labels = next(loader_of(dataset).epoch(0))
    assert images.dtype == torch.float32
    assert images.shape[0] == 5
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert -1 <= images.min() <= images.max() <= 1
    assert (labels.dtype, labels.shape) == (torch.int64, (5,))


def test_without_shuffling_the_images_come_in_order_as_they_are(in_memory):
    loader = BatchLoader(in_memory, 5, shuffle=False)
    images, labels = (torch.cat(parts) for parts in zip(*loader.epoch(7)))
    assert torch.equal(images, to_float(in_memory.images))
    assert torch.equal(labels, in_memory.labels)


def test_an_epoch_yields_every_image_once_with_its_label(in_memory):
    seen = torch.cat([to_labelled(*batch) for batch in BatchLoader(in_memory, 5).epoch(0)])
    expected = to_labelled(to_float(in_memory.images), in_memory.labels)
    assert not torch.equal(seen, expected)
    assert sorted(seen.tolist()) == sorted(expected.tolist())


def to_labelled(images, labels):
    return torch.cat([images.flatten(1), labels[:, None].float()], dim=1)


def test_a_streamed_folder_and_its_tensors_give_the_same_batches(streamed):
    images, labels = zip(*streamed)
    tensors = InMemoryDataset(
        name="folder",
        class_names=("a", "b"),
        channels=3,
        size=8,
        images=torch.stack(images),
        labels=torch.tensor(labels),
    )
    assert same(loader_of(streamed).epoch(3), loader_of(tensors).epoch(3))


@pytest.mark.parametrize("start", range(6))
def test_an_epoch_taken_up_in_the_middle_goes_on_exactly(dataset, start):
    loader = loader_of(dataset)
    assert same(list(loader.epoch(2))[start:], loader_of(dataset).epoch(2, start))


def test_batches_do_not_depend_on_the_global_generators(dataset):
    first = list(loader_of(dataset).epoch(0))
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    random.seed(99)
    assert same(first, loader_of(dataset).epoch(0))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterating_leaves_the_global_generators_alone(dataset, num_workers):
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    list(loader_of(dataset, num_workers=num_workers).epoch(0))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("kind", ["streamed", "foreign"])
def test_any_number_of_workers_gives_the_same_batches(kind, request):
    dataset = RandomTransforms() if kind == "foreign" else request.getfixturevalue(kind)
    expected = list(loader_of(dataset).epoch(1))
    for num_workers in (1, 2):
        assert same(expected, loader_of(dataset, num_workers=num_workers).epoch(1))
    assert same(expected[2:], loader_of(dataset, num_workers=2).epoch(1, 2))


@pytest.mark.parametrize("change", [dict(seed=1), dict(epoch=1)], ids=["seed", "epoch"])
def test_seed_and_epoch_change_order_and_augmentation(in_memory, change):
    epoch = change.pop("epoch", 0)
    plain, other = loader_of(in_memory, augmentation=None), loader_of(in_memory, augmentation=None, **change)
    assert not same(plain.epoch(0), other.epoch(epoch))
    ordered = [loader_of(in_memory, shuffle=False, **options) for options in ({}, change)]
    assert not same(ordered[0].epoch(0), ordered[1].epoch(epoch))


def test_two_epochs_can_be_read_side_by_side(dataset):
    loader = loader_of(dataset)
    interleaved = [list(pair) for pair in zip(*zip(loader.epoch(0), loader.epoch(1)))]
    assert same(interleaved[0], loader.epoch(0))
    assert same(interleaved[1], loader.epoch(1))


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [5, 5, 5, 5, 3]), (True, [5, 5, 5, 5])])
def test_the_last_batch_is_smaller_or_left_out(dataset, drop_last, sizes):
    loader = loader_of(dataset, drop_last=drop_last)
    assert [len(labels) for _, labels in loader.epoch(0)] == sizes
    assert len(loader) == len(sizes)


def test_a_batch_may_be_written_to_without_harm_to_the_set(in_memory):
    before = in_memory.images.clone()
    for images, labels in BatchLoader(in_memory, COUNT, shuffle=False).epoch(0):
        images.zero_()
        labels.zero_()
    assert torch.equal(in_memory.images, before)
    assert in_memory.labels.any()


def test_a_streamed_folder_is_read_by_several_processes_unless_said_otherwise(streamed):
    assert BatchLoader(streamed, 5).num_workers == min(available_cores(), 8)


def test_a_file_that_vanishes_during_training_is_named(streamed):
    from pathlib import Path

    Path(streamed.paths[4]).unlink()
    with pytest.raises(FileNotFoundError, match=Path(streamed.paths[4]).name):
        list(loader_of(streamed).epoch(0))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(batch_size=0), ValueError, "batch_size must be at least 1; got 0"),
        (dict(batch_size=2.5), TypeError, "batch_size must be an integer"),
        (dict(batch_size=24, drop_last=True), ValueError, "batch_size 24 exceeds the 23 images"),
        (dict(seed=-1), ValueError, "seed must not be negative"),
        (dict(num_workers=-1), ValueError, "num_workers must not be negative"),
        (dict(float_range=(1, 0)), ValueError, "low < high"),
        (dict(augmentation=Augmentation(shift=8)), ValueError, "shift must be less than the image size of 8"),
        (dict(dataset=iter([])), TypeError, "must have a length and items by index"),
        (dict(dataset=[]), ValueError, "dataset is empty"),
    ],
)
def test_nonsense_is_refused_at_once(in_memory, arguments, error, words):
    with pytest.raises(error, match=words):
        BatchLoader(**({"dataset": in_memory, "batch_size": 5} | arguments))


@pytest.mark.parametrize("position", [(-1, 0), (0, -1), (0, 6)])
def test_a_position_outside_the_epoch_is_refused_before_the_first_batch(in_memory, position):
    loader = BatchLoader(in_memory, 5)
    with pytest.raises(ValueError, match=r"epoch must not be|start must be 0 to 5"):
        loader.epoch(*position)
