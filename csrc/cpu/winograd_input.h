// From pixels to transformed tiles. Included by kernel sources only.
#pragma once

#include "convolution.h"
#include "winograd_tiles.h"

namespace ganvas::cpu::GANVAS_ISA {

enum class Activation { identity, affine_kink, kink_affine };

inline Activation activation_of(const PendingActivation& pending) {
    if (!pending.scale) return Activation::identity;
    return pending.activation_first ? Activation::kink_affine : Activation::affine_kink;
}

// A tensor that holds the values themselves.
inline PendingActivation written(const void* values) {
    return {values, nullptr, nullptr, 1.0f, false};
}

template <Activation kind>
[[gnu::always_inline]] inline Vector activate(Vector y, Vector scale, Vector shift, Leaky leaky) {
    return kind == Activation::identity ? y
                                        : pending_activation<kind == Activation::kink_affine>(y, scale, shift, leaky);
}

// Pixels that are read: [images, height, width, channels].
struct Source {
    PendingActivation pixels;
    Index height, width, channels;
    Index group_images;

    template <class T>
    const T* image(Index index) const {
        return static_cast<const T*>(pixels.stored) + index * height * width * channels;
    }
    Index per_channel(Index image) const { return image / group_images * channels; }
};

struct Pixel {
    Index row, column;
};

// Numbers that the transform makes of a pixel's channels: a kernel of stride 2 is one of stride 1 on each of the four
// phases of the image, pixels 2m + a, and their products add up. Phases lie side by side, one vector of channels after
// the other.
template <int step>
constexpr Index transformed_channels(Index channels) {
    return step == 1 ? channels : whole_vectors(channels) * step * step;
}

// V = Bᵀ a B of a segment's tiles, the first of which is number `first` of `to`. Tap i of the first output reads pixel
// origin + i*step + phase.
template <class T, int taps, int step, Activation kind>
void transform_segment(const Source& source, Pixel origin, const Segment& segment, const Transformed& to, Index first) {
    constexpr int points = points_of<taps>;
    Vector columns[step * (segment_limit * tile + taps - 1)][points];
    const T* image = source.image<T>(segment.image);
    const float* scales = source.pixels.scale + source.per_channel(segment.image);
    const float* shifts = source.pixels.shift + source.per_channel(segment.image);
    const Leaky leaky(source.pixels.negative_slope);
    const Index top = step * segment.row * tile + origin.row, left = step * segment.column * tile + origin.column;
    const Index width = step * (segment.tiles * tile + taps - 1);
    const Index row_stride = source.width * source.channels;
    const Index begin = clamped(-left, 0, width), end = clamped(source.width - left, begin, width);
    for (Index x = 0; x < width; ++x)
        if (x < begin || x >= end)
            for (Vector& v : columns[x]) v = Vector{};

    for (Index c = 0; c < source.channels; c += lanes) {
        const Index count = source.channels - c;
        Vector scale{}, shift{};
        if (kind != Activation::identity) scale = load_lanes(scales + c, count), shift = load_lanes(shifts + c, count);
        for (int row_phase = 0; row_phase < step; ++row_phase) {
            const Index start = top + row_phase;
            const Index from = ceiling(larger(0, -start), step);  // points inside the image
            const Index until = smaller(points, ceiling(larger(0, source.height - start), step));
            for (Index x = begin; x < end; ++x) {
                const T* pixel = image + start * row_stride + (left + x) * source.channels + c;
                Vector d[points];
                if (from == 0 && until == points && count >= lanes) {
                    for (int y = 0; y < points; ++y) prefetch(pixel + y * step * row_stride + lanes);
                    for (int y = 0; y < points; ++y)
                        d[y] = activate<kind>(load_vector(pixel + y * step * row_stride), scale, shift, leaky);
                } else {
                    for (int y = 0; y < points; ++y)
                        d[y] = y < from || y >= until ? Vector{}
                                                      : activate<kind>(load_lanes(pixel + y * step * row_stride, count),
                                                                       scale, shift, leaky);
                }
                transform_input(d, columns[x]);
            }
            for (Index t = 0; t < segment.tiles; ++t)
                for (int column_phase = 0; column_phase < step; ++column_phase) {
                    float* destination = to.at(first + t, c * step * step + (row_phase * step + column_phase) * lanes);
                    for (int y = 0; y < points; ++y) {
                        Vector d[points], v[points];
                        for (int x = 0; x < points; ++x) d[x] = columns[(t * tile + x) * step + column_phase][y];
                        transform_input(d, v);
                        for (int x = 0; x < points; ++x)
                            store_vector(destination + (y * points + x) * to.frequency, v[x]);
                    }
                }
        }
    }
}

// D = A a Aᵀ of a segment's tiles: the output's side of the weight's gradient.
template <class T, int taps, Activation kind>
void transform_output_segment(const Source& source, const Segment& segment, const Transformed& to, Index first) {
    constexpr int points = points_of<taps>;
    Vector columns[segment_limit * tile][points];
    const T* image = source.image<T>(segment.image);
    const float* scales = source.pixels.scale + source.per_channel(segment.image);
    const float* shifts = source.pixels.shift + source.per_channel(segment.image);
    const Leaky leaky(source.pixels.negative_slope);
    const Index top = segment.row * tile, left = segment.column * tile, width = segment.tiles * tile;
    const Index row_stride = source.width * source.channels;
    for (Index c = 0; c < source.channels; c += lanes) {
        const Index count = source.channels - c;
        Vector scale{}, shift{};
        if (kind != Activation::identity) scale = load_lanes(scales + c, count), shift = load_lanes(shifts + c, count);
        for (Index x = 0; x < width; ++x) {
            const T* pixel = image + top * row_stride + (left + x) * source.channels + c;
            Vector d[tile];
            for (int y = 0; y < tile; ++y) prefetch(pixel + y * row_stride + lanes);
            for (int y = 0; y < tile; ++y)
                d[y] = left + x < source.width && top + y < source.height
                           ? activate<kind>(load_lanes(pixel + y * row_stride, count), scale, shift, leaky)
                           : Vector{};
            transform_output_grad(d, columns[x]);
        }
        for (Index t = 0; t < segment.tiles; ++t) {
            float* destination = to.at(first + t, c);
            for (int y = 0; y < points; ++y) {
                Vector d[tile], v[points];
                for (int x = 0; x < tile; ++x) d[x] = columns[t * tile + x][y];
                transform_output_grad(d, v);
                for (int x = 0; x < points; ++x) store_vector(destination + (y * points + x) * to.frequency, v[x]);
            }
        }
    }
}

using TransformSegment = void (*)(const Source&, Pixel origin, const Segment&, const Transformed&, Index first);
using TransformOutputSegment = void (*)(const Source&, const Segment&, const Transformed&, Index first);

template <class T, int taps, int step>
TransformSegment transform_of(Activation kind) {
    switch (kind) {
        case Activation::affine_kink:
            return transform_segment<T, taps, step, Activation::affine_kink>;
        case Activation::kink_affine:
            return transform_segment<T, taps, step, Activation::kink_affine>;
        default:
            return transform_segment<T, taps, step, Activation::identity>;
    }
}

template <int taps, int step>
TransformSegment transform_of(Dtype dtype, Activation kind) {
    return dtype == Dtype::float32 ? transform_of<float, taps, step>(kind) : transform_of<bfloat16, taps, step>(kind);
}

template <class T, int taps>
TransformOutputSegment transform_output_of(Activation kind) {
    switch (kind) {
        case Activation::affine_kink:
            return transform_output_segment<T, taps, Activation::affine_kink>;
        case Activation::kink_affine:
            return transform_output_segment<T, taps, Activation::kink_affine>;
        default:
            return transform_output_segment<T, taps, Activation::identity>;
    }
}

template <int taps>
TransformOutputSegment transform_output_of(Dtype dtype, Activation kind) {
    return dtype == Dtype::float32 ? transform_output_of<float, taps>(kind) : transform_output_of<bfloat16, taps>(kind);
}

}  // namespace ganvas::cpu::GANVAS_ISA
