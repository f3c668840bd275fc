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

Source input_of(const ConvolutionBackwardWeight& args) {
    const ConvolutionShape& s = args.shape;
    return {args.input, s.height, s.width, s.in_channels, s.batch / s.groups};
}

Source grad_output_of(const ConvolutionBackwardWeight& args) {
    const ConvolutionShape& s = args.shape;
    return {written(args.grad_output), s.out_height, s.out_width, s.out_channels, s.batch / s.groups};
}

}  // namespace

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
