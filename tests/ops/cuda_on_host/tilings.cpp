// The index arithmetic of csrc/cuda/channels.h and windows.h as plain C++, without CUDA's headers or those in their
// place.
#include "cuda/channels.h"
#include "cuda/windows.h"

using namespace ganvas::cuda;

namespace {

// `blocks` 0: whole columns, for so many multiprocessors.
bool tiling_of(int element_bytes, Index rows, Index channels, Index groups, int unroll, Index blocks,
               int multiprocessors, Tiling& tiling) {
    const int access = widest_access({}, rows * channels * element_bytes);
    tiling = tiling_of_rows(element_bytes, rows, channels, groups, access);
    if (blocks == 0) return take_whole_columns(tiling, multiprocessors);
    cut(tiling, unroll, blocks);
    return true;
}

struct Vector {
    Index group, offset;
    int count;
    Index channel;  // of the first lane
};

// Calls body(vector, tile) for every vector that a thread of a launch moves.
template <class Body>
void for_vectors(const Tiling& tiling, int unroll, Body body) {
    for (Index block = 0; block < tiling.blocks(); ++block)
        for (int thread = 0; thread < tiling.threads(); ++thread) {
            const Place place(tiling, block, thread);
            if (!place.active) continue;
            for (Index chunk = place.slice; chunk < tiling.chunks(unroll); chunk += tiling.slices)
                for (int u = 0; u < unroll; ++u) {
                    const Index row = (chunk * unroll + u) * tiling.row_lanes + place.row;
                    body({place.group, tiling.offset(place.group, row, place.vector), tiling.count(row, place.vector),
                          place.vector * tiling.lanes},
                         place);
                }
        }
}

}  // namespace

extern "C" {

// How often each value is moved, [groups, rows, channels]; -1000 where its channel is not the lane's. False: no such
// tiling.
bool count_visits(int element_bytes, std::int64_t rows, std::int64_t channels, std::int64_t groups, int unroll,
                  std::int64_t blocks, int multiprocessors, std::int32_t* visits) {
    Tiling tiling;
    if (!tiling_of(element_bytes, rows, channels, groups, unroll, blocks, multiprocessors, tiling)) return false;
    for_vectors(tiling, unroll, [&](const Vector& vector, const Place&) {
        for (int lane = 0; lane < vector.count; ++lane)
            visits[vector.offset + lane] +=
                (vector.offset + lane) % channels == (vector.channel + lane) % channels ? 1 : -1000;
    });
    return true;
}

// How many tiles write each channel's parameters, [channels].
void count_channels(int element_bytes, std::int64_t rows, std::int64_t channels, std::int32_t* tiles) {
    Tiling tiling;
    tiling_of(element_bytes, rows, channels, 1, 1, 1, 1, tiling);
    for (Index tile = 0; tile < tiling.tiles; ++tile)
        for (int local = 0; local < tiling.tile_channels(tile); ++local) ++tiles[tiling.first_channel(tile) + local];
}

// threads, blocks, slices, and the end of what the last block moves in its last row.
void describe(int element_bytes, std::int64_t rows, std::int64_t channels, std::int64_t groups, int unroll,
              std::int64_t blocks, std::int64_t* results) {
    Tiling tiling;
    tiling_of(element_bytes, rows, channels, groups, unroll, blocks, 1, tiling);
    const Index row = tiling.packed_rows() - 1;
    Index vector = tiling.vectors - 1;
    while (tiling.count(row, vector) == 0) --vector;
    results[0] = tiling.threads(), results[1] = tiling.blocks(), results[2] = tiling.slices;
    results[3] = tiling.offset(groups - 1, row, vector) + tiling.count(row, vector);
}

int access(std::int64_t address, std::int64_t bytes) {
    return widest_access({reinterpret_cast<const void*>(address)}, bytes);
}

// How often each pixel is in a window, [batch, height, width], and each pooled one is a window's.
void count_windows(std::int64_t groups, std::int64_t batch, std::int64_t height, std::int64_t width, bool open,
                   std::int32_t* pixels, std::int32_t* pooled) {
    const Windows windows(batch / groups, height, width, open);
    for (Index group = 0; group < groups; ++group)
        for (Index i = 0; i < windows.count(); ++i) {
            const Window window(windows, group, i);
            for (Index y = 0; y < window.rows; ++y)
                for (Index x = 0; x < window.columns; ++x) ++pixels[window.first + y * width + x];
            if (window.pooled >= 0) ++pooled[window.pooled];
        }
}

// The first pixel, the rows, the columns and the pooled pixel of one window.
void one_window(std::int64_t batch, std::int64_t height, std::int64_t width, std::int64_t index,
                std::int64_t* results) {
    const Window window(Windows(batch, height, width, false), 0, index);
    results[0] = window.first, results[1] = window.rows, results[2] = window.columns, results[3] = window.pooled;
}
}
