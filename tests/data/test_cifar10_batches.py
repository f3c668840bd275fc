"""CIFAR-10 batches in both forms, and pickles that must not be run."""

import pickle
import struct

import numpy as np
import pytest
import torch

from ganvas import data
from ganvas.data import restricted_pickle
from ganvas.data.cifar10 import read_python_batch

NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
PER_BATCH = 4


@pytest.fixture
def batches():
    generator = np.random.default_rng(0)
    return {
        name: (generator.integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8), generator.integers(0, 10, PER_BATCH))
        for name in NAMES
    }


def binary(pixels, labels):
    return np.concatenate([labels.astype(np.uint8)[:, None], pixels], axis=1).tobytes()


def python2_pickle(pixels, labels):
    """The batch as Python 2's cPickle wrote the published files: protocol 2, str for keys and for the array's bytes."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01" + b"K" + bytes([len(pixels)]) + b"M\x00\x0c\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<I", pixels.nbytes) + pixels.tobytes() + b"tb"
    )
    items = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + items + b"u."


def python3_pickle(protocol):
    def write(pixels, labels):
        return pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol)

    return write


FORMS = {
    "binary": (".bin", binary),
    "python2": ("", python2_pickle),
    "protocol2": ("", python3_pickle(2)),
    "protocol4": ("", python3_pickle(4)),
    "protocol5": ("", python3_pickle(5)),
}


def write_batches(folder, batches, form):
    suffix, write = FORMS[form]
    folder.mkdir(exist_ok=True)
    for name, (pixels, labels) in batches.items():
        (folder / (name + suffix)).write_bytes(write(pixels, labels))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_pixels_and_labels_that_were_written(tmp_path, batches, form):
    write_batches(tmp_path, batches, form)
    train, test = data.load("cifar10", root=tmp_path), data.load("cifar10", root=tmp_path, split="test")
    expected = np.concatenate([batches[name][0] for name in NAMES[:5]]).reshape(-1, 3, 32, 32)
    assert torch.equal(train.images, torch.from_numpy(expected))
    assert train.labels.tolist() == np.concatenate([batches[name][1] for name in NAMES[:5]]).tolist()
    assert test.labels.tolist() == batches["test_batch"][1].tolist()
    assert (train.channels, train.size, train.class_names[3]) == (3, 32, "cat")


@pytest.mark.parametrize(("folder", "form"), [("cifar-10-batches-py", "python2"), ("cifar-10-batches-bin", "binary")])
def test_root_may_be_the_folder_the_archive_was_unpacked_in(tmp_path, batches, folder, form):
    write_batches(tmp_path / folder, batches, form)
    assert len(data.load("cifar10", root=tmp_path)) == 5 * PER_BATCH


def test_rgb_to_grey_is_the_luma_that_pillow_computes(tmp_path, batches):
    from PIL import Image

    write_batches(tmp_path, batches, "binary")
    grey = data.load("cifar10", root=tmp_path, channels=1).images[0, 0].numpy()
    rgb = data.load("cifar10", root=tmp_path).images[0].permute(1, 2, 0).numpy()
    pillow = np.asarray(Image.fromarray(rgb).convert("L"))
    assert np.abs(grey.astype(int) - pillow.astype(int)).max() <= 1


def test_an_archive_that_was_not_unpacked_is_pointed_out(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(FileNotFoundError, match=r"unpack cifar-10-python\.tar\.gz first"):
        data.load("cifar10", root=tmp_path)


def test_missing_batches_are_named(tmp_path, batches):
    write_batches(tmp_path, batches, "binary")
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_3\.bin"):
        data.load("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-1], "whole number of records"),
        (lambda content: content + b"\0", "whole number of records"),
        (lambda content: b"", "whole number of records"),
        (lambda content: content[:3073], "of one size"),
        (lambda content: b"\x0a" + content[1:], "labels must be 0 to 9; got .* to 10"),
    ],
)
def test_a_damaged_binary_batch_is_refused(tmp_path, batches, damage, words):
    write_batches(tmp_path, batches, "binary")
    path = tmp_path / "data_batch_2.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=words):
        data.load("cifar10", root=tmp_path)


def test_an_oversized_file_is_refused_before_it_is_read(tmp_path, batches):
    write_batches(tmp_path, batches, "python2")
    with (tmp_path / "data_batch_1").open("r+b") as file:
        file.truncate(10**10)  # sparse: takes no room
    with pytest.raises(ValueError, match="oversized"):
        data.load("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a CIFAR-10 python batch"),
        (b"\x80\x02}(U\x04data", "not a CIFAR-10 python batch"),
        (pickle.dumps([1, 2]), "holds a list, expected a dict"),
        (pickle.dumps({}), "'data' must be"),
        (pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}), "only u1 .uint8. is admitted"),
        (pickle.dumps({b"data": b"text", b"labels": [0, 1]}), "'data' must be a uint8 array"),
        (pickle.dumps({b"data": np.zeros((2, 100), np.uint8), b"labels": [0, 1]}), r"\(N, 3072\)"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}), "list of 2 integers"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, "1"]}), "list of 2 integers"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, -1]}), "labels must be 0 to 9"),
        (pickle.dumps({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}), "holds no images"),
    ],
)
def test_a_pickle_that_is_no_batch_is_refused(tmp_path, batches, content, words):
    write_batches(tmp_path, batches, "python2")
    path = tmp_path / "test_batch"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as raised:
        data.load("cifar10", root=tmp_path, split="test")
    assert str(path) in str(raised.value)


def calling(module: str, function: str, argument: str) -> bytes:
    """A pickle that calls module.function(argument) when it is read."""
    return b"c" + f"{module}\n{function}\n".encode() + b"(V" + argument.encode() + b"\ntR."


def test_a_malicious_batch_is_refused_and_does_not_run(tmp_path, batches):
    write_batches(tmp_path, batches, "python2")
    victim = tmp_path / "was-here"
    attack = calling("posix", "system", f"touch {victim}")
    (tmp_path / "test_batch").write_bytes(attack)
    with pytest.raises(ValueError, match=r"asks for posix\.system; only numpy arrays are admitted"):
        data.load("cifar10", root=tmp_path, split="test")
    assert not victim.exists()
    pickle.loads(attack)  # the attack is a real one: the standard unpickler falls for it
    assert victim.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("builtins", "eval"), ("builtins", "getattr"), ("numpy", "load"), ("numpy", "ndarray.tofile"), ("os", "system")],
)
def test_only_what_rebuilds_an_array_is_resolved(tmp_path, module, name):
    content = (
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(name)])
        + name.encode()
        + b"\x93."
    )
    path = tmp_path / "attack"
    path.write_bytes(content)
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError, match="only numpy arrays"):
        restricted_pickle.load_dict(file)


def test_a_codec_other_than_latin1_is_refused(tmp_path):
    path = tmp_path / "attack"
    path.write_bytes(b"c_codecs\nencode\n(Vtext\nVrot13\ntR.")
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError, match="only latin1"):
        restricted_pickle.load_dict(file)


@pytest.mark.parametrize(
    ("whole", "forged"),
    [
        (b"K\x02M\x00\x0c\x86", b"K\x7fM\x00\x0c\x86"),  # more rows than bytes
        (b"U\x02u1K", b"U\x02O8K"),  # bytes as object pointers
        (b"cnumpy\ndtype\n", b"cnumpy\nndarray\n"),
    ],
    ids=["shape", "dtype", "class"],
)
def test_a_forged_array_never_reaches_numpy(tmp_path, whole, forged):
    content = python2_pickle(np.zeros((2, 3072), np.uint8), np.zeros(2, np.int64))
    assert content.count(whole) == 1
    path = tmp_path / "attack"
    path.write_bytes(content.replace(whole, forged))
    with path.open("rb") as file, pytest.raises((pickle.UnpicklingError, TypeError)):
        restricted_pickle.load_dict(file)


def test_damaged_pickles_are_refused_and_never_crash(tmp_path):
    content = python2_pickle(np.zeros((1, 3072), np.uint8), np.array([3]))
    places = [*range(150), *range(len(content) - 30, len(content))]
    generator = np.random.default_rng(0)
    path = tmp_path / "test_batch"
    refused = 0
    for _ in range(500):
        damaged = bytearray(content)
        for place in generator.choice(places, 2):
            damaged[place] = generator.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read_python_batch(path)
        except ValueError:
            refused += 1
    assert refused > 250
