"""How values are dealt out to blocks and threads (csrc/cuda/channels.h, windows.h), compiled as plain C++."""

from __future__ import annotations

import ctypes

import pytest
import torch
from kernels_on_host import compiled, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def tilings(tmp_path_factory) -> ctypes.CDLL:
    library = compiled(tmp_path_factory.mktemp("tilings"), "tilings")
    library.count_visits.restype = ctypes.c_bool
    return library


def long(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


CHANNELS = [1, 2, 3, 5, 7, 8, 12, 16, 17, 32, 64, 65, 130, 513, 1000]


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("unroll", "blocks"), [(1, 1), (4, 7), (8, 40)])
def test_each_value_is_moved_once_by_a_lane_of_its_channel(tilings, element_bytes, groups, channels, unroll, blocks):
    for rows in (1, 2, 3, 7, 8, 100, 333):
        visits = torch.zeros(groups * rows * channels, dtype=torch.int32)
        assert tilings.count_visits(
            element_bytes, *long(rows, channels, groups), unroll, *long(blocks), 1, address(visits)
        )
        assert (visits == 1).all()


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_so_it_is_where_blocks_take_whole_columns(tilings, element_bytes, channels, multiprocessors):
    taken = []
    for rows in (1, 2, 7, 64, 333):
        visits = torch.zeros(2 * rows * channels, dtype=torch.int32)
        sizes = long(rows, channels, 2)
        taken.append(tilings.count_visits(element_bytes, *sizes, 1, *long(0), multiprocessors, address(visits)))
        # One launch of `tiles` blocks, each of which goes through the groups; here they are blocks of their own.
        assert not taken[-1] or (visits == 1).all()
    assert taken[0] or channels in (65, 130, 513, 1000)
    assert not taken[-1] or rows * channels * element_bytes < 64 << 20


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("channels", [*CHANNELS, 65_535, 65_536])
def test_each_channels_parameters_belong_to_one_tile(tilings, element_bytes, channels):
    tiles = torch.zeros(channels, dtype=torch.int32)
    tilings.count_channels(element_bytes, *long(100, channels), address(tiles))
    assert (tiles == 1).all()


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("channels", [1, 3, 64, 65, 65_535, 65_536])
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (17, 2), (2**33 + 8, 1), (2**32 + 8, 2)])
def test_sizes_fit_a_gpu_and_64_bits(tilings, element_bytes, channels, rows, groups):
    if rows * channels > 2**46:
        rows //= channels
    results = (ctypes.c_int64 * 4)()
    tilings.describe(element_bytes, *long(rows, channels, groups), 4, *long(264), results)
    threads, blocks, slices, end = results
    assert threads % 32 == 0
    assert threads <= 256
    assert 1 <= blocks < 2**31
    assert slices <= 264
    assert end == groups * rows * channels


@pytest.mark.parametrize(
    ("position", "size", "width"),
    [(256, 4096, 16), (0, 48, 16), (8, 4096, 8), (256, 40, 8), (4, 16, 4), (2, 16, 2), (512, 6, 2)],
)
def test_an_access_is_as_wide_as_addresses_and_sizes_allow(tilings, position, size, width):
    assert tilings.access(*long(position, size)) == width


@pytest.mark.parametrize("open", [False, True])
@pytest.mark.parametrize(("height", "width"), [(2, 2), (5, 4), (4, 7), (3, 3), (8, 2)])
def test_windows_cover_each_pixel_once(tilings, open, height, width):
    pixels = torch.zeros(4, height, width, dtype=torch.int32)
    pooled = torch.zeros(4, height // 2, width // 2, dtype=torch.int32)
    tilings.count_windows(*long(2, 4, height, width), open, address(pixels), address(pooled))
    assert (pooled == 1).all()
    whole = pixels if open else pixels[:, : height // 2 * 2, : width // 2 * 2]
    assert (whole == 1).all()
    assert pixels.sum() == whole.sum()


def test_more_windows_than_32_bits_count(tilings):
    results, side = (ctypes.c_int64 * 4)(), 2**17
    index = 2 * (side // 2) ** 2 + 3 * (side // 2) + 5  # the third map, row 3, column 5
    tilings.one_window(*long(4, side, side, index), results)
    first = (2 * side + 6) * side + 10
    assert list(results) == [first, 2, 2, index]
