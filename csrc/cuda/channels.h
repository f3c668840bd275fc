// How values [rows, C], channels innermost, are dealt out to blocks and threads. Plain C++: kernels, their launches and
// tests share it.
//
// A thread moves a vector of 16 bytes at once. Where C does not fill whole vectors, `pack` rows are read as one: such a
// packed row is a whole number of vectors, and each lane of a vector meets the same channel in every packed row. With
// C = 3 and 4 lanes, 4 rows are 3 vectors:
//
//   | 0 1 2 0 | 1 2 0 1 | 2 0 1 2 |
//
// A block takes `tile` neighbouring vectors of one group's rows and `row_lanes` threads for each of them. Its threads
// go down the packed rows, each in its own column, so what a thread knows and sums of its channels stays in registers.
// The `slices` blocks of a tile take chunks of rows in turn: together they move through memory front to back.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../host_device.h"

namespace ganvas::cuda {

using Index = std::int64_t;

constexpr int vector_bytes = 16;
constexpr int most_threads = 256;  // of a block
constexpr int most_tile = 64;      // vectors
constexpr int most_lanes = 8;      // of a vector: 16-bit values
constexpr int most_tile_values = most_tile * most_lanes;
constexpr Index one_block_bytes =
    64 << 10;  // estimated: up to here one launch beats three that use every multiprocessor

GANVAS_HOST_DEVICE constexpr Index ceiling(Index a, Index b) {
    return (a + b - 1) / b;
}

struct Tiling {
    Index rows;         // of a group
    Index channels;     // C
    Index groups;       // G
    int lanes;          // values in a vector
    int access;         // bytes moved at once: a vector, or what addresses and sizes are multiples of
    int pack = 1;       // rows in a packed row
    Index vectors = 0;  // in a packed row
    int tile = 0;       // vectors of a block
    int row_lanes = 0;  // threads for each of them
    Index tiles = 0;
    Index slices = 0;  // blocks that share a tile's rows

    GANVAS_HOST_DEVICE Index width() const { return pack * channels; }
    GANVAS_HOST_DEVICE Index packed_rows() const { return ceiling(rows, pack); }
    GANVAS_HOST_DEVICE Index whole_packed_rows() const { return rows / pack; }
    GANVAS_HOST_DEVICE Index chunks(int unroll) const { return ceiling(packed_rows(), Index{row_lanes} * unroll); }
    GANVAS_HOST_DEVICE Index blocks() const { return tiles * slices * groups; }
    GANVAS_HOST_DEVICE int threads() const { return static_cast<int>(ceiling(tile * row_lanes, 32) * 32); }

    // The channels whose first lanes are in a tile. Of several lanes with the same
    // channel, C apart, all are in a tile that is the only one.
    GANVAS_HOST_DEVICE Index first_channel(Index tile_index) const { return tile_index * tile * lanes; }
    GANVAS_HOST_DEVICE int tile_channels(Index tile_index) const {
        const Index left = channels - first_channel(tile_index), most = Index{tile} * lanes;
        return static_cast<int>(left < 0 ? 0 : left < most ? left : most);
    }

    // How many of the vector's lanes there are in that packed row: all, but in the last row, or at a row's end where
    // vectors do not fill it.
    GANVAS_HOST_DEVICE int count(Index packed_row, Index vector) const {
        const Index whole = whole_packed_rows();
        const Index values = packed_row < whole ? width() : packed_row == whole ? rows % pack * channels : 0;
        const Index left = values - vector * lanes;
        return static_cast<int>(left < 0 ? 0 : left < lanes ? left : lanes);
    }
    GANVAS_HOST_DEVICE Index offset(Index group, Index packed_row, Index vector) const {
        return group * rows * channels + packed_row * width() + vector * lanes;
    }
};

// What a thread of a launch of tiling.blocks() × tiling.threads() works on.
struct Place {
    Index tile, slice, group;
    int column, row;  // in the block: which of the tile's vectors, which of its row lanes
    Index vector;     // in the packed row
    bool active;      // threads beyond the tile only wait at barriers

    GANVAS_HOST_DEVICE Place(const Tiling& tiling, Index block, int thread)
        : tile(block % tiling.tiles),
          slice(block / tiling.tiles % tiling.slices),
          group(block / tiling.tiles / tiling.slices),
          column(thread % tiling.tile),
          row(thread / tiling.tile),
          vector(tile * tiling.tile + column),
          active(row < tiling.row_lanes && vector < tiling.vectors) {}
};

constexpr Index greatest_common_divisor(Index a, Index b) {
    return b == 0 ? a : greatest_common_divisor(b, a % b);
}

// The widest access that suits all addresses, each a multiple of it from the next by `bytes`.
inline int widest_access(std::initializer_list<const void*> arrays, Index bytes) {
    auto bits = static_cast<std::uintptr_t>(bytes) | vector_bytes;
    for (const void* array : arrays) bits |= reinterpret_cast<std::uintptr_t>(array);
    return static_cast<int>(bits & -bits);
}

inline void set_tile(Tiling& tiling, Index tile) {
    tiling.tile = static_cast<int>(tile);
    tiling.tiles = ceiling(tiling.vectors, tile);
    const Index row_lanes = most_threads / tile, rows = tiling.packed_rows();
    tiling.row_lanes = static_cast<int>(rows < row_lanes ? rows : row_lanes);
    tiling.slices = 1;
}

// Of rows one behind the other, `rows` in each group.
inline Tiling tiling_of_rows(int element_bytes, Index rows, Index channels, Index groups, int access) {
    Tiling tiling{rows, channels, groups, vector_bytes / element_bytes, access};
    tiling.pack = static_cast<int>(tiling.lanes / greatest_common_divisor(tiling.lanes, channels));
    tiling.vectors = tiling.width() / tiling.lanes;
    set_tile(tiling, ceiling(tiling.vectors, ceiling(tiling.vectors, most_tile)));
    return tiling;
}

// Of pixels that do not lie one behind the other: each has vectors of its own, the last of which it need not fill.
inline Tiling tiling_of_pixels(int element_bytes, Index pixels, Index channels, Index groups, int access) {
    Tiling tiling{pixels, channels, groups, vector_bytes / element_bytes, access};
    tiling.vectors = ceiling(channels, tiling.lanes);
    set_tile(tiling, ceiling(tiling.vectors, ceiling(tiling.vectors, most_tile)));
    return tiling;
}

// Cuts the rows into slices of at least a chunk each, for as many blocks as run at once.
inline void cut(Tiling& tiling, int unroll, Index blocks) {
    const Index room = blocks / (tiling.tiles * tiling.groups), chunks = tiling.chunks(unroll);
    tiling.slices = room < 1 ? 1 : room < chunks ? room : chunks;
}

// Whether blocks may take all rows of their channels, one group after the other, and sets tiles for it: as narrow as
// keeps memory's 32-byte sectors whole, wider where there are few rows or more channels than multiprocessors.
inline bool take_whole_columns(Tiling& tiling, int multiprocessors) {
    Index tile = tiling.vectors;
    if (tiling.pack == 1) {
        const Index wanted = ceiling(tiling.vectors, multiprocessors), by_rows = most_threads / tiling.rows;
        tile = wanted < by_rows ? by_rows : wanted;
        tile = tile < 2 ? 2 : tile;
        tile = tile < tiling.vectors ? tile : tiling.vectors;
        tile = tile < most_tile ? tile : most_tile;
    }
    const Index vectors = tiling.groups * tiling.packed_rows() * tile;  // of a block
    if (tile > most_tile || vectors * vector_bytes > one_block_bytes) return false;
    set_tile(tiling, tile);
    return true;
}

}  // namespace ganvas::cuda
