// The native convolutions. Those named by their kernel are computed by Winograd's F(4×4, 3×3) and F(4×4, 2×2), which
// need 2.25 and 1.56 multiplications per output and channel pair rather than 9 and 4 (Lavin & Gray 2016, "Fast
// algorithms for convolutional neural networks"). The direct ones take any kernel, stride, padding and dilation.
//
// A 3×3 convolution of stride 2, or before average pooling, or after nearest-neighbour upsampling, is a 4×4 convolution
// of stride 2 (or its transpose) with the kernel M w Mᵀ, M a 4×3 matrix. The gradient of w is Mᵀ d M, d that of the
// kernel.
//
// Where they may and the processor has AVX512-VNNI, Winograd's products are of 16-bit integers (winograd_factors.h),
// whose error is less than that of rounding to bfloat16; direct products are of bfloat16 numbers with AVX512-BF16. A
// processor with AMX computes all of them by their definition then, in tiles of bfloat16 (amx_kernel.cpp).
#pragma once

#include "convolution.h"
#include "isa.h"

namespace ganvas::cpu {

// By torch's names. Numbers are those of the enumeration in Python.
enum class ConvolutionKind {
    direct,
    conv3x3,            // stride 1, padding 0, 1 or 2
    conv4x4,            // stride 2, padding 0, 1 or 2
    conv_transpose4x4,  // likewise, without output padding
    // Padding 1:
    conv3x3_even,       // stride 2, of maps with even sides
    conv3x3_odd,        // stride 2, of maps with odd sides
    conv3x3_avg_pool2,  // stride 1, then the mean of each 2×2
    upsample2_conv3x3,  // stride 1, of a map each of whose pixels is repeated 2×2
    count
};

// A convolution of inputs of one shape. The groups of its shape are 1.
struct Convolution {
    ConvolutionKind kind;
    ConvolutionShape shape;

    // `shape` with all but the output's sides. Throws std::invalid_argument where there is no such convolution.
    Convolution(ConvolutionKind kind, const ConvolutionShape& shape);

    // The shape, for parts of the batch with statistics of their own. Throws std::invalid_argument where they are none.
    ConvolutionShape grouped(std::int64_t groups) const;

    // Shapes in the arguments are those that grouped() makes; weights are the convolution's as torch has it.
    void forward(ConvolutionForward args, int threads) const;
    void backward_input(ConvolutionBackwardInput args, int threads) const;
    void backward_weight(ConvolutionBackwardWeight args, int threads) const;
};

// Of the pixels that are read, and of those that come out.
std::int64_t input_bytes(const ConvolutionShape& shape);
std::int64_t output_bytes(const ConvolutionShape& shape);

// M w Mᵀ of every pair of channels, or back.
struct FoldedWeight {
    const float (*rows)[3];                  // M: [4][3]
    std::int64_t in_channels, out_channels;  // Ci, Co
    ConvolutionWeight weight;                // w, or where its gradient goes
    float* kernel;                           // [4][4][Ci][Co]
};

#define DECLARE_KERNELS(name)                                                 \
    void name##_forward(const ConvolutionForward&, int threads);              \
    void name##_backward_input(const ConvolutionBackwardInput&, int threads); \
    void name##_backward_weight(const ConvolutionBackwardWeight&, int threads);
#define DECLARE(isa)                                                         \
    namespace isa {                                                          \
    DECLARE_KERNELS(direct)                                                  \
    DECLARE_KERNELS(winograd)                                                \
    DECLARE_KERNELS(winograd_stride2)                                        \
    DECLARE_KERNELS(winograd_stride2_transposed)                             \
    void fold_weight(const FoldedWeight&, int threads);                      \
    void unfold_gradient(const FoldedWeight&, float* gradient, int threads); \
    }
GANVAS_FOR_EACH_ISA(DECLARE)
#undef DECLARE
#if defined(__x86_64__)
namespace avx512 {
DECLARE_KERNELS(amx)
}
#endif
#undef DECLARE_KERNELS

}  // namespace ganvas::cpu
