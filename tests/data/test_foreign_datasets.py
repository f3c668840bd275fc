"""torch Datasets of other makers: which images and labels are understood, and which are refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from ganvas.data import BatchLoader, InMemoryDataset, as_image_dataset, load, to_image_tensor

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
CHW = torch.from_numpy(RGB.transpose(2, 0, 1).copy())


def batch_of(*items, **options):
    return next(BatchLoader(list(items), len(items), shuffle=False, **options).epoch(0))


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RGB),
        Image.fromarray(RGB).convert("RGBA"),
        CHW,
        RGB,
        RGB.transpose(2, 0, 1),
        CHW.float() / 255,
        CHW.double() / 255,
        (RGB / 255).astype(np.float32),
    ],
    ids=["PIL", "PIL RGBA", "tensor", "HWC array", "CHW array", "float tensor", "double tensor", "float array"],
)
def test_every_accepted_form_of_an_image_gives_the_same_batch(image):
    images, labels = batch_of((image, 3))
    assert images.shape == (1, 3, 6, 8)
    assert torch.allclose(images[0], CHW.float() / 127.5 - 1, atol=1e-6)
    assert labels.tolist() == [3]


@pytest.mark.parametrize("image", [Image.fromarray(RGB[..., 0]), CHW[0], RGB[..., 0], RGB[..., :1]])
def test_grey_images_have_one_channel(image):
    images, _ = batch_of((image, 0))
    assert torch.equal(images[0], CHW[:1].float().div(127.5).sub(1))


def test_a_sixteen_bit_grey_image_is_scaled():
    image = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert torch.all(to_image_tensor(image) == 0x80)


def test_float_images_in_another_range_are_accepted_when_it_is_given():
    normalised = CHW.float() / 127.5 - 1
    images, _ = batch_of((normalised, 0), float_range=(-1, 1))
    assert torch.allclose(images[0], normalised, atol=1e-6)


@pytest.mark.parametrize(
    "image",
    [CHW.float() / 127.5 - 1, CHW.float(), torch.full((3, 4, 4), float("nan"))],
    ids=["[-1, 1]", "0..255", "NaN"],
)
def test_floats_outside_the_range_are_refused(image):
    with pytest.raises(ValueError, match=r"images have values from .* but float_range is \(0, 1\)"):
        batch_of((image, 0))


def test_the_overshoot_of_a_resize_is_clamped():
    images, _ = batch_of((torch.tensor([[[-0.05, 1.05]]]), 0))
    assert images.flatten().tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("label", "expected"),
    [(np.int64(4), 4), (torch.tensor(4), 4), (torch.tensor(4, dtype=torch.int32), 4), (np.array(4), 4)],
)
def test_labels_may_be_any_integer(label, expected):
    assert batch_of((CHW, label))[1].tolist() == [expected]


@pytest.mark.parametrize("label", [1.0, "cat", torch.tensor([0, 1]), torch.tensor(0.5), None, True])
def test_other_labels_are_refused(label):
    with pytest.raises(TypeError, match="label must be an integer"):
        batch_of((CHW, label))


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        ("cat.png", TypeError, "Pillow image, a tensor or a numpy array; got str"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), TypeError, "uint8 or floating point; got torch.int64"),
        (torch.zeros(1, 3, 4, 4), ValueError, r"\(C, H, W\)"),
        (torch.zeros(4, 8, 8), ValueError, r"with C 1 or 3; got shape \(4, 8, 8\)"),
        (np.zeros((8, 8, 4)), ValueError, "with C 1 or 3"),
        (np.zeros(8), ValueError, r"\(H, W, C\)"),
    ],
)
def test_other_images_are_refused(image, error, words):
    with pytest.raises(error, match=words):
        batch_of((image, 0))


def test_images_of_different_shapes_are_refused_naming_the_item():
    with pytest.raises(ValueError, match=r"item 1 is \(3, 8, 8\).*resize or crop"):
        batch_of((CHW, 0), (torch.zeros(3, 8, 8, dtype=torch.uint8), 0))


@pytest.mark.parametrize("item", [CHW, (CHW,), (CHW, 0, 0), {"image": CHW, "label": 0}])
def test_items_that_are_no_pairs_are_refused(item):
    with pytest.raises(TypeError, match=r"item 0 of the data set must be \(image, label\)"):
        batch_of(item)


def test_a_tensor_dataset_is_read():
    images = torch.rand(7, 1, 4, 4)
    loader = BatchLoader(TensorDataset(images, torch.arange(7)), 3, shuffle=False)
    seen, labels = (torch.cat(parts) for parts in zip(*loader.epoch(0)))
    assert torch.allclose(seen, images * 2 - 1, atol=1e-6)
    assert labels.tolist() == list(range(7))


class LikeTorchvision:
    """The attributes of torchvision's classification sets."""

    classes = ("cat", "dog")
    targets = (0, 1, 1)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return Image.new("L", (9, 9), 100 * index), self.targets[index]


def test_a_torchvision_set_is_described_by_its_attributes_and_first_item():
    dataset = as_image_dataset(LikeTorchvision())
    assert (dataset.class_names, dataset.channels, dataset.size, len(dataset)) == (("cat", "dog"), 1, 9, 3)
    assert dataset.labels.tolist() == [0, 1, 1]
    assert dataset.name == "liketorchvision"
    images, _ = next(BatchLoader(dataset, 3, shuffle=False).epoch(0))
    assert torch.equal(images[:, 0, 0, 0], torch.tensor([0, 100, 200]).div(127.5).sub(1))


def test_labels_are_read_from_the_items_where_there_are_no_targets():
    dataset = as_image_dataset([(torch.zeros(1, 4, 4), i % 2) for i in range(5)], name="own", class_names=["x", "y"])
    assert dataset.labels.tolist() == [0, 1, 0, 1, 0]
    assert dataset.name == "own"


def test_one_of_our_own_sets_is_returned_as_it_is():
    digits = load("digits")
    assert isinstance(digits, InMemoryDataset)
    assert as_image_dataset(digits) is digits


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ([], "dataset is empty"),
        ([(torch.zeros(1, 4, 5), 0)], "images must be square.*4x5"),
        ([(torch.zeros(1, 4, 4), 0)], "class_names must be given"),
    ],
)
def test_a_set_that_cannot_be_described_is_refused(dataset, words):
    with pytest.raises(ValueError, match=words):
        as_image_dataset(dataset)


def test_labels_beyond_the_class_names_are_refused():
    with pytest.raises(ValueError, match="labels must be 0 to 1"):
        as_image_dataset([(torch.zeros(1, 4, 4), 2)], class_names=["x", "y"])
