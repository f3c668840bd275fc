// How a Winograd convolution is cut up: tiles of 4×4 outputs, segments of tiles, blocks of segments; and how the
// transformed tiles lie in memory. Included by kernel sources only.
#pragma once

#include "winograd_transforms.h"

namespace ganvas::cpu::GANVAS_ISA {

constexpr Index segment_limit = 12;  // tiles: the columns of one stay in the L1 cache
constexpr Index chunk_width = 64;    // words of a tile that lie side by side
constexpr Index stagger = 16;        // floats between frequencies: streams a power of two apart would collide

inline Index clamped(Index value, Index least, Index most) {
    return larger(least, smaller(value, most));
}

struct Map {
    Index height, width;  // in pixels
};

struct Segment {
    Index image, row, column, tiles;  // row and column of the first tile, in tiles
};

// The tiles of a map. A segment is a stretch of them within one row of one image; they are numbered through all images.
struct Tiles {
    Index rows, columns;
    Index segment_tiles, segments_per_row;
    Index segments;

    Tiles(Index images, Index height, Index width) : rows(ceiling(height, tile)), columns(ceiling(width, tile)) {
        segments_per_row = ceiling(columns, segment_limit);
        segment_tiles = ceiling(columns, segments_per_row);
        segments_per_row = ceiling(columns, segment_tiles);
        segments = images * rows * segments_per_row;
    }
    Segment segment(Index index) const {
        const Index column = index % segments_per_row * segment_tiles;
        const Index row = index / segments_per_row;
        return {row / rows, row % rows, column, smaller(segment_tiles, columns - column)};
    }
    // Tiles of the segments before that one.
    Index before(Index index) const {
        return index / segments_per_row * columns + index % segments_per_row * segment_tiles;
    }
};

// Outputs of that tile that lie within `length` pixels, along one axis.
inline Index inside(Index length, Index number) {
    return clamped(length - number * tile, 0, tile);
}

// Consecutive segments of one statistics group.
struct Blocks {
    Index group_segments;
    Index segments;  // of a block
    Index per_group, count;

    Blocks(const Tiles& tiles, Index groups, Index target_tiles) : group_segments(tiles.segments / groups) {
        segments = larger(1, target_tiles / tiles.segment_tiles);
        per_group = ceiling(group_segments, segments);
        segments = ceiling(group_segments, per_group);
        per_group = ceiling(group_segments, segments);
        count = groups * per_group;
    }
    Index room(const Tiles& tiles) const { return segments * tiles.segment_tiles; }  // in tiles
    Index group(Index block) const { return block / per_group; }
    Index first(Index block) const { return group(block) * group_segments + block % per_group * segments; }
    Index last(Index block) const { return smaller(first(block) + segments, (group(block) + 1) * group_segments); }
};

// Tiles after a transform, as words of one or two numbers. Frequency f of tile t and word w lies at
// values[w / chunk_width * chunk + f * frequency + t * width + w % chunk_width]: what one product reads lies together.
struct Transformed {
    float* values = nullptr;
    Index width;  // of a chunk
    Index frequency, chunk;
    Index chunks;

    Transformed(Index frequencies, Index tiles, Index channels, Index numbers = 1)
        : width(smaller(chunk_width, whole_vectors(channels) / numbers)) {
        frequency = tiles * width + stagger;
        chunk = frequencies * frequency;
        chunks = ceiling(channels, width * numbers);
    }
    std::size_t bytes() const { return static_cast<std::size_t>(chunks * chunk) * sizeof(float); }
    float* at(Index t, Index w) const { return values + w / chunk_width * chunk + t * width + w % chunk_width; }
};

}  // namespace ganvas::cpu::GANVAS_ISA
