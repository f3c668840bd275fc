// From products to pixels, with what the next layer, or the one before, needs to know of them. Included by kernel
// sources only.
#pragma once

#include "winograd_input.h"

namespace ganvas::cpu::GANVAS_ISA {

// The pixels of a phase.
inline Map phase_map(const Destination& to, Pixel phase) {
    return {ceiling(to.height - phase.row, to.step), ceiling(to.width - phase.column, to.step)};
}

// The first transform, along columns of products, of points [first, last). The first row is that of output `first`.
template <int first, int last, int points>
inline void transform_columns(const float* m, Index frequency, Span needed, Vector (&rows)[tile][points]) {
    for (Index x = needed.first; x < needed.last; ++x) {
        Vector d[points], v[tile];
        for (int y = 0; y < points; ++y)
            d[y] = y < first || y >= last ? Vector{} : load_vector(m + (y * points + x) * frequency);
        transform_output(d, v);
        for (int y = first; y < tile; ++y) rows[y - first][x] = v[y];
    }
}

// The same of a segment's tile. Points that it has no products at are zero.
template <int points>
inline void transform_columns(const float* m, Index frequency, const Segment& segment, Vector (&rows)[tile][points]) {
    const Span ys = segment.row_points, xs = segment.column_points;
    if (segment.whole(points)) return transform_columns<0, points>(m, frequency, {0, points}, rows);
    if (xs.last < points)
        for (auto& row : rows) row[0] = row[points - 1] = Vector{};
    if (ys.last == points) return transform_columns<0, points>(m, frequency, xs, rows);
    ys.first == 0 ? transform_columns<0, points - 1>(m, frequency, xs, rows)
                  : transform_columns<1, points - 1>(m, frequency, xs, rows);
}

// A tile, height × width of which exist, from its half-transformed rows, whose first `skipped` outputs are not among
// them. The sums of a tile are kept in registers. Half lines wait in `lower` for the next vector of channels.
template <class T, int points, Output kind>
inline void write_tile(const Vector (&rows)[tile][points], const Destination& to, Index corner, Index height,
                       Index width, Index skipped, Leaky leaky, Channels& of, VectorHalves (&lower)[tile * tile]) {
    const Index pixel_stride = to.step * to.channels, row_stride = to.width * pixel_stride;
    T* const pixels = static_cast<T*>(to.pixels);
    Vector sum{}, square{};
    if (height == tile && width == tile && of.count >= lanes) {
        if (reads_pixels<kind>(to))  // of the next tile and the one below, too far apart for the processor to foresee
            for (int y = 0; y < tile; ++y)
                for (int x = 0; x < tile; ++x) {
                    fetch_beside<T, kind, 3>(to, corner + y * row_stride + (tile + x) * pixel_stride);
                    fetch_beside<T, kind, 2>(to, corner + (tile + y) * row_stride + x * pixel_stride);
                }
#pragma GCC unroll 4
        for (int y = 0; y < tile; ++y) {
            Vector v[tile];
            transform_output(rows[y], v);
#pragma GCC unroll 4
            for (int x = 0; x < tile; ++x) {
                const Index position = corner + y * row_stride + x * pixel_stride;
                const Vector value = output_at<T, kind, true>(v[x], to, position, leaky, of, sum, square);
                store_output<true>(pixels + position, value, to, of.count, lower + y * tile + x);
            }
        }
    } else {
        for (Index y = 0; y < height; ++y) {
            Vector v[tile];
            transform_output(rows[y], v);
#pragma GCC unroll 4
            for (int x = 0; x < tile; ++x) {  // so that v stays in registers
                if (x < skipped || x >= skipped + width) continue;
                const Index position = corner + y * row_stride + (x - skipped) * pixel_stride;
                const Vector value = output_at<T, kind, false>(v[x], to, position, leaky, of, sum, square);
                store_output<false>(pixels + position, value, to, of.count);
            }
        }
    }
    of.sum += sum;
    of.square += square;
}

template <int points, Output kind>
inline Vector tile_mean(const Vector (&rows)[tile][points], Index height, Index width, Index skipped, Leaky leaky,
                        Vector bias) {
    Vector sum{};
    for (Index y = 0; y < height; ++y) {
        Vector v[tile];
        transform_output(rows[y], v);
        for (Index x = skipped; x < skipped + width; ++x)
            sum += kind == Output::statistics ? v[x] + bias : leaky_relu(v[x] + bias, leaky);
    }
    return sum / static_cast<float>(height * width);
}

// y = Aᵀ m A of one phase of some segments' tiles, channels [begin, end), and the sums of them.
template <class T, int taps, Output kind>
void write_block(const Destination& to, Pixel phase, const Order& order, Index first_segment, Index last_segment,
                 Index begin, Index end, const Transformed& from, double* sums) {
    constexpr int points = points_of<taps>;
    const Tiles& tiles = order.tiles;
    const Leaky leaky = leaky_of<kind>(to);
    const Map map = phase_map(to, phase);
    const Index group = tiles.segment(first_segment).image / to.group_images;
    VectorHalves lower[tile * tile]{};
    for (Index strip = begin; strip < end; strip += strip_vectors * lanes) {
        const Index vectors = smaller(strip_vectors, ceiling(end - strip, lanes));
        Channels channels[strip_vectors];
        for (Index i = 0; i < vectors; ++i) channels[i] = channels_of<kind>(to, group, strip + i * lanes, end);
        Index pixels = 0;
        for (Index index = first_segment; index < last_segment; ++index) {
            const Segment segment = tiles.segment(index);
            const Index height = inside(map.height, segment.row), skipped = segment.column_points.first;
            const Index row = segment.image * to.height + to.step * segment.row * tile + phase.row;
            Index t = order.of(index);
            for (Index column = segment.column; column < segment.column + segment.tiles; ++column, ++t) {
                const Index width = inside(map.width, column);
                if (height * width == 0) continue;
                const Index corner = (row * to.width + to.step * column * tile + phase.column) * to.channels + strip;
                for (Index i = 0; i < vectors; ++i) {
                    const float* m = from.at(t, strip - begin + i * lanes);
                    Vector rows[tile][points];
                    transform_columns<points>(m, from.frequency, segment, rows);
                    Channels& of = channels[i];
                    if (takes_statistics<kind> && pixels == 0)  // deviations from a near mean: nothing cancels
                        of.pivot = tile_mean<points, kind>(rows, height, width, skipped, leaky, of.bias);
                    write_tile<T, points, kind>(rows, to, corner + i * lanes, height, width, skipped, leaky, of, lower);
                }
                pixels += height * width;
            }
        }
        keep_sums<kind>(channels, vectors, strip, pixels, to.channels, sums);
    }
}

using WriteBlock = void (*)(const Destination&, Pixel phase, const Order&, Index first_segment, Index last_segment,
                            Index begin, Index end, const Transformed&, double* sums);

template <int taps>
WriteBlock write_of(Dtype dtype, Output kind) {
    return for_output(dtype, kind, []<class T, Output of>() -> WriteBlock { return write_block<T, taps, of>; });
}

}  // namespace ganvas::cpu::GANVAS_ISA
