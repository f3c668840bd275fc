// Adversarial losses: value, gradient and logged metrics in one pass over the logits. Formulas: ops/backends/reference.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../gan_loss_terms.h"
#include "isa.h"

namespace ganvas::cpu {

struct DiscriminatorLoss {
    Dtype dtype;
    GanLoss kind;
    float label_smoothing;
    const void* real;  // [real_count]
    const void* fake;  // [fake_count]
    std::int64_t real_count, fake_count;
    void* grad_real;  // like real
    void* grad_fake;  // like fake
    float* loss;      // [1]
    float* metrics;   // [4]: mean real, mean fake logit, share of real logits > 0, share of fake logits < 0
};

struct GeneratorLoss {
    Dtype dtype;
    GanLoss kind;
    const void* fake;  // [count]
    const void* real;  // [count] for relativistic, otherwise null
    std::int64_t count;
    void* grad_fake;  // [count]
    void* grad_real;  // [count] for relativistic, otherwise null
    float* loss;      // [1]
};

void discriminator_loss(const DiscriminatorLoss& args, int threads);
void generator_loss(const GeneratorLoss& args, int threads);

// What one chunk of logits adds up to. Chunks have a fixed size, so sums do not depend on the number of threads.
struct LogitSums {
    double loss, logit, positive, negative;
};
constexpr std::int64_t logits_per_chunk = 4096;

// One kernel serves both networks.
struct LossTermArgs {
    Dtype dtype;
    LogitTerm term;
    float grad_scale;    // 1/count: the loss is a mean
    const void* logits;  // [count]
    const void* other;   // [count], pair only
    std::int64_t count;
    void* grad;        // [count]
    void* grad_other;  // [count], pair only
};

#define DECLARE(isa)                                                              \
    namespace isa {                                                               \
    void loss_term(const LossTermArgs& args, LogitSums* chunk_sums, int threads); \
    }
GANVAS_FOR_EACH_ISA(DECLARE)
#undef DECLARE

}  // namespace ganvas::cpu
