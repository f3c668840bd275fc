"""What load() refuses before it touches a file, and the digits that come with scikit-learn."""

import numpy as np
import pytest
import torch
from PIL import Image

from ganvas import data


def test_names_lists_every_source():
    assert data.names() == ("digits", "mnist", "cifar10", "folder")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(name="digit"), ValueError, "did you mean 'digits'"),
        (dict(name="imagenet"), ValueError, "digits, mnist, cifar10, folder"),
        (dict(name="digits", split="valid"), ValueError, "split must be one of train, test"),
        (dict(name="digits", size=0), ValueError, "size must be 4 to 2048"),
        (dict(name="digits", size=10**6), ValueError, "size must be 4 to 2048"),
        (dict(name="digits", size=16.0), TypeError, "size must be an integer"),
        (dict(name="digits", size=True), TypeError, "size must be an integer"),
        (dict(name="digits", channels=4), ValueError, "channels must be 1"),
        (dict(name="digits", channels="3"), TypeError, "channels must be an integer"),
        (dict(name="digits", memory_limit=0), ValueError, "memory_limit"),
        (dict(name="digits", min_classes=0), ValueError, "min_classes"),
        (dict(name="digits", root="somewhere"), ValueError, "takes no root"),
        (dict(name="mnist"), ValueError, "needs root.*train-images-idx3-ubyte"),
        (dict(name="cifar10"), ValueError, "needs root.*data_batch_1"),
        (dict(name="folder"), ValueError, "needs root.*CLASS/"),
        (dict(name="mnist", root="no/such/folder"), FileNotFoundError, "'no/such/folder' does not exist"),
        (dict(name="folder", root=__file__), ValueError, "is a file"),
    ],
)
def test_load_names_the_argument_that_is_wrong(arguments, error, words):
    with pytest.raises(error, match=words):
        data.load(**arguments)


def test_digits_are_uint8_over_the_full_range():
    digits = data.load("digits")
    assert digits.images.dtype == torch.uint8
    assert digits.images.shape[1:] == (1, 8, 8)
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    assert digits.labels.dtype == torch.int64
    assert (digits.channels, digits.size, digits.class_names) == (1, 8, tuple("0123456789"))


def test_digits_scale_sixteen_levels_to_255():
    from sklearn.datasets import load_digits

    both = [data.load("digits", split=split) for split in ("train", "test")]
    values = torch.cat([part.images for part in both]).unique().tolist()
    assert values == np.rint(np.arange(17) * 255 / 16).tolist()
    total = sum(int(part.images.to(torch.int64).sum()) for part in both)
    assert abs(total - load_digits().data.sum() * 255 / 16) < len(load_digits().data) * 64 * 0.5


def test_digits_split_is_stratified_fixed_and_complete():
    train, test = data.load("digits"), data.load("digits", split="test")
    assert len(train) + len(test) == 1797
    fraction = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert torch.all((fraction - 0.2).abs() < 0.01)
    assert torch.equal(test.images, data.load("digits", split="test").images)


@pytest.mark.parametrize("size", [5, 16])
def test_resizing_is_antialiased_as_pillow_does_it(size):
    small, resized = data.load("digits", split="test"), data.load("digits", split="test", size=size)
    assert (resized.size, resized.images.shape) == (size, (len(small), 1, size, size))
    # In Pillow's float mode: its uint8 mode clips the overshoot between the horizontal and the vertical pass.
    floats = [Image.fromarray(image[0].float().numpy()) for image in small.images]
    pillow = np.stack([np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in floats])
    assert np.abs(resized.images[:, 0].numpy() - pillow.clip(0, 255)).max() < 0.51


def test_grey_becomes_three_equal_channels():
    grey, rgb = data.load("digits"), data.load("digits", channels=3)
    assert rgb.channels == 3
    assert torch.equal(rgb.images, grey.images.expand(-1, 3, -1, -1))


def test_a_source_that_exceeds_the_memory_limit_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"92,288 bytes.*memory_limit=92,287"):
        data.load("digits", memory_limit=92_287)
    assert len(data.load("digits", memory_limit=92_288)) == 1442


def test_uint8_survives_the_way_to_float_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    images = data.to_float(pixels)
    assert (images.min(), images.max()) == (-1.0, 1.0)
    assert torch.equal(data.to_uint8(images), pixels)


def test_to_uint8_clamps_what_a_generator_overshoots():
    assert data.to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(images=torch.zeros(2, 1, 4, 4)), TypeError, "images must be uint8"),
        (dict(images=torch.zeros(2, 1, 4, 5, dtype=torch.uint8)), TypeError, r"\(2, 1, 4, 4\)"),
        (dict(labels=torch.tensor([0.0, 1.0])), TypeError, "labels must be int64"),
        (dict(labels=torch.tensor([0, 2])), ValueError, "labels must be 0 to 1"),
        (dict(labels=torch.tensor([-1, 0])), ValueError, "labels must be 0 to 1"),
    ],
)
def test_in_memory_set_must_fit_its_description(change, error, words):
    good = dict(
        name="own",
        class_names=("a", "b"),
        channels=1,
        size=4,
        images=torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
        labels=torch.tensor([0, 1]),
    )
    assert len(data.InMemoryDataset(**good)) == 2
    with pytest.raises(error, match=words):
        data.InMemoryDataset(**(good | change))
