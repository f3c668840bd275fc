"""A folder of image files as a data set: layouts, the split, unreadable files, streaming."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ganvas import data
from ganvas.data.folder_listing import list_folder


def picture(seed=0, size=(12, 12), mode="RGB"):
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def save(path, image=None, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture(seed)).save(path)
    return path


def make_classes(root, per_class=6, classes=("cat", "dog"), **kwargs):
    for number, name in enumerate(classes):
        for i in range(per_class):
            save(root / name / f"{i:03}.png", picture(100 * number + i, **kwargs))
    return root


def png_bomb(width=50_000, height=50_000):
    """A PNG of a few hundred bytes whose header promises 2.5 billion pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def truncated_jpeg():
    buffer = io.BytesIO()
    picture(size=(64, 64)).save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def test_train_and_test_folders_are_the_splits(tmp_path):
    make_classes(tmp_path / "train", 3)
    make_classes(tmp_path / "test", 2)
    train, test = (data.load("folder", root=tmp_path, split=split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert (train.channels, train.size, train.images.dtype) == (3, 12, torch.uint8)
    expected = np.asarray(picture(101)).transpose(2, 0, 1)
    assert torch.equal(train.images[4], torch.from_numpy(expected.copy()))


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_serves_as_the_test_split(tmp_path, name):
    make_classes(tmp_path / "train", 3)
    make_classes(tmp_path / name, 2)
    assert len(data.load("folder", root=tmp_path, split="test")) == 4


def test_class_folders_alone_are_split_into_disjoint_parts_that_are_complete(tmp_path):
    make_classes(tmp_path, 60)
    listing = list_folder(tmp_path)
    train, test = ({path for path, _ in part} for part in (listing.train, listing.test))
    assert not train & test
    assert len(train | test) == 120
    assert 4 <= len(test) <= 24  # one in ten, give or take three standard deviations
    assert {label for _, label in listing.test} == {0, 1}


def test_an_image_stays_on_its_side_when_others_come_and_the_folder_moves(tmp_path):
    def test_names(root):
        return {path.relative_to(root).as_posix() for path, _ in list_folder(root).test}

    before = make_classes(tmp_path / "before", 60)
    names_before = test_names(before)
    for i in range(60, 90):
        save(before / "cat" / f"{i:03}.png")
    moved = before.rename(tmp_path / "after")
    assert names_before <= test_names(moved)


def test_each_class_of_two_images_has_one_on_each_side(tmp_path):
    listing = list_folder(make_classes(tmp_path, 2, classes=[f"c{i}" for i in range(9)]))
    assert [label for _, label in listing.train] == [label for _, label in listing.test] == list(range(9))


def test_a_train_folder_alone_is_split(tmp_path):
    make_classes(tmp_path / "train", 10)
    listing = list_folder(tmp_path)
    assert listing.class_names == ("cat", "dog")
    assert len(listing.train) + len(listing.test) == 20
    assert listing.test


def test_nested_folders_and_any_case_of_suffix_count_and_other_files_do_not(tmp_path):
    make_classes(tmp_path / "test", 1)
    save(tmp_path / "train" / "cat" / "deep" / "er" / "a.PNG")
    save(tmp_path / "train" / "dog" / "b.JpEg")
    save(tmp_path / "train" / "dog" / "c.webp")
    save(tmp_path / "train" / "dog" / ".hidden.png")
    (tmp_path / "train" / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    assert [path.name for path, _ in list_folder(tmp_path).train] == ["a.PNG", "b.JpEg", "c.webp"]


def test_the_most_common_shorter_side_is_the_natural_size(tmp_path):
    make_classes(tmp_path, 3, size=(20, 30))
    save(tmp_path / "cat" / "x.png", picture(size=(40, 41)))
    assert data.load("folder", root=tmp_path).size == 20


def test_the_natural_size_ends_at_64(tmp_path):
    assert data.load("folder", root=make_classes(tmp_path, 2, size=(100, 90))).size == 64


def test_a_folder_of_grey_images_has_one_channel_unless_asked(tmp_path):
    make_classes(tmp_path, 3, mode="L")
    assert data.load("folder", root=tmp_path).images.shape[1] == 1
    assert data.load("folder", root=tmp_path, channels=3).images.shape[1] == 3


def test_one_colour_image_makes_a_folder_rgb(tmp_path):
    make_classes(tmp_path / "train", 3, mode="L")
    make_classes(tmp_path / "test", 3, mode="L")
    save(tmp_path / "train" / "dog" / "colour.png")
    assert [data.load("folder", root=tmp_path, split=split).channels for split in ("train", "test")] == [3, 3]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images; expected CLASS/ folders of \.png"):
        data.load("folder", root=tmp_path)


def test_a_class_without_images_is_named(tmp_path):
    make_classes(tmp_path)
    (tmp_path / "emu").mkdir()
    with pytest.raises(ValueError, match="files for class emu"):
        data.load("folder", root=tmp_path)


def test_a_class_of_the_test_split_alone_is_named(tmp_path):
    make_classes(tmp_path / "train")
    make_classes(tmp_path / "test", classes=("cat", "emu"))
    with pytest.raises(ValueError, match="class emu is in the test split but not in train/"):
        data.load("folder", root=tmp_path)


def test_a_test_folder_without_a_train_folder_is_refused(tmp_path):
    make_classes(tmp_path / "test")
    with pytest.raises(ValueError, match="has test/ but no train/"):
        data.load("folder", root=tmp_path)


def test_one_class_is_too_few_unless_labels_do_not_matter(tmp_path):
    make_classes(tmp_path, classes=("cat",))
    with pytest.raises(ValueError, match=r"has 1 class \(cat\), at least 2 are needed.*min_classes=1"):
        data.load("folder", root=tmp_path)
    assert data.load("folder", root=tmp_path, min_classes=1).class_names == ("cat",)


@pytest.mark.parametrize("layout", [".", "train"])
def test_images_without_class_folders_are_one_class_named_after_root(tmp_path, layout):
    root = tmp_path / "faces"
    for i in range(4):
        save(root / layout / f"{i}.png")
        if layout == "train":
            save(root / "test" / f"{i}.png")
    with pytest.raises(ValueError, match="has 1 class"):
        data.load("folder", root=root)
    train, test = (data.load("folder", root=root, split=split, min_classes=1) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("faces",)
    assert len(train) + len(test) == (8 if layout == "train" else 4)


def break_three(root):
    """Three damaged files among twelve good ones, in train/."""
    make_classes(root / "train")
    make_classes(root / "test", 1)
    (root / "train" / "cat" / "a-bomb.png").write_bytes(png_bomb())
    (root / "train" / "cat" / "b-cut.jpg").write_bytes(truncated_jpeg())
    (root / "train" / "dog" / "c-text.webp").write_text("<html>404</html>")
    return root


def test_all_unreadable_files_are_listed_in_one_error(tmp_path):
    with pytest.raises(ValueError) as raised:
        data.load("folder", root=break_three(tmp_path))
    message = str(raised.value)
    assert "3 of 15 image files cannot be read" in message
    assert "skip_unreadable" in message
    assert "a-bomb.png: " in message
    assert "b-cut.jpg: image file is truncated" in message
    assert "c-text.webp: not a PNG, JPEG or WebP image" in message


def test_a_long_list_of_unreadable_files_is_cut_and_counted(tmp_path):
    make_classes(tmp_path)
    for i in range(23):
        (tmp_path / "cat" / f"bad{i:02}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.\.\. and \d+ more") as raised:
        data.load("folder", root=tmp_path)
    assert len(str(raised.value).splitlines()) == 12


@pytest.mark.parametrize("memory_limit", [data.DEFAULT_MEMORY_LIMIT, 1], ids=["in memory", "streamed"])
def test_unreadable_files_are_left_out_and_listed_on_request(tmp_path, memory_limit):
    clean = make_classes(tmp_path / "clean" / "train")
    make_classes(clean.parent / "test", 1)
    expected = data.load("folder", root=clean.parent)
    root = break_three(tmp_path / "broken")
    dataset = data.load("folder", root=root, skip_unreadable=True, memory_limit=memory_limit, size=12)
    assert [file.path.rsplit("/", 1)[1] for file in dataset.skipped] == ["a-bomb.png", "b-cut.jpg", "c-text.webp"]
    assert all(file.reason for file in dataset.skipped)
    assert dataset.labels.tolist() == expected.labels.tolist()
    assert all(torch.equal(dataset[i][0], expected[i][0]) for i in range(len(expected)))


def test_a_class_with_no_readable_image_is_refused_even_when_skipping(tmp_path):
    make_classes(tmp_path)
    (tmp_path / "emu").mkdir()
    (tmp_path / "emu" / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no readable image is left of class emu"):
        data.load("folder", root=tmp_path, skip_unreadable=True)


def test_a_folder_over_the_memory_limit_is_streamed_with_the_same_items(tmp_path):
    make_classes(tmp_path, 10)
    in_memory = data.load("folder", root=tmp_path)
    num_bytes = in_memory.images.numel()
    assert isinstance(data.load("folder", root=tmp_path, memory_limit=num_bytes), data.InMemoryDataset)
    streamed = data.load("folder", root=tmp_path, memory_limit=num_bytes - 1)
    assert isinstance(streamed, data.StreamedFolder)
    assert (streamed.size, streamed.channels, len(streamed)) == (12, 3, len(in_memory))
    for i in range(len(streamed)):
        assert torch.equal(streamed[i][0], in_memory[i][0])
        assert streamed[i][1] == in_memory[i][1]


def test_unreadable_files_of_a_streamed_folder_are_known_before_training(tmp_path):
    with pytest.raises(ValueError, match="3 of 15"):
        data.load("folder", root=break_three(tmp_path), memory_limit=1)
