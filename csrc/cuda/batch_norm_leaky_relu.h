// BatchNorm and LeakyReLU on a GPU, in either order, with a residual or without. All addresses are device memory. Rows
// are pixels, channels are innermost (NHWC).
//
//   conv_bn_act                     output = lrelu(scale*x + shift)
//   conv_bn_act with a residual     output = lrelu(scale*x + shift + residual)
//   conv_act_bn (activation_first)  output = scale*lrelu(x) + shift
//
//   scale = weight/sqrt(var + eps), shift = bias - mean*scale
//
// The rows are `groups` equal consecutive parts, each with statistics of its own. Forward with batch statistics reads
// the input twice and writes the output, backward reads two arrays twice and writes one (with a residual it reads the
// output once more and writes the residual's gradient too). Small arrays take one launch, others three; there are no
// atomics, so one device gives one input the same bits each time.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "device.h"

namespace ganvas::cuda {

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
    void* output;          // [rows, C]
    float* workspace;      // batch_norm_workspace_floats; unused unless training
};

// The first half of the forward pass in training, for an activation that stays pending: the input is read once.
struct BatchStatistics {
    BatchNormShape shape;
    const void* input;    // [rows, C]
    const float* weight;  // [C] or null: 1
    const float* bias;    // [C] or null: 0
    float* running_mean;  // as in BatchNormForward
    float* running_var;
    float momentum;
    float* mean;       // [G, C]
    float* var;        // [G, C], biased
    float* scale;      // [G, C] or null
    float* shift;      // [G, C] or null
    float* workspace;  // batch_statistics_workspace_floats
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
    // With a residual, and the activation behind it, the output's sign tells the side of the kink (slopes >= 0). The
    // first pass writes the gradient after the kink, which is the residual's, and the second one reads that.
    const void* output;   // [rows, C], what the forward pass wrote; null without a residual
    void* grad_residual;  // [rows, C]; null without a residual
    float* workspace;     // batch_norm_workspace_floats
};

// The second half of the backward pass, where a convolution's backward pass has done the first: it left
// g = dL/d(scale*x + shift) and the sums of it. Here x is y, or lrelu(y) if the activation comes first.
struct PendingGradient {
    BatchNormShape shape;
    bool training;        // batch statistics
    void* grad;           // [rows, C]: g; becomes dL/dy
    const void* stored;   // [rows, C]: y
    const float* weight;  // [C] or null: 1
    const float* mean;    // [G, C]
    const float* var;     // [G, C]
    const float* sums;    // [2, G, C]: Σg and Σg·(x − mean)
    float* grad_weight;   // [C]
    float* grad_bias;     // [C]
};

// Scratch of a forward or a backward pass. Its contents need not be kept or cleared between calls.
std::int64_t batch_norm_workspace_floats(const BatchNormShape& shape, int device);
std::int64_t batch_statistics_workspace_floats(const BatchNormShape& shape, int device);

// Enqueue the kernels. Throw std::runtime_error, naming the kernel, where CUDA refuses the launch.
void batch_norm_leaky_relu_forward(const BatchNormForward& args, Queue queue);
void batch_statistics(const BatchStatistics& args, Queue queue);
void batch_norm_leaky_relu_backward(const BatchNormBackward& args, Queue queue);
void settle_pending_gradient(const PendingGradient& args, Queue queue);

}  // namespace ganvas::cuda
