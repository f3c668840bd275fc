"""What augmentation does to a batch, pixel by pixel."""

import pytest
import torch
import torch.nn.functional as F

from ganvas.data import Augmentation, to_float

SIZE = 9


@pytest.fixture(params=["uint8", "float"])
def images(request):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (64, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return pixels if request.param == "uint8" else to_float(pixels)


@pytest.fixture
def random(images):
    return torch.rand(len(images), Augmentation.num_random, generator=torch.Generator().manual_seed(1))


def black(images):
    return -1 if images.is_floating_point() else 0


def test_nothing_is_done_unless_asked(images, random):
    assert torch.equal(Augmentation()(images, random), images)


def test_each_image_is_mirrored_or_not_by_its_own_number(images, random):
    flipped = Augmentation(flip=True)(images, random)
    for image, result, number in zip(images, flipped, random[:, 0]):
        assert torch.equal(result, image.flip(-1) if number < 0.5 else image)
    assert 0 < (random[:, 0] < 0.5).sum() < len(images)


@pytest.mark.parametrize("shift", [1, 3, SIZE - 1])
def test_zero_padding_moves_black_in(images, random, shift):
    shifted = Augmentation(shift=shift)(images, random)
    padded = F.pad(images.float(), (shift,) * 4, value=black(images)).to(images.dtype)
    corners = (random[:, 1:3] * (2 * shift + 1)).long().tolist()
    for window, result, (row, column) in zip(padded, shifted, corners):
        assert torch.equal(result, window[:, row : row + SIZE, column : column + SIZE])


@pytest.mark.parametrize("shift", [1, 3, SIZE - 1])
def test_reflection_padding_moves_the_mirrored_image_in(images, random, shift):
    shifted = Augmentation(shift=shift, padding="reflect")(images, random)
    padded = F.pad(images.float(), (shift,) * 4, mode="reflect").to(images.dtype)
    corners = (random[:, 1:3] * (2 * shift + 1)).long().tolist()
    for window, result, (row, column) in zip(padded, shifted, corners):
        assert torch.equal(result, window[:, row : row + SIZE, column : column + SIZE])


def test_shifts_reach_every_offset_up_to_the_limit_and_none_beyond():
    images = torch.zeros(2000, 1, SIZE, SIZE, dtype=torch.uint8)
    images[:, :, SIZE // 2, SIZE // 2] = 255
    random = torch.rand(len(images), Augmentation.num_random, generator=torch.Generator().manual_seed(0))
    positions = Augmentation(shift=2)(images, random).nonzero()
    assert len(positions) == len(images)
    offsets = {tuple(offset) for offset in (positions[:, 2:] - SIZE // 2).tolist()}
    assert offsets == {(row, column) for row in range(-2, 3) for column in range(-2, 3)}


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24], ids=["smallest", "largest"])
def test_the_extreme_random_numbers_stay_in_range(images, number):
    random = torch.full((len(images), Augmentation.num_random), number)
    result = Augmentation(flip=True, shift=4, cutout=3)(images, random)
    assert result.shape == images.shape


@pytest.mark.parametrize("side", [1, 4, 5])
def test_cutout_blackens_one_square_that_may_reach_over_the_border(images, random, side):
    holes = Augmentation(cutout=side)(images, random) != images
    for hole in holes:
        assert torch.equal(hole[0], hole[1])
        rows, columns = hole[0].any(dim=1), hole[0].any(dim=0)
        assert torch.equal(hole[0], rows[:, None] & columns[None, :])
        assert 1 <= rows.sum() <= side
        assert 1 <= columns.sum() <= side
    assert holes[:, 0].sum(dim=(1, 2)).max() == side * side


def test_cutout_leaves_black(images, random):
    result = Augmentation(cutout=4)(images, random)
    assert torch.all(result[result != images] == black(images))


def test_the_batch_that_was_passed_in_is_left_alone(images, random):
    before = images.clone()
    Augmentation(flip=True, shift=2, cutout=3)(images, random)
    assert torch.equal(images, before)


def test_an_empty_batch_stays_empty(images, random):
    result = Augmentation(flip=True, shift=2, cutout=3)(images[:0], random[:0])
    assert result.shape == (0, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(shift=-1), "must not be negative"),
        (dict(cutout=-1), "must not be negative"),
        (dict(padding="mirror"), "padding must be one of zero, reflect; got 'mirror'"),
    ],
)
def test_nonsense_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Augmentation(**arguments)


def test_a_shift_that_leaves_no_pixel_is_refused(images, random):
    with pytest.raises(ValueError, match="shift must be less than the image size of 9 pixels; got 9"):
        Augmentation(shift=SIZE)(images, random)
