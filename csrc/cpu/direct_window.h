// How two maps meet under a kernel, and how what they hold becomes the factors of matrix products.
//
// One of the maps is plain, the other is looked at through windows: along each axis pixel q of the plain one meets the
// pixels stride·q + offset + step·t of the other, one for each tap t. A convolution's output is plain and its input
// looked at; of a transposed convolution it is the other way round. With stride 1 both ways are true. Included by
// kernel sources only.
#pragma once

#include "convolution_output.h"
#include "gemm.h"
#include "weight_taps.h"

namespace ganvas::cpu::GANVAS_ISA {

// A window along one axis. Tap t is number tap + tap_step·t of the kernel's.
struct Along {
    Index count;  // taps
    Index stride, offset, step;
    Index tap, tap_step;

    Index kernel_tap(Index t) const { return tap + tap_step * t; }
    // The plain map's pixels, of `count`, whose `pixels` from `left` on are all among `length`.
    Span inside(Index left, Index pixels, Index length, Index count) const {
        const Index first = clamped(ceiling(larger(0, -left), stride), 0, count), last = length - pixels - left;
        return {first, last < 0 ? first : clamped(last / stride + 1, first, count)};
    }
    // The plain map's pixels that meet pixels [begin, end) of the other.
    Span meeting(Index begin, Index end, Index length) const {
        const Index reach = offset + step * (count - 1);
        return {clamped(ceiling(larger(0, begin - reach), stride), 0, length),
                clamped(end - 1 < offset ? 0 : (end - 1 - offset) / stride + 1, 0, length)};
    }
};

// A window onto `channels` channels. Its numbers are counted row by row, tap by tap, channel by channel; those of a run
// lie side by side in memory.
struct Window {
    Along y, x;
    Index channels;

    Index depth() const { return y.count * x.count * channels; }
    bool joins() const { return x.step == 1; }
    Index run() const { return (joins() ? x.count : 1) * channels; }
    Index runs_of_row() const { return joins() ? 1 : x.count; }
};

constexpr Along one_pixel{1, 1, 0, 1, 0, 1};

// A map, and a window for each pixel of a plain one.
struct Windowed {
    Source source;
    Index images;
    Window window;
    Index height, width;          // of the plain map
    const float* coefficients{};  // [G, 2, run + lanes]: scale and shift of a run's numbers, where there are any

    Index group_pixels() const { return source.group_images * height * width; }
    Index coefficient_floats() const { return 2 * (window.run() + lanes); }
    // Where an activation is pending, its coefficients are written to `floats`, [G, coefficient_floats()].
    void set_coefficients(float* floats, Index groups) {
        if (activation_of(source.pixels) == Activation::identity) return;
        coefficients = floats;
        const Index c = source.channels, run = window.run();
        for (Index group = 0; group < groups; ++group, floats += coefficient_floats())
            for (Index i = 0; i < run + lanes; ++i) {
                floats[i] = source.pixels.scale[group * c + i % c];
                floats[run + lanes + i] = source.pixels.shift[group * c + i % c];
            }
    }
};

constexpr Index short_run = 4 * lanes;
constexpr Index most_together = 96;  // numbers of a window that become pairs of windows

// How the numbers of a factor become words: one number, a pair of neighbours in a window, or of neighbouring windows.
enum class Packing { floats, number_pairs, window_pairs };

inline void store_numbers(float* to, Vector value) {
    store_vector(to, value);
}
#if defined(__AVX512F__)
inline void store_numbers(std::uint16_t* to, Vector value) {
    const VectorHalves halves = nearest_bfloat16(value);
    std::memcpy(to, &halves, sizeof halves);
}
#endif

// Whole vectors are written: up to `lanes` numbers past the end, which what comes after overwrites.
template <class Number>
inline void pack_zeros(Index begin, Index end, Number* to) {
    for (Index i = begin; i < end; i += lanes) store_numbers(to + i, Vector{});
}

// What runs are packed from and with.
template <class T>
struct Runs {
    const T* limit;             // none is read past it
    const float* coefficients;  // scales and shifts
    Index run;
    Leaky leaky;

    template <Activation kind>
    Vector activated(Vector stored, Index i) const {
        if constexpr (kind == Activation::identity) return stored;
        return activate<kind>(stored, load_vector(coefficients + i), load_vector(coefficients + run + lanes + i),
                              leaky);
    }
};

// Numbers [begin, end) of a run whose pixels are all inside the map.
template <Activation kind, class T, class Number>
inline void pack_run(const Runs<T>& runs, const T* stored, Index begin, Index end, Number* to) {
    for (Index i = begin; i < end; i += lanes) {
        const Vector values =
            stored + i + lanes <= runs.limit ? load_vector(stored + i) : load_lanes(stored + i, end - i);
        store_numbers(to + i, runs.template activated<kind>(values, i));
    }
}

// The same of `count` windows, `step` numbers apart, in rows of `width`, where no vector reaches past the limit. Short
// runs go vector by vector, so that each has its coefficients in registers; fetched meanwhile is what lies `below`, in
// the next row of windows, since the processor foresees little of such strides.
template <Activation kind, class T, class Number>
inline void pack_inner_runs(const Runs<T>& runs, const T* stored, Index step, Index below, Index count, Index begin,
                            Index end, Number* to, Index width) {
    if (end - begin > short_run) {
        for (Index x = 0; x < count; ++x, stored += step, to += width)
            for (Index i = begin; i < end; i += lanes)
                store_numbers(to + i, runs.template activated<kind>(load_vector(stored + i), i));
        return;
    }
    for (Index i = begin; i < end; i += lanes) {
        const T* from = stored + i;
        Number* into = to + i;
        for (Index x = 0; x < count; ++x, from += step, into += width) {
            prefetch<2>(from + below);
            store_numbers(into, runs.template activated<kind>(load_vector(from), i));
        }
    }
}

// Numbers [begin, end) of `count` windows of one group, in rows `width` numbers apart, which is `lanes` more than there
// are at least.
template <class T, Activation kind, class Number>
void pack_windows(const Windowed& from, Index first, Index count, Index begin, Index end, Number* rows, Index width) {
    const Window& w = from.window;
    const Source& source = from.source;
    const Index run = w.run(), runs_of_row = w.runs_of_row(), c = w.channels, step = w.x.stride * c;
    const Runs<T> runs{source.image<T>(from.images),
                       from.coefficients + first / from.group_pixels() * from.coefficient_floats(), run,
                       Leaky(source.pixels.negative_slope)};
    Index qx = first % from.width, qy = first / from.width % from.height, image = first / from.width / from.height;
    for (Index row = 0; row < count;) {
        const Index stretch = smaller(count - row, from.width - qx);  // windows of one row of the plain map
        const T* const pixels = source.image<T>(image);
        Index number = begin / run, within = begin % run;
        for (Index k = begin; k < end; ++number, within = 0) {
            const Index until = smaller(run, within + end - k);
            const Index y = w.y.stride * qy + w.y.offset + w.y.step * (number / runs_of_row);
            const Index left = w.x.stride * qx + w.x.offset + w.x.step * (number % runs_of_row);
            Number* const to = rows + (k - begin) - within;  // where the run would begin
            const bool inside = y >= 0 && y < source.height;
            const T* const line = pixels + y * source.width * c;
            // Of the stretch those whose run is inside the map, and far enough from the memory's end.
            Index inner = stretch, inner_end = stretch;
            if (inside) {
                const Span whole = w.x.inside(left, run / c, source.width, stretch);
                inner = whole.first, inner_end = whole.last;
                while (inner_end > inner && line + left * c + (inner_end - 1) * step + until + lanes > runs.limit)
                    --inner_end;
            }
            const auto pack_one = [&](Index x) {
                const Index column = left + x * w.x.stride;
                Index from_inside = until, until_inside = until;
                if (inside) {
                    from_inside = clamped(-column * c, within, until);
                    until_inside = clamped((source.width - column) * c, from_inside, until);
                }
                pack_zeros(within, from_inside, to + x * width);
                pack_run<kind>(runs, line + column * c, from_inside, until_inside, to + x * width);
                pack_zeros(until_inside, until, to + x * width);
            };
            for (Index x = 0; x < inner; ++x) pack_one(x);
            pack_inner_runs<kind>(runs, line + left * c + inner * step, step, w.y.stride * source.width * c,
                                  inner_end - inner, within, until, to + inner * width, width);
            for (Index x = inner_end; x < stretch; ++x) pack_one(x);
            k += until - within;
        }
        row += stretch;
        rows += stretch * width;
        qx += stretch;
        if (qx < from.width) continue;
        qx = 0;
        if (++qy < from.height) continue;
        qy = 0, ++image;
    }
}

// The same as rows of `width` words.
template <class T, Packing packing, Activation kind>
void pack_words(const Windowed& from, Index first, Index count, Index begin, Index end, float* words, Index width) {
    if constexpr (packing == Packing::floats) {
        pack_windows<T, kind>(from, first, count, begin, end, words, width);
    } else if constexpr (packing == Packing::number_pairs) {
        pack_windows<T, kind>(from, first, count, begin, end, reinterpret_cast<std::uint16_t*>(words), 2 * width);
    } else {
        std::uint16_t pair[2][most_together + lanes];
        for (Index row = 0; row < count; row += 2, words += width) {
            const Index here = smaller(2, count - row);
            pack_windows<T, kind>(from, first + row, here, begin, end, pair[0], most_together + lanes);
            for (Index i = 0; i < end - begin; i += lanes) {
                VectorBits bits = load_halves(pair[0] + i);
                if (here == 2) bits |= load_halves(pair[1] + i) << 16;
                std::memcpy(words + i, &bits, sizeof bits);
            }
        }
    }
}

using PackWords = void (*)(const Windowed&, Index first, Index count, Index begin, Index end, float* words,
                           Index width);

template <class T, Packing packing>
PackWords pack_words_of(Activation kind) {
    return for_activation(kind, []<Activation of>() -> PackWords { return pack_words<T, packing, of>; });
}

template <Packing packing>
PackWords pack_words_of(Dtype dtype, const PendingActivation& pixels) {
    return dtype == Dtype::float32 ? pack_words_of<float, packing>(activation_of(pixels))
                                   : pack_words_of<bfloat16, packing>(activation_of(pixels));
}

// Whether the windows are the words of a factor as they lie in memory: one pixel each.
template <Elements elements>
bool lie_packed(const Windowed& of, Dtype dtype) {
    const Window& w = of.window;
    if (w.depth() != w.channels || w.y.stride != 1 || w.x.stride != 1 || w.y.offset != 0 || w.x.offset != 0)
        return false;
    if (of.height != of.source.height || of.width != of.source.width) return false;
    if (activation_of(of.source.pixels) != Activation::identity) return false;
    if (elements == Elements::floats) return dtype == Dtype::float32;
    return dtype == Dtype::bfloat16 && w.channels % 2 == 0 &&
           reinterpret_cast<std::uintptr_t>(of.source.pixels.stored) % alignof(float) == 0;
}

}  // namespace ganvas::cpu::GANVAS_ISA
