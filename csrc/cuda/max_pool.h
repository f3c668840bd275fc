// 2×2 max-pooling of stride 2 over a pending activation on a GPU: the activation itself is never written. All addresses
// are device memory; tensors lie channels-last.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "device.h"

namespace ganvas::cuda {

// y before the pool: lrelu(scale*y + shift), or scale*lrelu(y) + shift if the activation comes first, with
// scale = weight/sqrt(var + eps) and shift = bias - mean*scale. An odd last row or column is left out.
struct MaxPoolInput {
    Dtype dtype;
    std::int64_t batch, height, width, channels;
    std::int64_t groups;  // G: statistics groups
    const void* stored;   // y: [N, H, W, C]
    const float* weight;  // γ: [C] or null: 1
    const float* bias;    // β: [C] or null: 0
    const float* mean;    // [G, C]
    const float* var;     // [G, C]
    float eps;
    float negative_slope;
    bool activation_first;
};

struct MaxPoolForward {
    MaxPoolInput input;
    void* output;         // [N, H/2, W/2, C]
    std::uint8_t* index;  // [N, H/2, W/2, C]: which of the four, row by row; the first of equals, a NaN before all
};

struct MaxPoolBackward {
    MaxPoolInput input;
    const void* grad_output;  // [N, H/2, W/2, C]
    const std::uint8_t* index;
    bool training;       // batch statistics
    void* grad_input;    // [N, H, W, C]: of the stored values
    float* grad_weight;  // [C]
    float* grad_bias;    // [C]
    float* workspace;    // max_pool_workspace_floats
};

// Scratch of the backward pass.
std::int64_t max_pool_workspace_floats(const MaxPoolInput& input, int device);

// Enqueue the kernels. Throw std::runtime_error, naming the kernel, where CUDA refuses the launch.
void max_pool_forward(const MaxPoolForward& args, Queue queue);
void max_pool_backward(const MaxPoolBackward& args, Queue queue);

}  // namespace ganvas::cuda
