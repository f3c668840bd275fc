// The weight and its gradient, to and from the products. Included by kernel sources only.
#pragma once

#include "gemm.h"
#include "winograd_input.h"

namespace ganvas::cpu::GANVAS_ISA {

// values[k*k_stride + n*n_stride + y*row + x*column]: channels k are summed over, columns n are the output's channels.
// A kernel of stride 2 is four of stride 1 (transformed_channels), each beginning half a stride of taps further on.
struct Taps {
    Index channels, columns;
    Index k, n, row, column;  // strides
};

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

// U = G w Gᵀ for k in [begin, end) and columns [panel, panel + width), as rows of `width`. Rows and columns past the
// weight's are zero.
template <int taps, int step>
void transform_weight(const Taps& w, const float* values, Index begin, Index end, Index panel, Index width, float* u,
                      Index frequency) {
    constexpr int points = points_of<taps>;
    for (Index k = begin; k < end; ++k) {
        const Index channel = channel_at<step>(k);
        const float* row = values + channel * w.k + phase_offset<step>(w, phase_at<step>(k));
        for (Index n = panel; n < panel + width; n += lanes) {
            float gathered[taps * taps][lanes] = {};
            const Index count = channel < w.channels ? smaller(lanes, w.columns - n) : 0;
            for (Index lane = 0; lane < count; ++lane)
                for (int y = 0; y < taps; ++y)
                    for (int x = 0; x < taps; ++x)
                        gathered[y * taps + x][lane] = row[(n + lane) * w.n + y * w.row + x * w.column];
            Vector rows[taps][points];
            for (int y = 0; y < taps; ++y) {
                Vector d[taps];
                for (int x = 0; x < taps; ++x) d[x] = load_vector(gathered[y * taps + x]);
                transform_taps(d, rows[y]);
            }
            float* destination = u + (k - begin) * width + (n - panel);
            for (int x = 0; x < points; ++x) {
                Vector d[taps], v[points];
                for (int y = 0; y < taps; ++y) d[y] = rows[y][x];
                transform_taps(d, v);
                for (int y = 0; y < points; ++y) store_vector(destination + (y * points + x) * frequency, v[y]);
            }
        }
    }
}

// dw = Gᵀ dU G for k in [begin, end) and columns [column, column + width). The rows of dU are `u_row` apart.
template <int taps, int step>
void write_weight_gradient(const Taps& w, float* values, Index begin, Index end, Index column, Index width,
                           const float* u, Index u_row, Index frequency) {
    constexpr int points = points_of<taps>;
    for (Index k = begin; k < end; ++k) {
        const Index channel = channel_at<step>(k);
        if (channel >= w.channels) continue;
        float* row = values + channel * w.k + phase_offset<step>(w, phase_at<step>(k));
        for (Index n = 0; n < width; n += lanes) {
            const float* from = u + (k - begin) * u_row + n;
            Vector half[taps][points];
            for (int x = 0; x < points; ++x) {
                Vector d[points], v[taps];
                for (int y = 0; y < points; ++y) d[y] = load_vector(from + (y * points + x) * frequency);
                transform_taps_grad(d, v);
                for (int y = 0; y < taps; ++y) half[y][x] = v[y];
            }
            const Index count = smaller(lanes, w.columns - column - n);
            for (int y = 0; y < taps; ++y) {
                Vector v[taps];
                transform_taps_grad(half[y], v);
                for (int x = 0; x < taps; ++x)
                    for (Index lane = 0; lane < count; ++lane)
                        row[(column + n + lane) * w.n + y * w.row + x * w.column] = v[x][lane];
            }
        }
    }
}

}  // namespace ganvas::cpu::GANVAS_ISA
