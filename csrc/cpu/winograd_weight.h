// The weight and its gradient, to and from the products. Included by kernel sources only.
#pragma once

#include "gemm.h"
#include "weight_taps.h"
#include "winograd_input.h"

namespace ganvas::cpu::GANVAS_ISA {

// A kernel of stride 2 is four of stride 1 (transformed_channels), each beginning half a stride of taps further on.
template <int step>
constexpr Index depth_of(const Taps& taps) {
    return transformed_channels<step>(taps.channels);
}

// Number k of a transformed pixel belongs to this channel and this phase.
template <int step>
constexpr Index channel_at(Index k) {
    return step == 1 ? k : k / (lanes * step * step) * lanes + k % lanes;
}
template <int step>
constexpr Index phase_at(Index k) {
    return step == 1 ? 0 : k / lanes % (step * step);
}
template <int step>
constexpr Index phase_offset(const Taps& taps, Index phase) {
    return phase / step * (taps.row / step) + phase % step * (taps.column / step);
}

template <int taps>
using Frequencies = Vector[points_of<taps> * points_of<taps>];

// U = G w Gᵀ of one channel of a block.
template <int taps>
[[gnu::always_inline]] inline void transform_taps(const TapBlock (&block)[taps * taps], Index k, Frequencies<taps>& u) {
    constexpr int points = points_of<taps>;
    Vector half[taps][points];
    for (int y = 0; y < taps; ++y) {
        Vector d[taps];
        for (int x = 0; x < taps; ++x) d[x] = block[y * taps + x][k];
        transform_taps(d, half[y]);
    }
    for (int x = 0; x < points; ++x) {
        Vector d[taps], v[points];
        for (int y = 0; y < taps; ++y) d[y] = half[y][x];
        transform_taps(d, v);
        for (int y = 0; y < points; ++y) u[y * points + x] = v[y];
    }
}

// Calls take(block, k, n, rows) for each block of the weight, channels k to k + rows and columns n to n + lanes, with k
// in [begin, end) and n in [panel, panel + width). `begin` is a multiple of `lanes`.
template <int taps, int step, class Take>
[[gnu::always_inline]] inline void for_each_block(const Taps& w, const float* values, Index begin, Index end,
                                                  Index panel, Index width, Take take) {
    for (Index k = begin; k < end; k += lanes) {
        const Index channel = channel_at<step>(k);
        const float* row = values + channel * w.k + phase_offset<step>(w, phase_at<step>(k));
        for (Index n = panel; n < panel + width; n += lanes) {
            TapBlock block[taps * taps];
            load_taps<taps>(w, row + n * w.n, smaller(lanes, w.channels - channel), smaller(lanes, w.columns - n),
                            block);
            take(block, k, n, smaller(lanes, end - k));
        }
    }
}

// U for k in [begin, end) and columns [panel, panel + width), as rows of `width`. Rows and columns past the weight's
// are zero.
template <int taps, int step>
void transform_weight(const Taps& w, const float* values, Index begin, Index end, Index panel, Index width, float* u,
                      Index frequency) {
    for_each_block<taps, step>(w, values, begin, end, panel, width,
                               [&](const TapBlock(&block)[taps* taps], Index first, Index n, Index rows) {
                                   for (Index k = 0; k < rows; ++k) {
                                       Frequencies<taps> v;
                                       transform_taps<taps>(block, k, v);
                                       float* destination = u + (first + k - begin) * width + (n - panel);
                                       for (int f = 0; f < points_of<taps> * points_of<taps>; ++f)
                                           store_vector(destination + f * frequency, v[f]);
                                   }
                               });
}

// dw = Gᵀ dU G for k in [begin, end) and columns [column, column + width). The rows of dU are `u_row` apart. `begin` is
// a multiple of `lanes`.
template <int taps, int step>
void write_weight_gradient(const Taps& w, float* values, Index begin, Index end, Index column, Index width,
                           const float* u, Index u_row, Index frequency) {
    constexpr int points = points_of<taps>;
    for (Index first = begin; first < end; first += lanes) {
        const Index channel = channel_at<step>(first), channels = smaller(lanes, w.channels - channel);
        float* row = values + channel * w.k + phase_offset<step>(w, phase_at<step>(first));
        for (Index n = column; n < column + width; n += lanes) {
            TapBlock block[taps * taps];
            for (Index k = 0; k < channels; ++k) {
                const float* from = u + (first + k - begin) * u_row + (n - column);
                Vector half[taps][points];
                for (int x = 0; x < points; ++x) {
                    Vector d[points], v[taps];
                    for (int y = 0; y < points; ++y) d[y] = load_vector(from + (y * points + x) * frequency);
                    transform_taps_grad(d, v);
                    for (int y = 0; y < taps; ++y) half[y][x] = v[y];
                }
                for (int y = 0; y < taps; ++y) {
                    Vector v[taps];
                    transform_taps_grad(half[y], v);
                    for (int x = 0; x < taps; ++x) block[y * taps + x][k] = v[x];
                }
            }
            store_taps<taps>(w, row + n * w.n, channels, smaller(lanes, w.columns - n), block);
        }
    }
}

}  // namespace ganvas::cpu::GANVAS_ISA
