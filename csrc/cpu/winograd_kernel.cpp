// 3×3 convolutions of stride 1. Compiled once per instruction set.
#include "convolutions.h"
#include "winograd_pass.h"
#include "winograd_weight_gradient.h"

namespace ganvas::cpu::GANVAS_ISA {
namespace {

constexpr int taps = 3, step = 1;

}  // namespace

void winograd_forward(const ConvolutionForward& args, int threads) {
    const ConvolutionShape& s = args.shape;
    const ConvolutionWeight& w = args.weight;
    const Walk walk{{s.in_channels, s.out_channels, w.in, w.out, w.row, w.column},
                    1,
                    {{{-s.padding, -s.padding}, {0, 0}, w.values}}};
    forward<taps, step>(args, walk, threads);
}

// The kernel is turned by half a circle, and the channels change places.
void winograd_backward_input(const ConvolutionBackwardInput& args, int threads) {
    const ConvolutionShape& s = args.shape;
    const ConvolutionWeight& w = args.weight;
    const Index padding = taps - 1 - s.padding;
    const Walk walk{{s.out_channels, s.in_channels, w.out, w.in, -w.row, -w.column},
                    1,
                    {{{-padding, -padding}, {0, 0}, w.values + (taps - 1) * (w.row + w.column)}}};
    backward_input<taps, step>(args, walk, threads);
}

void winograd_backward_weight(const ConvolutionBackwardWeight& args, int threads) {
    const ConvolutionShape& s = args.shape;
    const ConvolutionWeight& w = args.layout;
    weight_gradient<taps, step>({input_of(args),
                                 {-s.padding, -s.padding},
                                 grad_output_of(args),
                                 {s.in_channels, s.out_channels, w.in, w.out, w.row, w.column},
                                 args.grad_weight,
                                 s.dtype,
                                 s.integers},
                                s.batch, threads);
}

}  // namespace ganvas::cpu::GANVAS_ISA
