"""IDX files: accepted spellings, and every way in which one can be damaged."""

import gzip
import struct

import numpy as np
import pytest
import torch

from ganvas import data

NUM_IMAGES = 12


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 28, 28), dtype=np.uint8)


@pytest.fixture
def labels():
    return np.arange(NUM_IMAGES, dtype=np.uint8) % 10


@pytest.fixture
def root(tmp_path, pixels, labels):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(pixels))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(pixels[:3]))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[:3]))
    return tmp_path


def test_images_and_labels_come_back_as_written(root, pixels, labels):
    mnist = data.load("mnist", root=root)
    assert torch.equal(mnist.images, torch.from_numpy(pixels)[:, None])
    assert mnist.labels.tolist() == labels.tolist()
    assert (mnist.channels, mnist.size) == (1, 28)
    assert len(data.load("mnist", root=root, split="test")) == 3


@pytest.mark.parametrize("spelling", ["{}-idx{}-ubyte.gz", "{}.idx{}-ubyte", "{}.idx{}-ubyte.gz"])
def test_usual_spellings_are_found(tmp_path, pixels, labels, spelling):
    pack = gzip.compress if spelling.endswith(".gz") else bytes
    (tmp_path / spelling.format("train-images", 3)).write_bytes(pack(idx(pixels)))
    (tmp_path / spelling.format("train-labels", 1)).write_bytes(pack(idx(labels)))
    assert torch.equal(data.load("mnist", root=tmp_path).images[:, 0], torch.from_numpy(pixels))


def test_a_file_unpacked_under_its_gz_name_is_read(root, pixels):
    (root / "train-images-idx3-ubyte").rename(root / "train-images-idx3-ubyte.gz")
    assert torch.equal(data.load("mnist", root=root).images[:, 0], torch.from_numpy(pixels))


def test_files_in_the_folder_torchvision_makes_are_found(root, tmp_path_factory):
    outer = tmp_path_factory.mktemp("outer")
    (outer / "MNIST").mkdir()
    root.rename(outer / "MNIST" / "raw")
    assert len(data.load("mnist", root=outer)) == NUM_IMAGES


def test_a_missing_file_is_named(root):
    (root / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        data.load("mnist", root=root)


def corrupt_header(content: bytes, position: int, value: int) -> bytes:
    return content[:position] + struct.pack(">I", value) + content[position + 4 :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: b"", "not an IDX file"),
        (lambda content: b"<html>404 not found", "not an IDX file"),
        (lambda content: corrupt_header(content, 0, 0x0D03), "not an IDX file of unsigned bytes in 3"),
        (lambda content: content[:10], "truncated in its header"),
        (lambda content: content[:-1], "truncated"),
        (lambda content: content + b"\0", "oversized"),
        (lambda content: corrupt_header(content, 4, 0xFFFFFFFF), "truncated"),
        (lambda content: corrupt_header(corrupt_header(content, 8, 14), 12, 56), "28x28.*14x56"),
        (lambda content: idx(np.zeros((0, 28, 28), np.uint8)), "0 images but .* 12 labels"),
        (lambda content: idx(np.zeros((3, 28, 28), np.uint8)), "3 images but .* 12 labels"),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_damaged_images_are_refused_naming_the_file(root, damage, words, pack):
    path = root / "train-images-idx3-ubyte"
    path.write_bytes(pack(damage(path.read_bytes())))
    with pytest.raises(ValueError, match=words) as raised:
        data.load("mnist", root=root)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("cut", [1, 9, 30])
def test_a_truncated_gzip_file_is_refused(root, cut):
    path = root / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(path.read_bytes())[:-cut])
    with pytest.raises(ValueError, match="damaged or truncated gzip"):
        data.load("mnist", root=root)


def test_flipped_bits_in_a_gzip_file_are_noticed(root):
    path = root / "train-images-idx3-ubyte"
    packed = bytearray(gzip.compress(path.read_bytes()))
    packed[len(packed) // 2] ^= 0xFF
    path.write_bytes(packed)
    with pytest.raises(ValueError):
        data.load("mnist", root=root)


def test_a_label_above_nine_is_refused(root, labels):
    labels[5] = 10
    (root / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(ValueError, match="labels must be 0 to 9; got 10"):
        data.load("mnist", root=root)


def test_a_set_without_images_is_refused(root):
    (root / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((0, 28, 28), np.uint8)))
    (root / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(0, np.uint8)))
    with pytest.raises(ValueError, match="holds no images"):
        data.load("mnist", root=root)
