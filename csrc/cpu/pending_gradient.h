// The second half of BatchNorm's backward pass, where a convolution's backward pass has done the first: it left
// g = dL/d(scale*x + shift) and the sums of it. Here x is y, or lrelu(y) if the activation comes first.
//
//   dL/dx = scale*(g − Σg/n − (x − mean)·Σg(x − mean)/(n·(var + eps)))    with batch statistics, scale*g without
//   dL/dy = dL/dx, times the kink at y if the activation comes first
#pragma once

#include <cstdint>

#include "convolution.h"
#include "isa.h"

namespace ganvas::cpu {

struct PendingGradient {
    Dtype dtype;
    std::int64_t rows;      // N·H·W, all groups together
    std::int64_t channels;  // C
    std::int64_t groups;    // G
    float eps;
    float negative_slope;
    bool activation_first;
    bool training;               // batch statistics
    const void* grad;            // [rows, C]: g
    void* result;                // [rows, C]: dL/dy; may be `grad`
    const void* stored;          // [rows, C]: y
    const float* weight;         // γ: [C] or null: 1
    const float* mean;           // [G, C]
    const float* var;            // [G, C]
    const float* sum;            // [G, C]: Σg
    const float* sum_deviation;  // [G, C]: Σg·(x − mean)
    float* grad_weight;          // [C]
    float* grad_bias;            // [C]
};

void settle_pending_gradient(const PendingGradient& args, int threads);

#define DECLARE(isa)                                                             \
    namespace isa {                                                              \
    void settle_pending_gradient(const PendingGradient&, int, float* workspace); \
    }
GANVAS_FOR_EACH_ISA(DECLARE)
#undef DECLARE

}  // namespace ganvas::cpu
