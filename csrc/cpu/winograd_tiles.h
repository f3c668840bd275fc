// How a Winograd convolution is cut up: tiles of 4×4 outputs, segments of tiles, blocks of segments; and how the
// transformed tiles lie in memory. Included by kernel sources only.
//
// Of the last row and column of a small map's tiles, where fewer than four outputs exist, only the products that those
// are made of are taken: outputs 0 to 2 need none at ∞, the last point (Aᵀ in winograd_transforms.h), and outputs 1 and
// 2 of F(4, 3) none at 0 either, the first. A tile of one or two outputs begins a pixel early, for them to be those.
#pragma once

#include "winograd_transforms.h"

namespace ganvas::cpu::GANVAS_ISA {

constexpr Index segment_limit = 12;  // tiles: the columns of one stay in the L1 cache
constexpr Index chunk_width = 64;    // words of a tile that lie side by side
constexpr Index stagger = 16;        // floats between frequencies: streams a power of two apart would collide

struct Map {
    Index height, width;  // in pixels
};

// The points that the last tile along an axis needs. Its outputs that exist begin with number `first`.
inline Span edge_points(Index length, Index points) {
    const Index tiles = ceiling(length, tile), outputs = length - (tiles - 1) * tile;
    if (outputs == tile || tiles > segment_limit) return {0, points};  // nothing, or too little, to be saved
    return {outputs <= 2 && points == points_of<3> ? 1 : 0, points - 1};
}

struct Segment {
    Index image, row, column, tiles;  // row and column of the first tile, in tiles
    Span row_points, column_points;   // that the tiles need

    bool whole(Index points) const { return row_points.last == points && column_points.last == points; }
};

// Tiles by the points that they need, in the order in which they lie in memory: those of the last row, whole ones,
// those of the last column, corners. So the tiles that need a frequency are neighbours, whichever it is.
constexpr int kinds = 4;
struct Counts {
    Index of[kinds];
};

// The tiles of a map. A segment is a stretch of them within one row of one image that need the same points; they are
// numbered through all images.
struct Tiles {
    Index rows, columns;
    Span whole_points, bottom_points, right_points;
    bool has_bottom, has_right;  // the last row and column are segments of their own
    Index segment_tiles, segments_per_row;
    Index segments, count;

    Tiles(Index images, Index height, Index width, Index points)
        : rows(ceiling(height, tile)),
          columns(ceiling(width, tile)),
          whole_points{0, points},
          bottom_points(edge_points(height, points)),
          right_points(edge_points(width, points)),
          has_bottom(bottom_points.last < points),
          has_right(right_points.last < points) {
        const Index whole = columns - has_right;
        segments_per_row = ceiling(whole, segment_limit);
        segment_tiles = ceiling(whole, larger(1, segments_per_row));
        segments_per_row = (whole > 0 ? ceiling(whole, segment_tiles) : 0) + has_right;
        segments = images * rows * segments_per_row;
        count = images * rows * columns;
    }
    bool at_bottom(Index index) const { return has_bottom && index / segments_per_row % rows == rows - 1; }
    bool at_right(Index index) const { return has_right && index % segments_per_row == segments_per_row - 1; }
    Segment segment(Index index) const {
        const bool right = at_right(index);
        const Index column = right ? columns - 1 : index % segments_per_row * segment_tiles;
        const Index row = index / segments_per_row;
        return {row / rows,
                row % rows,
                column,
                right ? 1 : smaller(segment_tiles, columns - has_right - column),
                at_bottom(index) ? bottom_points : whole_points,
                right ? right_points : whole_points};
    }
    int kind(Index index) const { return at_right(index) ? (at_bottom(index) ? 3 : 2) : (at_bottom(index) ? 0 : 1); }
    // Tiles of the segments before that one.
    Counts before(Index index) const {
        const Index row = index / segments_per_row, bottoms = has_bottom ? row / rows : 0;
        Counts result{{bottoms * (columns - has_right), (row - bottoms) * (columns - has_right),
                       (row - bottoms) * has_right, bottoms * has_right}};
        result.of[at_bottom(index) ? 0 : 1] += index % segments_per_row * segment_tiles;
        return result;
    }
};

// How the tiles of segments [first, last) lie in memory.
struct Order {
    const Tiles& tiles;
    Counts origin;
    Index starts[kinds + 1];

    Order(const Tiles& tiles, Index first, Index last) : tiles(tiles), origin(tiles.before(first)), starts{} {
        const Counts end = tiles.before(last);
        for (int kind = 0; kind < kinds; ++kind) starts[kind + 1] = starts[kind] + end.of[kind] - origin.of[kind];
    }
    // The first tile of that segment.
    Index of(Index segment) const {
        const int kind = tiles.kind(segment);
        return starts[kind] + tiles.before(segment).of[kind] - origin.of[kind];
    }
};

// The tiles that need frequency f.
template <int taps>
Span needing(const Order& order, Index f) {
    const auto within = [](Index point, Span span) { return point >= span.first && point < span.last; };
    const bool bottom = within(f / points_of<taps>, order.tiles.bottom_points);
    const bool right = within(f % points_of<taps>, order.tiles.right_points);
    return {order.starts[bottom ? 0 : 1], order.starts[right ? (bottom ? 4 : 3) : 2]};
}

// Outputs of that tile that lie within `length` pixels, along one axis.
inline Index inside(Index length, Index number) {
    return clamped(length - number * tile, 0, tile);
}

// Consecutive segments of one statistics group.
struct Blocks {
    Index group_segments;
    Index segments;  // of a block
    Index per_group, count;

    Index room;  // of a block, in tiles

    // A row whose last tile is a segment of its own stays together.
    Blocks(const Tiles& tiles, Index groups, Index target_tiles) : group_segments(tiles.segments / groups) {
        const Index unit = tiles.has_right ? tiles.segments_per_row : 1;
        const Index unit_tiles = tiles.has_right ? tiles.columns : tiles.segment_tiles;
        segments = larger(1, target_tiles / unit_tiles) * unit;
        per_group = ceiling(group_segments, segments);
        segments = ceiling(group_segments / unit, per_group) * unit;
        per_group = ceiling(group_segments, segments);
        count = groups * per_group;
        room = segments / unit * unit_tiles;
    }
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
