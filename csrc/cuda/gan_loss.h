// Adversarial losses on a GPU: value, gradients and logged metrics in one launch. All addresses are device memory.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../gan_loss_terms.h"
#include "device.h"

namespace ganvas::cuda {

struct DiscriminatorLoss {
    Dtype dtype;
    GanLoss kind;
    float label_smoothing;
    const void* real;  // [real_count]
    const void* fake;  // [fake_count]
    std::int64_t real_count, fake_count;
    void* grad_real;  // like real
    void* grad_fake;  // like fake
    void* loss;       // [1], of the logits' dtype
    float* metrics;   // [4]: mean real, mean fake logit, share of real logits > 0, share of fake logits < 0
    void* workspace;  // gan_loss_workspace_bytes, aligned to 8 bytes
};

struct GeneratorLoss {
    Dtype dtype;
    GanLoss kind;
    const void* fake;  // [count]
    const void* real;  // [count] for relativistic, otherwise null
    std::int64_t count;
    void* grad_fake;  // [count]
    void* grad_real;  // [count] for relativistic, otherwise null
    void* loss;       // [1], of the logits' dtype
    void* workspace;  // gan_loss_workspace_bytes, aligned to 8 bytes
};

// Scratch that blocks hand their sums over in. Its contents need not be kept or cleared between calls.
constexpr std::int64_t gan_loss_max_blocks = 512;
constexpr std::int64_t gan_loss_workspace_bytes = gan_loss_max_blocks * 5 * 8;

// Enqueue the kernel. Throw std::runtime_error, naming the kernel, where CUDA refuses the launch.
void discriminator_loss(const DiscriminatorLoss& args, Queue queue);
void generator_loss(const GeneratorLoss& args, Queue queue);

}  // namespace ganvas::cuda
