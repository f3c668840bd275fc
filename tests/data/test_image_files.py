"""One image file to a square tensor: modes, transparency, orientation, cropping, and files that must be refused."""

import io
import multiprocessing
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from ganvas.data import image_files, read_image
from ganvas.data.image_files import decode_files


@pytest.fixture
def gradient():
    """An RGB image of 16x16 whose red grows to the right and whose green grows downwards."""
    ramp = np.arange(16, dtype=np.uint8) * 16
    return np.stack(
        [np.broadcast_to(ramp, (16, 16)), np.broadcast_to(ramp[:, None], (16, 16)), np.full((16, 16), 7)], 2
    ).astype(np.uint8)


def write(path, array_or_image, **options):
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    image.save(path, **options)
    return path


def test_an_image_of_the_wanted_size_comes_back_unchanged(tmp_path, gradient):
    image = read_image(write(tmp_path / "a.png", gradient), 16, 3)
    assert image.dtype == torch.uint8
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(gradient))


@pytest.mark.parametrize(("name", "options"), [("a.jpg", {"quality": 95}), ("a.webp", {"quality": 95})])
def test_lossy_formats_come_back_nearly_unchanged(tmp_path, gradient, name, options):
    image = read_image(write(tmp_path / name, gradient, **options), 16, 3)
    assert (image.permute(1, 2, 0).int() - torch.from_numpy(gradient).int()).abs().float().mean() < 8


def test_the_middle_of_the_longer_side_is_kept(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    tall = wide.transpose(1, 0, 2)
    for number, array in enumerate((wide, tall)):
        assert torch.all(read_image(write(tmp_path / f"{number}.png", array), 10, 3) == 200)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (37, 61), (16, 17)])
def test_any_shape_fits(tmp_path, shape):
    path = write(tmp_path / "a.png", np.full((*shape, 3), 90, dtype=np.uint8))
    assert torch.all(read_image(path, 16, 3) == 90)


def test_downscaling_averages_instead_of_picking_pixels(tmp_path):
    stripes = np.zeros((256, 256), dtype=np.uint8)
    stripes[:, ::2] = 255
    image = read_image(write(tmp_path / "a.png", stripes), 16, 1)
    assert (image.int() - 128).abs().max() <= 4


def test_a_large_jpeg_decoded_at_reduced_scale_matches_full_decoding(tmp_path):
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (512, 512), Image.Resampling.BICUBIC
    )
    jpeg = read_image(write(tmp_path / "a.jpg", smooth, quality=95), 16, 3)
    png = read_image(write(tmp_path / "a.png", smooth), 16, 3)
    assert (jpeg.int() - png.int()).abs().max() <= 8


def test_rgb_to_one_channel_is_luma(tmp_path, gradient):
    grey = read_image(write(tmp_path / "a.png", gradient), 16, 1)
    assert torch.equal(grey[0], torch.from_numpy(np.array(Image.fromarray(gradient).convert("L"))))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_the_wanted_channels(tmp_path, mode, channels):
    white = Image.new("L", (8, 8), 255)
    image = Image.fromarray(np.full((8, 8), 65535, np.uint16)) if mode == "I;16" else white.convert("RGB").convert(mode)
    assert image.mode == mode
    path = write(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), image)
    pixels = read_image(path, 8, channels)
    assert pixels.shape == (channels, 8, 8)
    assert torch.all(pixels >= 254)


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    image = read_image(write(tmp_path / "a.png", levels), 8, 1)
    assert image.flatten().tolist() == [level * 4 for level in range(64)]


def test_transparent_pixels_are_black_whatever_colour_they_hide(tmp_path):
    rgba = np.full((8, 8, 4), 255, dtype=np.uint8)
    rgba[:, 4:, 3] = 0
    image = read_image(write(tmp_path / "a.png", rgba), 8, 3)
    assert torch.all(image[:, :, :4] == 255)
    assert torch.all(image[:, :, 4:] == 0)


def test_a_transparent_palette_colour_is_black(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 255, 255])
    image = read_image(write(tmp_path / "a.png", palette, transparency=1), 8, 3)
    assert torch.all(image == 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, gradient, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(tmp_path / "a.png", gradient, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    assert torch.equal(read_image(path, 16, 3).permute(1, 2, 0), torch.from_numpy(np.array(upright)))


def test_orientation_six_turns_the_picture_clockwise(tmp_path, gradient):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = read_image(write(tmp_path / "a.png", gradient, exif=exif), 16, 3)
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(np.rot90(gradient, -1).copy()))


def test_a_missing_file_is_reported_as_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        read_image(tmp_path / "no.png", 8, 3)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width, height):
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


@pytest.mark.parametrize("side", [9_600, 50_000], ids=["above the limit", "above twice the limit"])
def test_a_decompression_bomb_is_refused_without_a_warning(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"bomb\.png: unreadable image: .*limit") as raised:
            read_image(path, 8, 3)
    assert isinstance(raised.value.__cause__, Image.DecompressionBombError)


def test_a_bomb_in_the_metadata_is_refused(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * (2 * PngImagePlugin.MAX_TEXT_CHUNK), zip=True)
    path = write(tmp_path / "a.png", Image.new("RGB", (8, 8)), pnginfo=text)
    assert path.stat().st_size < 10_000
    with pytest.raises(ValueError, match="too large"):
        read_image(path, 8, 3)


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
def test_a_truncated_file_is_refused(tmp_path, suffix, kept):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, suffix)
    path = tmp_path / f"a.{suffix.lower()}"
    path.write_bytes(buffer.getvalue()[: int(kept * len(buffer.getvalue()))])
    with pytest.raises(ValueError, match=rf"a\.{suffix.lower()}: unreadable image"):
        read_image(path, 16, 3)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "EPS"])
def test_another_format_under_a_png_name_is_not_decoded(tmp_path, format):
    path = write(tmp_path / "a.png", Image.new("RGB", (8, 8)), format=format)
    with pytest.raises(ValueError, match="not a PNG, JPEG or WebP image"):
        read_image(path, 8, 3)


@pytest.fixture
def two_cores(monkeypatch):
    """On any machine; and 200 files are many. Returns how often processes were started."""
    started = []
    decode_in_processes = image_files.decode_in_processes
    monkeypatch.setattr(image_files, "available_cores", lambda: 2)
    monkeypatch.setattr(image_files, "MANY_FILES", 200)
    monkeypatch.setattr(image_files, "CHUNK", 20)
    monkeypatch.setattr(
        image_files, "decode_in_processes", lambda *args: started.append(len(args[1])) or decode_in_processes(*args)
    )
    return started


@pytest.mark.parametrize(
    ("side", "count", "processes"),
    [(8, 199, 0), (8, 201, 1), (128, 201, 0)],
    ids=["one thread", "processes", "threads"],
)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_many_files_are_decoded_in_their_order_and_failures_reported_by_index(
    tmp_path, two_cores, side, count, processes, layout
):
    noise = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    paths = [write(tmp_path / f"{i}.png", noise[i]) for i in range(len(noise))]
    paths[70].write_bytes(b"")
    paths[198].unlink()
    expected = {70: "not a PNG, JPEG or WebP image", 198: "No such file or directory"}
    images = np.zeros((count, 3, side, side), dtype=np.uint8)
    if layout == "nhwc":
        images = np.zeros((count, side, side, 3), dtype=np.uint8).transpose(0, 3, 1, 2)
    assert decode_files(paths, side, 3, images) == expected
    assert decode_files(paths, side, 3, None) == expected
    good = [i for i in range(count) if i not in expected]
    assert np.array_equal(images[good].transpose(0, 2, 3, 1), noise[good])
    assert not images[[70, 198]].any()
    assert len(two_cores) == 2 * processes


def test_files_are_decoded_in_a_process_that_may_start_none(tmp_path, two_cores):
    path = write(tmp_path / "a.png", Image.new("L", (8, 8), 9))
    with multiprocessing.get_context("fork").Pool(1) as pool:  # whose processes are daemons, as a DataLoader's are
        assert pool.apply(decode_files, ([path] * 200, 8, 1, None)) == {}
