// 2×2 max-pooling of stride 2 over a pending activation: the activation itself is never written.
//
// Backward goes from the pooled map's gradient straight to that of the stored values. Only a quarter of the pixels
// carries a gradient, so the sums that BatchNorm needs read no more than that.
#pragma once

#include <cstdint>

#include "convolution.h"
#include "isa.h"

namespace ganvas::cpu {

struct MaxPoolShape {
    Dtype dtype;
    std::int64_t batch, height, width, channels;  // of the stored values; an odd last row or column is left out
    std::int64_t groups;                          // G: statistics groups
};

struct MaxPoolForward {
    MaxPoolShape shape;
    PendingActivation input;  // with scale and shift
    void* output;             // [N, H/2, W/2, C]
    std::uint8_t* index;      // [N, H/2, W/2, C]: which of the four, row by row; the first of equals, a NaN before all;
                              // null: not kept
};

struct MaxPoolBackward {
    MaxPoolShape shape;
    PendingActivation input;
    const void* grad_output;  // [N, H/2, W/2, C]
    const std::uint8_t* index;
    bool training;  // batch statistics
    float eps;
    const float* weight;  // γ: [C] or null: 1
    const float* mean;    // [G, C]
    const float* var;     // [G, C]
    void* grad_input;     // [N, H, W, C]: of the stored values
    float* grad_weight;   // [C]
    float* grad_bias;     // [C]
};

void max_pool_forward(const MaxPoolForward& args, int threads);
void max_pool_backward(const MaxPoolBackward& args, int threads);

// Pooled rows whose sums are added up in float32, whatever the number of threads.
constexpr std::int64_t max_pool_block_pixels = 512;
std::int64_t max_pool_block_rows(const MaxPoolShape& shape);

struct MaxPoolWorkspace {
    int threads;
    double* sums;         // [blocks of all groups, 2, C]
    float* coefficients;  // [G, gradient_coefficients, C]
};

#define DECLARE(isa)                                                         \
    namespace isa {                                                          \
    void max_pool_forward(const MaxPoolForward&, int threads);               \
    void max_pool_backward(const MaxPoolBackward&, const MaxPoolWorkspace&); \
    }
GANVAS_FOR_EACH_ISA(DECLARE)
#undef DECLARE

}  // namespace ganvas::cpu
