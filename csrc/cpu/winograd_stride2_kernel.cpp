// 4×4 convolutions of stride 2 and their transposes. Compiled once per instruction set.
//
// Both join a large map to a small one, and a kernel of stride 2 is four kernels of 2×2 taps and stride 1. From large
// to small, each of them takes a phase of the large map, its pixels 2m + a, and the products add up. From small to
// large, each of them makes a phase.
#include "convolutions.h"
#include "winograd_pass.h"
#include "winograd_weight_gradient.h"

namespace ganvas::cpu::GANVAS_ISA {
namespace {

constexpr int taps = 2;

// small[o] = Σ_i w[i]·large[2o + i − padding]
Walk gather(const Taps& w, const float* values, Index padding) {
    return {w, 1, {{{-padding, -padding}, {0, 0}, values}}};
}

// large[2m + a] = Σ_i w[i]·small[(2m + a + padding − i) / 2]: of the taps, those of the parity of a + padding. The
// first pixel that is read meets the last of them.
Walk scatter(const Taps& w, const float* values, Index padding) {
    Walk walk{{w.channels, w.columns, w.k, w.n, -w.row, -w.column}, 4, {}};
    for (Index phase = 0; phase < 4; ++phase) {
        const Pixel pixel{phase / 2, phase % 2};
        const Pixel shifted{pixel.row + padding, pixel.column + padding};
        walk.phases[phase] = {{shifted.row / 2 - 1, shifted.column / 2 - 1},
                              pixel,
                              values + (shifted.row % 2 + 2) * (w.row / 2) + (shifted.column % 2 + 2) * (w.column / 2)};
    }
    return walk;
}

// Two taps along each axis, every other one of the kernel's.
Taps taps_of(const ConvolutionWeight& w, Index channels, Index columns, Index k, Index n) {
    return {channels, columns, k, n, 2 * w.row, 2 * w.column};
}

Taps forward_taps(const ConvolutionShape& s, const ConvolutionWeight& w) {
    return taps_of(w, s.in_channels, s.out_channels, w.in, w.out);
}

Taps backward_taps(const ConvolutionShape& s, const ConvolutionWeight& w) {
    return taps_of(w, s.out_channels, s.in_channels, w.out, w.in);
}

// t = M w along one axis, or Mᵀ d.
template <int from, int to, class Coefficient>
[[gnu::always_inline]] inline void combine(const Vector (&values)[from], Vector (&sums)[to], Coefficient coefficient) {
    for (int i = 0; i < to; ++i) {
        sums[i] = Vector{};
        for (int j = 0; j < from; ++j) sums[i] += coefficient(i, j) * values[j];
    }
}

// Both axes of a square of vectors.
template <int from, int to, class Coefficient>
[[gnu::always_inline]] inline void combine_both(const Vector (&values)[from][from], Vector (&sums)[to][to],
                                                Coefficient coefficient) {
    Vector half[to][from];
    for (int x = 0; x < from; ++x) {
        Vector column[from], combined[to];
        for (int y = 0; y < from; ++y) column[y] = values[y][x];
        combine(column, combined, coefficient);
        for (int y = 0; y < to; ++y) half[y][x] = combined[y];
    }
    for (int y = 0; y < to; ++y) combine(half[y], sums[y], coefficient);
}

// Calls take(k, n, channels, columns) for blocks of at most `lanes` of the input's channels and of the output's.
template <class Take>
void for_each_channel_block(const FoldedWeight& args, int threads, Take take) {
    const Index blocks = ceiling(args.in_channels, lanes), columns = ceiling(args.out_channels, lanes);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index block = 0; block < blocks * columns; ++block) {
        const Index k = block / columns * lanes, n = block % columns * lanes;
        take(k, n, smaller(lanes, args.in_channels - k), smaller(lanes, args.out_channels - n));
    }
}

Taps taps3x3(const FoldedWeight& args) {
    const ConvolutionWeight& w = args.weight;
    return {args.in_channels, args.out_channels, w.in, w.out, w.row, w.column};
}

}  // namespace

void fold_weight(const FoldedWeight& args, int threads) {
    const Taps w = taps3x3(args);
    for_each_channel_block(args, threads, [&](Index k, Index n, Index channels, Index columns) {
        TapBlock block[9];
        load_taps<3>(w, args.weight.values + k * w.k + n * w.n, channels, columns, block);
        for (Index i = 0; i < channels; ++i) {
            Vector from[3][3], to[4][4];
            for (int tap = 0; tap < 9; ++tap) from[tap / 3][tap % 3] = block[tap][i];
            combine_both(from, to, [&](int row, int column) { return args.rows[row][column]; });
            for (Index tap = 0; tap < 16; ++tap)
                store_lanes(args.kernel + (tap * args.in_channels + k + i) * args.out_channels + n,
                            to[tap / 4][tap % 4], columns);
        }
    });
}

void unfold_gradient(const FoldedWeight& args, float* gradient, int threads) {
    const Taps w = taps3x3(args);
    for_each_channel_block(args, threads, [&](Index k, Index n, Index channels, Index columns) {
        TapBlock block[9];
        for (Index i = 0; i < channels; ++i) {
            Vector from[4][4], to[3][3];
            for (Index tap = 0; tap < 16; ++tap)
                from[tap / 4][tap % 4] =
                    load_lanes(args.kernel + (tap * args.in_channels + k + i) * args.out_channels + n, columns);
            combine_both(from, to, [&](int row, int column) { return args.rows[column][row]; });
            for (int tap = 0; tap < 9; ++tap) block[tap][i] = to[tap / 3][tap % 3];
        }
        store_taps<3>(w, gradient + k * w.k + n * w.n, channels, columns, block);
    });
}

void winograd_stride2_forward(const ConvolutionForward& args, int threads) {
    const ConvolutionShape& s = args.shape;
    forward<taps, 2>(args, gather(forward_taps(s, args.weight), args.weight.values, s.padding), threads);
}

void winograd_stride2_backward_input(const ConvolutionBackwardInput& args, int threads) {
    const ConvolutionShape& s = args.shape;
    backward_input<taps, 1>(args, scatter(backward_taps(s, args.weight), args.weight.values, s.padding), threads);
}

void winograd_stride2_backward_weight(const ConvolutionBackwardWeight& args, int threads) {
    const ConvolutionShape& s = args.shape;
    weight_gradient<taps, 2>({input_of(args),
                              {-s.padding, -s.padding},
                              grad_output_of(args),
                              forward_taps(s, args.layout),
                              args.grad_weight,
                              s.dtype,
                              s.integers},
                             s.batch, threads);
}

void winograd_stride2_transposed_forward(const ConvolutionForward& args, int threads) {
    const ConvolutionShape& s = args.shape;
    forward<taps, 1>(args, scatter(forward_taps(s, args.weight), args.weight.values, s.padding), threads);
}

void winograd_stride2_transposed_backward_input(const ConvolutionBackwardInput& args, int threads) {
    const ConvolutionShape& s = args.shape;
    backward_input<taps, 2>(args, gather(backward_taps(s, args.weight), args.weight.values, s.padding), threads);
}

void winograd_stride2_transposed_backward_weight(const ConvolutionBackwardWeight& args, int threads) {
    const ConvolutionShape& s = args.shape;
    weight_gradient<taps, 2>({grad_output_of(args),
                              {-s.padding, -s.padding},
                              input_of(args),
                              backward_taps(s, args.layout),
                              args.grad_weight,
                              s.dtype,
                              s.integers},
                             s.batch, threads);
}

}  // namespace ganvas::cpu::GANVAS_ISA
