// The families of convolutions. All but the first are computed by Winograd's F(4×4, 3×3) and F(4×4, 2×2), which need
// 2.25 and 1.56 multiplications per output and channel pair rather than 9 and 4 (Lavin & Gray 2016, "Fast algorithms
// for convolutional neural networks").
//
//   conv1x1_                      1×1 kernels of stride 1 or, where the output is the smaller map, 2
//   winograd_                     3×3 kernels of stride 1
//   winograd_stride2_             4×4 kernels of stride 2, as four 2×2 kernels
//   winograd_stride2_transposed_  their transposes, without output padding
//
// Padding is 0, 1 or 2, of 1×1 kernels 0. Where they may and the processor has AVX512-VNNI, Winograd's products are of
// 16-bit integers (winograd_factors.h), whose error is less than that of rounding to bfloat16; those of 1×1 kernels are
// of bfloat16 numbers with AVX512-BF16.
#pragma once

#include "convolution.h"
#include "isa.h"

namespace ganvas::cpu {

#define DECLARE_KIND(name)                                                         \
    void name##_forward(const ConvolutionForward& args, int threads);              \
    void name##_backward_input(const ConvolutionBackwardInput& args, int threads); \
    void name##_backward_weight(const ConvolutionBackwardWeight& args, int threads);
#define DECLARE_KINDS              \
    DECLARE_KIND(conv1x1)          \
    DECLARE_KIND(winograd)         \
    DECLARE_KIND(winograd_stride2) \
    DECLARE_KIND(winograd_stride2_transposed)
#define DECLARE(isa) \
    namespace isa {  \
    DECLARE_KINDS    \
    }
DECLARE_KINDS
GANVAS_FOR_EACH_ISA(DECLARE)
#undef DECLARE
#undef DECLARE_KINDS
#undef DECLARE_KIND

}  // namespace ganvas::cpu
