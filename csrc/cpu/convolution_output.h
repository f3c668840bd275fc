// What the convolutions have in common: maps and pending activations as they are loaded, pixels as they are stored, and
// the sums that are kept of them. Sums are taken of parts, each a number of pixels of one group, and joined in order.
// Included by kernel sources only.
#pragma once

#include "convolution.h"
#include "parallel.h"
#include "vector.h"

namespace ganvas::cpu::GANVAS_ISA {

enum class Activation { identity, affine_kink, kink_affine };

inline Activation activation_of(const PendingActivation& pending) {
    if (!pending.scale) return Activation::identity;
    return pending.activation_first ? Activation::kink_affine : Activation::affine_kink;
}

// make<kind>() of the activation.
template <class Make>
auto for_activation(Activation kind, Make make) {
    switch (kind) {
        case Activation::affine_kink:
            return make.template operator()<Activation::affine_kink>();
        case Activation::kink_affine:
            return make.template operator()<Activation::kink_affine>();
        default:
            return make.template operator()<Activation::identity>();
    }
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

template <class Args>
Source input_of(const Args& args) {
    const ConvolutionShape& s = args.shape;
    return {args.input, s.height, s.width, s.in_channels, s.batch / s.groups};
}

template <class Args>
Source grad_output_of(const Args& args) {
    const ConvolutionShape& s = args.shape;
    return {written(args.grad_output), s.out_height, s.out_width, s.out_channels, s.batch / s.groups};
}

struct Pixel {
    Index row, column;
};

// What happens to an output value before it is stored, and which sums are kept of it.
enum class Output {
    plain,
    added,
    statistics,
    activation_statistics,
    activated,
    activated_first,
    affine_kink,
    kink_affine,
    written_kink
};

// make<T, kind>() of the type of the pixels, and the output.
template <class Make>
auto for_output(Dtype dtype, Output kind, Make make) {
    const auto of_type = [&]<class T>() {
        switch (kind) {
            case Output::added:
                return make.template operator()<T, Output::added>();
            case Output::statistics:
                return make.template operator()<T, Output::statistics>();
            case Output::activation_statistics:
                return make.template operator()<T, Output::activation_statistics>();
            case Output::activated:
                return make.template operator()<T, Output::activated>();
            case Output::activated_first:
                return make.template operator()<T, Output::activated_first>();
            case Output::affine_kink:
                return make.template operator()<T, Output::affine_kink>();
            case Output::kink_affine:
                return make.template operator()<T, Output::kink_affine>();
            case Output::written_kink:
                return make.template operator()<T, Output::written_kink>();
            default:
                return make.template operator()<T, Output::plain>();
        }
    };
    return dtype == Dtype::float32 ? of_type.template operator()<float>() : of_type.template operator()<bfloat16>();
}

// Where results go: [images, height, width, channels]. Of each phase, pixels step*m + phase, the tiles are those of a
// map of its own.
struct Destination {
    void* pixels;
    Index height, width, channels;
    Index group_images;
    Index step;
    const float* bias;          // [channels] or null
    PendingActivation pending;  // forward: what is written; backward: of the tensor whose gradient this is; or with no
                                // scale what is added
    const float* mean;          // backward: [G, channels] or null
    float negative_slope;       // forward: of the activation that the statistics come after
    bool streams;               // past the cache, where whole lines are written
    const void *added, *written;  // backward, with a kink that is told from what was written
    bool adds_last;               // forward: to the activation, not to what it is of
};

inline bool streams(const Destination& to, Dtype dtype, Index images) {
    const bool is_float = dtype == Dtype::float32;
    const Index number = is_float ? sizeof(float) : sizeof(bfloat16);
    return (is_float ? vector_is_line : two_vectors_are_line()) &&
           goes_past_cache(to.pixels, images * to.height * to.width, to.channels * number);
}

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
constexpr bool activates = kind == Output::activated || kind == Output::activated_first;
template <Output kind>
constexpr bool goes_backward =
    kind == Output::affine_kink || kind == Output::kink_affine || kind == Output::written_kink;

// What a forward pass writes.
inline Output output_of(const OutputStatistics& statistics, const PendingActivation& activation) {
    if (statistics.scale) return statistics.activation_first ? Output::activation_statistics : Output::statistics;
    if (activation.scale) return activation.activation_first ? Output::activated_first : Output::activated;
    return Output::plain;
}

// What a backward pass writes, and what that is read beside.
inline Output output_of(const ConvolutionBackwardInput& args) {
    if (!args.input.scale) return args.added ? Output::added : Output::plain;
    if (args.written) return Output::written_kink;
    return args.input.activation_first ? Output::kink_affine : Output::affine_kink;
}

inline PendingActivation beside_of(const ConvolutionBackwardInput& args) {
    return args.input.scale ? args.input : written(args.added);
}

inline Destination destination_of(const ConvolutionForward& args, Index step = 1) {
    const ConvolutionShape& s = args.shape;
    Destination to{args.output, s.out_height, s.out_width,     s.out_channels, s.batch / s.groups,
                   step,        args.bias,    args.activation, nullptr,        args.statistics.negative_slope,
                   false,       nullptr,      nullptr,         args.adds_last};
    to.streams = streams(to, s.dtype, s.batch);
    return to;
}

inline Destination destination_of(const ConvolutionBackwardInput& args, Index step = 1) {
    const ConvolutionShape& s = args.shape;
    Destination to{args.grad_input, s.height,  s.width, s.in_channels, s.batch / s.groups, step,         nullptr,
                   beside_of(args), args.mean, 1.0f,    false,         args.added,         args.written, false};
    to.streams = streams(to, s.dtype, s.batch);
    return to;
}

template <Output kind>
inline Leaky leaky_of(const Destination& to) {
    return Leaky(activates<kind> || goes_backward<kind> ? to.pending.negative_slope : to.negative_slope);
}

// Whether pixels are read beside those that are written.
template <Output kind>
inline bool reads_pixels(const Destination& to) {
    return goes_backward<kind> || kind == Output::added || (activates<kind> && to.pending.stored);
}

// Fetches what is read beside the pixel at `position`.
template <class T, Output kind, int locality>
inline void fetch_beside(const Destination& to, Index position) {
    const auto fetch = [&](const void* pixels) { prefetch<locality>(static_cast<const T*>(pixels) + position); };
    fetch(to.pending.stored);
    if (kind == Output::written_kink) {
        fetch(to.written);
        if (to.added) fetch(to.added);
    }
}

template <Output kind>
inline Channels channels_of(const Destination& to, Index group, Index begin, Index end) {
    const Index at = group * to.channels + begin;
    Channels of{};
    of.count = end - begin;
    if (to.bias) of.bias = load_lanes(to.bias + begin, of.count);
    if (activates<kind> || goes_backward<kind>) {
        of.scale = load_lanes(to.pending.scale + at, of.count);
        of.shift = load_lanes(to.pending.shift + at, of.count);
        if (to.mean) of.mean = load_lanes(to.mean + at, of.count);
    }
    return of;
}

// What is stored at `position` of a vector of products, which is added to the sums.
template <class T, Output kind, bool whole>
inline __attribute__((always_inline)) Vector output_at(Vector value, const Destination& to, Index position, Leaky leaky,
                                                       const Channels& of, Vector& sum, Vector& square) {
    value += of.bias;
    const auto beside = [&](const void* pixels) {
        const T* at = static_cast<const T*>(pixels) + position;
        return whole ? load_vector(at) : load_lanes(at, of.count);
    };
    if (kind == Output::added) value += beside(to.pending.stored);
    if (activates<kind>) {
        const bool last = to.pending.stored && to.adds_last;
        const Vector shift = to.pending.stored && !last ? of.shift + beside(to.pending.stored) : of.shift;
        value = pending_activation<kind == Output::activated_first>(value, of.scale, shift, leaky);
        if (last) value += beside(to.pending.stored);
    }
    if (goes_backward<kind>) {
        const Vector x = beside(to.pending.stored);
        if (kind == Output::written_kink) {
            if (to.added) value += beside(to.added);
            value = leaky_relu_grad(value, beside(to.written), leaky);
            square += value * (x - of.mean);
        } else if (kind == Output::affine_kink) {
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
    return value;
}

// Half lines go past the cache where `lower` is given.
template <bool whole>
inline __attribute__((always_inline)) void store_output(float* pixel, Vector value, const Destination& to, Index count,
                                                        VectorHalves* = nullptr) {
    if (!whole) return store_lanes(pixel, value, count);
    to.streams ? stream_vector(pixel, value) : store_vector(pixel, value);
}

template <bool whole>
inline __attribute__((always_inline)) void store_output(bfloat16* pixel, Vector value, const Destination& to,
                                                        Index count, VectorHalves* lower = nullptr) {
    if (!whole) return store_lanes(pixel, value, count);
    if (to.streams && lower != nullptr) return stream_half(pixel, value, *lower);
    store_vector(pixel, value);
}

constexpr Index run_rows = 8;  // pixels whose sums are kept in registers

// Stores a vector of channels of `count` pixels, the first at `position` and others `step` numbers apart, and adds to
// its sums.
template <class T, Output kind, bool whole>
inline void write_run(const Destination& to, Index position, Index step, Index count, const float* products,
                      Index products_row, Leaky leaky, Channels& of) {
    const Channels own = of;
    Vector sum{}, square{};
    for (Index i = 0; i < count; ++i, position += step, products += products_row) {
        if (reads_pixels<kind>(to))  // a later run's, too far apart for the processor to foresee
            fetch_beside<T, kind, 2>(to, position + 3 * run_rows * step);
        const Vector value = output_at<T, kind, whole>(load_vector(products), to, position, leaky, own, sum, square);
        store_output<whole>(static_cast<T*>(to.pixels) + position, value, to, own.count);
    }
    of.sum += sum;
    of.square += square;
}

template <Output kind>
Vector mean_of(const float* products, Index products_row, Index count, Leaky leaky, Vector bias) {
    Vector sum{};
    for (Index row = 0; row < count; ++row) {
        const Vector value = load_vector(products + row * products_row) + bias;
        sum += kind == Output::statistics ? value : leaky_relu(value, leaky);
    }
    return sum / static_cast<float>(count);
}

// The channels of a strip's vectors, of which `products` has the first `count` pixels.
template <Output kind>
void begin_channels(const Destination& to, Index group, Index begin, Index end, const float* products,
                    Index products_row, Index count, Leaky leaky, Channels* channels) {
    for (Index i = 0; begin + i * lanes < end; ++i) {
        channels[i] = channels_of<kind>(to, group, begin + i * lanes, end);
        if (takes_statistics<kind>)  // deviations from a near mean: nothing cancels
            channels[i].pivot = mean_of<kind>(products + i * lanes, products_row, smaller(count, 2 * run_rows), leaky,
                                              channels[i].bias);
    }
}

// Stores `vectors` of channels of `count` pixels, a few pixels of each in turn.
template <class T, Output kind>
void write_runs(const Destination& to, Index position, Index step, Index count, Index vectors, const float* products,
                Index products_row, Leaky leaky, Channels* channels) {
    for (Index row = 0; row < count; row += run_rows)
        for (Index i = 0; i < vectors; ++i) {
            const auto write = channels[i].count >= lanes ? write_run<T, kind, true> : write_run<T, kind, false>;
            write(to, position + row * step + i * lanes, step, smaller(run_rows, count - row),
                  products + row * products_row + i * lanes, products_row, leaky, channels[i]);
        }
}

// Two numbers per channel of a strip's: mean and squared deviations, or Σg and Σg·(x − mean), of so many pixels.
template <Output kind>
void keep_sums(const Channels* strip, Index vectors, Index begin, Index pixels, Index channels, double* sums) {
    if (!takes_statistics<kind> && !goes_backward<kind>) return;
    const double n = static_cast<double>(larger(1, pixels));
    for (Index i = 0; i < vectors; ++i) {
        const Channels& of = strip[i];
        for (Index lane = 0; lane < smaller(lanes, of.count); ++lane) {
            const Index c = begin + i * lanes + lane;
            const double s = static_cast<double>(of.sum[lane]), q = static_cast<double>(of.square[lane]);
            sums[c] = takes_statistics<kind> ? static_cast<double>(of.pivot[lane]) + s / n : s;
            sums[channels + c] = takes_statistics<kind> ? q - s * s / n : q;
        }
    }
}

// The sums of the parts, as finish_statistics and finish_sums take them.
template <class Cut>
struct PartSums {
    const Cut& cut;
    Index channel_count;
    double* values;  // [part, 2, channels]

    static std::size_t bytes(const Cut& cut, Index channels) {
        return static_cast<std::size_t>(cut.count * 2 * channels) * sizeof(double);
    }
    Index channels() const { return channel_count; }
    Index groups() const { return cut.count / cut.per_group; }
    Index per_group() const { return cut.per_group; }
    double* of(Index part) const { return values + part * 2 * channel_count; }
    double* of_group(Index group) const { return of(group * cut.per_group); }
    double pixels(Index part) const { return static_cast<double>(cut.last(part) - cut.first(part)); }
};

// A thread's share of the channels of every group, once it has stored its last pixel: sums of the group's first part
// become those of all its parts.
template <class Parts, class Finish>
void finish_slice(const Destination& to, const Parts& parts, Finish finish, Index thread, Index team) {
    if (to.streams) stream_fence();
    const Index channels = parts.channels();
    for (Index group = 0; group < parts.groups(); ++group)
        finish(parts, group, channels * thread / team, channels * (thread + 1) / team);
}

template <class Parts>
void finish_statistics(const OutputStatistics& s, const Parts& parts, Index group, Index begin, Index end) {
    const Index channels = parts.channels(), first = group * parts.per_group();
    double* const mean = parts.of_group(group);
    double* const deviation = mean + channels;
    double count = parts.pixels(first);
    for (Index part = 1; part < parts.per_group(); ++part) {
        const double pixels = parts.pixels(first + part);
        const double* other = mean + part * 2 * channels;
        const Join join(count, pixels);
        for (Index c = begin; c < end; ++c) join(mean[c], deviation[c], other[c], other[channels + c]);
        count += pixels;
    }
    for (Index c = begin; c < end; ++c) {
        const Index at = group * channels + c;
        s.mean[at] = static_cast<float>(mean[c]);
        s.var[at] = static_cast<float>(deviation[c] / count);
        if (s.running_mean) {
            move(s.running_mean[c], mean[c], s.momentum);
            move(s.running_var[c], deviation[c] / (count > 1 ? count - 1 : 1), s.momentum);
        }
        s.scale[at] = (s.weight ? s.weight[c] : 1.0f) * inverse_deviation(s.var[at], s.eps);
        s.shift[at] = (s.bias ? s.bias[c] : 0.0f) - s.mean[at] * s.scale[at];
    }
}

template <class Parts>
void finish_sums(const ConvolutionBackwardInput& args, const Parts& parts, Index group, Index begin, Index end) {
    const Index channels = parts.channels();
    double* const sum = parts.of_group(group);
    double* const sum_deviation = sum + channels;
    for (Index part = 1; part < parts.per_group(); ++part) {
        const double* other = sum + part * 2 * channels;
        for (Index c = begin; c < end; ++c) sum[c] += other[c], sum_deviation[c] += other[channels + c];
    }
    for (Index c = begin; c < end; ++c) {
        args.sum[group * channels + c] = static_cast<float>(sum[c]);
        if (args.sum_deviation) args.sum_deviation[group * channels + c] = static_cast<float>(sum_deviation[c]);
    }
}

// What a pass calls once its pixels are stored.
inline auto finish_of(const ConvolutionForward& args) {
    return [&statistics = args.statistics](const auto& parts, Index group, Index begin, Index end) {
        if (statistics.scale) finish_statistics(statistics, parts, group, begin, end);
    };
}

inline auto finish_of(const ConvolutionBackwardInput& args) {
    return [&args](const auto& parts, Index group, Index begin, Index end) {
        if (args.input.scale && args.sum) finish_sums(args, parts, group, begin, end);
    };
}

}  // namespace ganvas::cpu::GANVAS_ISA
