// BatchNorm and LeakyReLU in one pass over memory, in either order. Rows are pixels, channels are innermost (NHWC).
//
//   conv_bn_act                     output = lrelu(scale*x + shift)
//   conv_bn_act with a residual     output = lrelu(scale*x + shift + residual), or lrelu(scale*x + shift) + residual
//   conv_act_bn (activation_first)  output = scale*lrelu(x) + shift
//
//   scale = weight/sqrt(var + eps), shift = bias - mean*scale
//
// The rows are `groups` equal consecutive parts, each with statistics of its own.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "isa.h"

namespace ganvas::cpu {

struct BatchNormShape {
    Dtype dtype;
    std::int64_t rows;      // all groups together
    std::int64_t channels;  // C
    std::int64_t groups;    // G
    float eps;
    float negative_slope;
    bool activation_first;
};

struct BatchNormForward {
    BatchNormShape shape;
    const void* input;    // [rows, C]
    const float* weight;  // [C] or null: 1
    const float* bias;    // [C] or null: 0
    bool training;        // batch statistics are computed and written; otherwise mean and var are read
    float* mean;          // [G, C]
    float* var;           // [G, C], biased
    float* running_mean;  // [C] or null; in training moved by `momentum` towards each group's statistics, in order
    float* running_var;   // [C] or null; likewise, with Bessel's correction
    float momentum;
    const void* residual;  // [rows, C] or null
    bool adds_last;        // the residual is added to the activation
    void* output;          // [rows, C]
};

struct BatchNormBackward {
    BatchNormShape shape;
    const void* grad_output;  // [rows, C]
    const void* input;        // [rows, C]
    const float* weight;      // [C] or null: 1
    const float* bias;        // [C] or null: 0
    const float* mean;        // [G, C]
    const float* var;         // [G, C]
    bool training;            // otherwise mean and var are constants
    void* grad_input;         // [rows, C]
    float* grad_weight;       // [C]
    float* grad_bias;         // [C]
    // With a residual, and the activation behind it. The side of the kink is told by the output's sign (slopes >= 0).
    // The alternatives cost more: the residual is as large, but the output is what the next layer keeps anyway; a byte
    // per element would have to be written and kept. The first pass writes the gradient after the kink, which is the
    // residual's, and the second one reads that in place of grad_output: the output is read once.
    const void* output;   // [rows, C], what the forward pass wrote; null without a residual
    void* grad_residual;  // [rows, C]; null without a residual
};

// What statistics that are given make of a norm: one row of channels for each group.
struct BatchNormCoefficients {
    std::int64_t channels, groups;
    float eps;
    const float* weight;  // [C] or null: 1
    const float* bias;    // [C] or null: 0
    const float* mean;    // [G, C]
    const float* var;     // [G, C]
    float* scale;         // [G, C]
    float* shift;         // [G, C]
};

void batch_norm_coefficients(const BatchNormCoefficients& args);
void batch_norm_leaky_relu_forward(const BatchNormForward& args, int threads);
void batch_norm_leaky_relu_backward(const BatchNormBackward& args, int threads);

// What the kernels are handed beside their arguments: memory and the decisions that do not depend on the instruction
// set.
struct BatchNormWorkspace {
    int threads;
    std::int64_t pack;   // rows handled as one, so that few channels still fill the vector registers
    bool stream;         // the result goes past the cache
    double* partial;     // [threads, G, 2, C]: mean and sum of squared deviations, or the two sums of the backward pass
    float* coefficient;  // [G, coefficients_per_group, pack*C]
    float* block;        // [threads, block_floats]
};

constexpr std::int64_t coefficients_per_group = 5;
constexpr std::int64_t block_bytes = 64 << 10;         // a block is read twice: the second time from the L2 cache
constexpr std::int64_t stream_buffer_bytes = 8 << 10;  // results wait in the L1 cache before they are streamed out

constexpr std::int64_t write_piece_bytes = 256 << 10;

// Float32 scratch of one thread: three accumulators of a packed row, or a buffer of at least one packed row.
constexpr std::int64_t block_floats(std::int64_t width) {
    return 3 * width + stream_buffer_bytes / 4;
}

#define DECLARE(isa)                                                                          \
    namespace isa {                                                                           \
    void batch_norm_leaky_relu_forward(const BatchNormForward&, const BatchNormWorkspace&);   \
    void batch_norm_leaky_relu_backward(const BatchNormBackward&, const BatchNormWorkspace&); \
    }
GANVAS_FOR_EACH_ISA(DECLARE)
#undef DECLARE

}  // namespace ganvas::cpu
