// What the convolution kernels read and write beside pixels and weights: pending activations and batch statistics.
// Tensors lie channels-last: [N, H, W, C]. The batch is `groups` equal consecutive parts with statistics of their own.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace ganvas::cpu {

// A kernel along one axis.
struct KernelAxis {
    std::int64_t size, stride, padding, dilation, output_padding;
};

struct ConvolutionShape {
    Dtype dtype;    // of every tensor of pixels; weights and per-channel values are float32
    bool integers;  // products may be coarser: of 16-bit integers (winograd_factors.h), or of bfloat16 numbers
    std::int64_t batch;
    std::int64_t height, width;              // of the input
    std::int64_t out_height, out_width;      // H', W'
    std::int64_t in_channels, out_channels;  // Ci, Co
    std::int64_t padding;                    // zeros around the activation
    std::int64_t groups;                     // G
    // What the convolution is by its definition, of the kernels that take any:
    KernelAxis rows, columns;
    bool transposed;
};

// An activation that was never written: lrelu(scale*y + shift), or scale*lrelu(y) + shift if the activation comes
// first. Without scale and shift it is y.
struct PendingActivation {
    const void* stored;  // y: [N, H, W, C]
    const float* scale;  // [G, C] or null
    const float* shift;  // [G, C] or null
    float negative_slope;
    bool activation_first;
};

// weight[co*out + ci*in + ky*row + kx*column], strides in elements.
struct ConvolutionWeight {
    const float* values;
    std::int64_t out, in, row, column;
};

// Batch statistics of a convolution's output, and what the next layer needs of them. `scale` null: no statistics.
struct OutputStatistics {
    const float* weight;  // γ: [C] or null: 1
    const float* bias;    // β: [C] or null: 0
    float eps;
    bool activation_first;  // the statistics are those of lrelu(y)
    float negative_slope;
    float* running_mean;  // [C] or null; moved by `momentum` towards each group's statistics, in order
    float* running_var;
    float momentum;
    float* mean;   // [G, C]
    float* var;    // [G, C], biased
    float* scale;  // [G, C]: γ/√(var + eps)
    float* shift;  // [G, C]: β − mean·scale
};

struct ConvolutionForward {
    ConvolutionShape shape;
    PendingActivation input;
    ConvolutionWeight weight;
    const float* bias;  // [Co] or null
    void* output;       // [N, H', W', Co]
    OutputStatistics statistics;
    // With a scale and no statistics: what is written instead of the raw output. Its `stored` is what is added to the
    // norm, or last, to the activation: like the output, or null.
    PendingActivation activation;
    bool adds_last;
    bool evaluates;  // nothing is trained: the next call's weight may well be the same
};

// The gradient of the input's pending activation: g = dL/d(scale*y + shift), or dL/d(activation) if that comes first,
// and the sums that the layer before needs for its own gradients. With no scale, dL/dy.
// Where the activation was `written` before it was read, the kink is told from that, and other gradients of it `added`.
struct ConvolutionBackwardInput {
    ConvolutionShape shape;
    const void* grad_output;  // [N, H', W', Co]
    ConvolutionWeight weight;
    PendingActivation input;
    const float* mean;     // [G, Ci] or null: of the normalised value; needed for sum_deviation
    void* grad_input;      // [N, H, W, Ci]
    float* sum;            // [G, Ci] or null: Σg
    float* sum_deviation;  // [G, Ci] or null: Σg·(x − mean)
    const void* added;     // with no scale, or beside `written`: what is added to the gradient, like it, or null
    const void* written;   // [N, H, W, Ci]: lrelu(scale*x + shift + what was added), or null
};

struct ConvolutionBackwardWeight {
    ConvolutionShape shape;
    PendingActivation input;
    const void* grad_output;  // [N, H', W', Co]
    float* grad_weight;       // strides as the weight's
    ConvolutionWeight layout;
};

// Values per group and channel that BatchNorm's input gradient is made of (GradientCoefficients in statistics.h).
constexpr std::int64_t gradient_coefficients = 4;

}  // namespace ganvas::cpu
