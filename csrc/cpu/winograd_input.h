// From pixels to transformed tiles. Included by kernel sources only.
#pragma once

#include "convolution_output.h"
#include "winograd_tiles.h"

namespace ganvas::cpu::GANVAS_ISA {

// Numbers that the transform makes of a pixel's channels: a kernel of stride 2 is one of stride 1 on each of the four
// phases of the image, pixels 2m + a, and their products add up. Phases lie side by side, one vector of channels after
// the other.
template <int step>
constexpr Index transformed_channels(Index channels) {
    return step == 1 ? channels : whole_vectors(channels) * step * step;
}

// How a tile of pixels becomes one of products: both transforms have a form along one axis.
template <int taps>
struct InputSide {
    static constexpr int pixels = points_of<taps>, points = points_of<taps>;
    [[gnu::always_inline]] static void transform(const Vector (&d)[pixels], Vector (&v)[points]) {
        transform_input(d, v);
    }
};

template <int taps>
struct OutputSide {
    static constexpr int pixels = tile, points = points_of<taps>;
    [[gnu::always_inline]] static void transform(const Vector (&d)[pixels], Vector (&v)[points]) {
        transform_output_grad(d, v);
    }
};

// The first transform, along the columns of pixels: `count` of them, `column_stride` apart, whole vectors of channels
// and all inside the image. Not inlined, as transform_rows: the addresses alone fill the registers. Fetched meanwhile
// are the next vector of channels, and of the tiles below this one, or at the bottom those of the next image: rows lie
// too far apart for the processor to foresee them.
template <class T, class Side, Activation kind>
[[gnu::noinline]] void transform_columns(const T* pixel, Index row_stride, Index column_stride, Index count,
                                         Vector scale, Vector shift, Leaky leaky, Vector (*columns)[Side::points]) {
    for (Index x = 0; x < count; ++x, pixel += column_stride) {
        const T* halves[2] = {pixel, pixel + 3 * row_stride};
        Vector d[Side::pixels];
#pragma GCC unroll 6
        for (int y = 0; y < Side::pixels; ++y) prefetch(halves[y / 3] + y % 3 * row_stride + lanes);
#pragma GCC unroll 4
        for (int y = 0; y < tile; ++y) prefetch<2>(halves[y / 3] + (y % 3 + tile) * row_stride);
#pragma GCC unroll 6
        for (int y = 0; y < Side::pixels; ++y)
            d[y] = activate<kind>(load_vector(halves[y / 3] + y % 3 * row_stride), scale, shift, leaky);
        Side::transform(d, columns[x]);
    }
}

// The second transform, along the rows of a segment's tiles. The columns of a tile are `step` apart. All column points
// are written, whichever are needed.
template <class Side, int step>
[[gnu::noinline]] void transform_rows(const Vector (*columns)[Side::points], Index tiles, Span row_points,
                                      float* destination, Index tile_stride, Index frequency) {
    constexpr int points = Side::points;
    for (Index t = 0; t < tiles; ++t, columns += step * tile, destination += tile_stride) {
        float* to = destination + row_points.first * points * frequency;
#pragma GCC unroll 1
        for (Index y = row_points.first; y < row_points.last; ++y, to += points * frequency) {
            Vector d[Side::pixels], v[points];
#pragma GCC unroll 6
            for (int x = 0; x < Side::pixels; ++x) d[x] = columns[x * step][y];
            Side::transform(d, v);
            float* halves[2] = {to, to + 3 * frequency};
#pragma GCC unroll 6
            for (int x = 0; x < points; ++x) store_vector(halves[x / 3] + x % 3 * frequency, v[x]);
        }
    }
}

// The first transform of a segment's tiles. Pixel i of the first tile is pixel origin + i*step + phase of the map.
template <class T, class Side, int step, Activation kind>
struct SegmentColumns {
    static constexpr int pixels = Side::pixels, points = Side::points;
    static constexpr Index most = step * (segment_limit * tile + pixels - tile);  // columns of a segment
    const Source& source;
    const T* image;
    const float *scales, *shifts;
    Leaky leaky;
    Span row_points;
    Index top, left, width;     // of the segment's pixels; their number along a row
    Index left_end, right_end;  // of the columns that are inside the image and needed

    SegmentColumns(const Source& source, Pixel origin, const Segment& segment)
        : source(source),
          image(source.image<T>(segment.image)),
          scales(source.pixels.scale + source.per_channel(segment.image)),
          shifts(source.pixels.shift + source.per_channel(segment.image)),
          leaky(source.pixels.negative_slope),
          row_points(segment.row_points),
          top(step * (segment.row * tile - row_points.first) + origin.row),
          left(step * (segment.column * tile - segment.column_points.first) + origin.column),
          width(step * (segment.tiles * tile + pixels - tile)),
          left_end(clamped(-left, step * segment.column_points.first, width)),
          right_end(clamped(source.width - left, left_end, width - step * (points - segment.column_points.last))) {}

    // Of the vector of channels from c on. Columns that are outside the image are zero.
    void transform(Index c, int row_phase, Vector (*columns)[points]) const {
        for (Index x = 0; x < left_end; ++x)
            for (Vector& v : columns[x]) v = Vector{};
        for (Index x = right_end; x < width; ++x)
            for (Vector& v : columns[x]) v = Vector{};
        const Index count = source.channels - c, row_stride = source.width * source.channels, start = top + row_phase;
        Vector scale{}, shift{};
        if (kind != Activation::identity) scale = load_lanes(scales + c, count), shift = load_lanes(shifts + c, count);
        const Index from = larger(row_points.first, ceiling(larger(0, -start), step));  // inside the image
        const Index until = smaller(smaller(pixels, row_points.last), ceiling(larger(0, source.height - start), step));
        const T* pixel = image + start * row_stride + (left + left_end) * source.channels + c;
        if (from == 0 && until == pixels && count >= lanes) {
            transform_columns<T, Side, kind>(pixel, step * row_stride, source.channels, right_end - left_end, scale,
                                             shift, leaky, columns + left_end);
        } else {
            for (Index x = left_end; x < right_end; ++x, pixel += source.channels) {
                Vector d[pixels];
                for (Index y = from; y < until; ++y) prefetch(pixel + y * step * row_stride + lanes);
                for (Index y = 0; y < tile; ++y) prefetch<2>(pixel + (y + tile) * step * row_stride);
                for (int y = 0; y < pixels; ++y)
                    d[y] = y < from || y >= until
                               ? Vector{}
                               : activate<kind>(load_lanes(pixel + y * step * row_stride, count), scale, shift, leaky);
                Side::transform(d, columns[x]);
            }
        }
    }
};

// V = Bᵀ a B, or D = A a Aᵀ, of channels [begin, end) of a segment's tiles, the first of which is number `first` of
// `to`. `begin` is a multiple of `lanes`.
template <class T, class Side, int step, Activation kind>
void transform_segment(const Source& source, Pixel origin, const Segment& segment, const Transformed& to, Index first,
                       Index begin, Index end) {
    using Columns = SegmentColumns<T, Side, step, kind>;
    Vector columns[Columns::most][Side::points];
    const Columns of(source, origin, segment);
    for (Index c = begin; c < end; c += lanes)
        for (int row_phase = 0; row_phase < step; ++row_phase) {
            of.transform(c, row_phase, columns);
            for (int column_phase = 0; column_phase < step; ++column_phase)
                transform_rows<Side, step>(
                    columns + column_phase, segment.tiles, segment.row_points,
                    to.at(first, (c - begin) * step * step + (row_phase * step + column_phase) * lanes), to.width,
                    to.frequency);
        }
}

using TransformSegment = void (*)(const Source&, Pixel origin, const Segment&, const Transformed&, Index first,
                                  Index begin, Index end);

template <class T, class Side, int step>
TransformSegment transform_of(Activation kind) {
    return for_activation(kind,
                          []<Activation of>() -> TransformSegment { return transform_segment<T, Side, step, of>; });
}

template <class Side, int step>
TransformSegment transform_of(Dtype dtype, Activation kind) {
    return dtype == Dtype::float32 ? transform_of<float, Side, step>(kind) : transform_of<bfloat16, Side, step>(kind);
}

}  // namespace ganvas::cpu::GANVAS_ISA
