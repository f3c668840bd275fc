// From products to pixels, with what the next layer, or the one before, needs to know of them. Included by kernel
// sources only.
#pragma once

#include "winograd_input.h"

namespace ganvas::cpu::GANVAS_ISA {

// What happens to an output value before it is stored, and which sums are kept of it.
enum class Output { plain, statistics, activation_statistics, affine_kink, kink_affine };

// Where results go: [images, height, width, channels]. Of each phase, pixels step*m + phase, the tiles are those of a
// map of its own.
struct Destination {
    void* pixels;
    Index height, width, channels;
    Index group_images;
    Index step;
    const float* bias;          // [channels] or null
    PendingActivation pending;  // backward: of the tensor whose gradient this is
    const float* mean;          // backward: [G, channels] or null
    float negative_slope;       // forward: of the activation that the statistics come after
    bool streams;               // past the cache, where whole vectors are written

    Map phase_map(Pixel phase) const {
        return {ceiling(height - phase.row, step), ceiling(width - phase.column, step)};
    }
};

constexpr int strip_vectors =
    64 / lanes;  // of channels: written one after the other, so that a pixel's lines are filled together

// Per-channel values of a vector of the output's channels, and the sums kept of it.
struct Channels {
    Index count;  // of the vector's lanes that exist
    Vector bias, scale, shift, mean;
    Vector pivot, sum, square;
};

template <Output kind>
constexpr bool takes_statistics = kind == Output::statistics || kind == Output::activation_statistics;
template <Output kind>
constexpr bool goes_backward = kind == Output::affine_kink || kind == Output::kink_affine;

template <Output kind>
inline Channels channels_of(const Destination& to, Index group, Index begin, Index end) {
    const Index at = group * to.channels + begin;
    Channels of{};
    of.count = end - begin;
    if (to.bias) of.bias = load_lanes(to.bias + begin, of.count);
    if (goes_backward<kind>) {
        of.scale = load_lanes(to.pending.scale + at, of.count);
        of.shift = load_lanes(to.pending.shift + at, of.count);
        if (to.mean) of.mean = load_lanes(to.mean + at, of.count);
    }
    return of;
}

template <class T, Output kind, bool whole>
inline __attribute__((always_inline)) void emit(Vector value, const Destination& to, Index position, Leaky leaky,
                                                const Channels& of, Vector& sum, Vector& square) {
    value += of.bias;
    if (goes_backward<kind>) {
        const T* stored = static_cast<const T*>(to.pending.stored) + position;
        const Vector x = whole ? load_vector(stored) : load_lanes(stored, of.count);
        if (kind == Output::affine_kink) {
            value = leaky_relu_grad(value, of.scale * x + of.shift, leaky);
            square += value * (x - of.mean);
        } else {
            square += value * (leaky_relu(x, leaky) - of.mean);
        }
        sum += value;
    }
    if (takes_statistics<kind>) {
        const Vector d = (kind == Output::statistics ? value : leaky_relu(value, leaky)) - of.pivot;
        sum += d;
        square += d * d;
    }
    T* pixel = static_cast<T*>(to.pixels) + position;
    if (!whole) return store_lanes(pixel, value, of.count);
    to.streams ? stream_vector(pixel, value) : store_vector(pixel, value);
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
// them. The sums of a tile are kept in registers.
template <class T, int points, Output kind>
inline void write_tile(const Vector (&rows)[tile][points], const Destination& to, Index corner, Index height,
                       Index width, Index skipped, Leaky leaky, Channels& of) {
    const Index pixel_stride = to.step * to.channels, row_stride = to.width * pixel_stride;
    Vector sum{}, square{};
    if (height == tile && width == tile && of.count >= lanes) {
        if (goes_backward<kind>)  // the next tile's, too far apart for the processor to foresee
            for (int y = 0; y < tile; ++y)
                for (int x = 0; x < tile; ++x)
                    prefetch(static_cast<const T*>(to.pending.stored) + corner + y * row_stride +
                             (tile + x) * pixel_stride);
#pragma GCC unroll 4
        for (int y = 0; y < tile; ++y) {
            Vector v[tile];
            transform_output(rows[y], v);
#pragma GCC unroll 4
            for (int x = 0; x < tile; ++x)
                emit<T, kind, true>(v[x], to, corner + y * row_stride + x * pixel_stride, leaky, of, sum, square);
        }
    } else {
        for (Index y = 0; y < height; ++y) {
            Vector v[tile];
            transform_output(rows[y], v);
#pragma GCC unroll 4
            for (int x = 0; x < tile; ++x)  // so that v stays in registers
                if (x >= skipped && x < skipped + width)
                    emit<T, kind, false>(v[x], to, corner + y * row_stride + (x - skipped) * pixel_stride, leaky, of,
                                         sum, square);
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

// y = Aᵀ m A of one phase of some segments' tiles, channels [begin, end). Two numbers per channel are kept of them:
// mean and squared deviations, or Σg and Σg·(x − mean).
template <class T, int taps, Output kind>
void write_block(const Destination& to, Pixel phase, const Order& order, Index first_segment, Index last_segment,
                 Index begin, Index end, const Transformed& from, double* sums) {
    constexpr int points = points_of<taps>;
    const Tiles& tiles = order.tiles;
    const Leaky leaky(goes_backward<kind> ? to.pending.negative_slope : to.negative_slope);
    const Map map = to.phase_map(phase);
    const Index group = tiles.segment(first_segment).image / to.group_images;
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
                    write_tile<T, points, kind>(rows, to, corner + i * lanes, height, width, skipped, leaky, of);
                }
                pixels += height * width;
            }
        }
        if (kind == Output::plain) continue;
        const double n = static_cast<double>(larger(1, pixels));
        for (Index i = 0; i < vectors; ++i) {
            const Channels& of = channels[i];
            for (Index lane = 0; lane < smaller(lanes, of.count); ++lane) {
                const Index c = strip + i * lanes + lane;
                const double s = static_cast<double>(of.sum[lane]), q = static_cast<double>(of.square[lane]);
                sums[c] = takes_statistics<kind> ? static_cast<double>(of.pivot[lane]) + s / n : s;
                sums[to.channels + c] = takes_statistics<kind> ? q - s * s / n : q;
            }
        }
    }
}

using WriteBlock = void (*)(const Destination&, Pixel phase, const Order&, Index first_segment, Index last_segment,
                            Index begin, Index end, const Transformed&, double* sums);

template <class T, int taps>
WriteBlock write_of(Output kind) {
    switch (kind) {
        case Output::statistics:
            return write_block<T, taps, Output::statistics>;
        case Output::activation_statistics:
            return write_block<T, taps, Output::activation_statistics>;
        case Output::affine_kink:
            return write_block<T, taps, Output::affine_kink>;
        case Output::kink_affine:
            return write_block<T, taps, Output::kink_affine>;
        default:
            return write_block<T, taps, Output::plain>;
    }
}

template <int taps>
WriteBlock write_of(Dtype dtype, Output kind) {
    return dtype == Dtype::float32 ? write_of<float, taps>(kind) : write_of<bfloat16, taps>(kind);
}

}  // namespace ganvas::cpu::GANVAS_ISA
