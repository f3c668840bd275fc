// A convolution's weight as it lies in memory, a block of channels at a time. Included by kernel sources only.
#pragma once

#include "gemm.h"
#include "vector.h"

namespace ganvas::cpu::GANVAS_ISA {

// values[k*k_stride + n*n_stride + y*row + x*column]: channels k are summed over, columns n are the output's channels.
struct Taps {
    Index channels, columns;
    Index k, n, row, column;  // strides
};

// One tap of `lanes` channels k, a vector of columns n each.
using TapBlock = Vector[lanes];

// Visits the weight in the order in which it lies in memory: the taps of `channels` channels from `first` on and
// `columns` columns, at most `lanes` of each. Of a vector along the columns (or the channels) only that many lanes
// exist.
template <int taps, class ByColumns, class ByChannels, class Single>
[[gnu::always_inline]] inline void walk_taps(const Taps& w, Index channels, Index columns, ByColumns by_columns,
                                             ByChannels by_channels, Single single) {
    if (w.n == 1) {
        for (Index k = 0; k < channels; ++k)
            for (int tap = 0; tap < taps * taps; ++tap)
                by_columns(tap, k, k * w.k + tap / taps * w.row + tap % taps * w.column);
    } else if (w.k == 1) {
        for (int tap = 0; tap < taps * taps; ++tap) by_channels(tap, tap / taps * w.row + tap % taps * w.column);
    } else {
        for (Index n = 0; n < columns; ++n)
            for (Index k = 0; k < channels; ++k)
                for (int tap = 0; tap < taps * taps; ++tap)
                    single(tap, k, n, n * w.n + k * w.k + tap / taps * w.row + tap % taps * w.column);
    }
}

// Taps and columns that there are not are zero.
template <int taps>
void load_taps(const Taps& w, const float* first, Index channels, Index columns, TapBlock (&block)[taps * taps]) {
    if (channels < lanes || columns < lanes)
        for (TapBlock& tap : block)
            for (Vector& v : tap) v = Vector{};
    walk_taps<taps>(
        w, channels, columns, [&](int tap, Index k, Index at) { block[tap][k] = load_lanes(first + at, columns); },
        [&](int tap, Index at) {
            for (Index n = 0; n < columns; ++n) {
                const float* along = first + at + n * w.n;
                prefetch<2>(along + lanes);  // rows a power of two apart would drive each other out of the first level
                block[tap][n] = load_lanes(along, channels);
            }
            transpose(block[tap]);
        },
        [&](int tap, Index k, Index n, Index at) { reinterpret_cast<float*>(&block[tap][k])[n] = first[at]; });
}

template <int taps>
void store_taps(const Taps& w, float* first, Index channels, Index columns, TapBlock (&block)[taps * taps]) {
    walk_taps<taps>(
        w, channels, columns, [&](int tap, Index k, Index at) { store_lanes(first + at, block[tap][k], columns); },
        [&](int tap, Index at) {
            transpose(block[tap]);
            for (Index n = 0; n < columns; ++n) store_lanes(first + at + n * w.n, block[tap][n], channels);
        },
        [&](int tap, Index k, Index n, Index at) { first[at] = reinterpret_cast<const float*>(&block[tap][k])[n]; });
}

// Rows of words of `count` rows of numbers, `pitch` apart.
template <Elements elements>
void store_rows(const float* numbers, Index pitch, Index count, Index width, float* words, Index row_stride) {
    constexpr Index step = elements == Elements::floats ? 1 : 2;
    for (Index i = 0; i < count; i += step, numbers += step * pitch, words += row_stride)
        for (Index j = 0; j < width; j += lanes) {
            const Vector first = load_vector(numbers + j);
            if constexpr (elements == Elements::floats) store_vector(words + j, first);
#if defined(__AVX512F__)
            if constexpr (elements == Elements::bfloat16_pairs) {
                VectorBits bits = widened(nearest_bfloat16(first));
                if (i + 1 < count) bits |= widened(nearest_bfloat16(load_vector(numbers + pitch + j))) << 16;
                std::memcpy(words + j, &bits, sizeof bits);
            }
#endif
        }
}

}  // namespace ganvas::cpu::GANVAS_ISA
