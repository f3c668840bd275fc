// Σ over pixels, for each channel: the gradient of a convolution's bias.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "isa.h"

namespace ganvas::cpu {

struct ChannelSums {
    Dtype dtype;
    std::int64_t rows;      // N·H·W
    std::int64_t channels;  // C
    const void* values;     // [rows, C]
    float* sums;            // [C]
};

void channel_sums(const ChannelSums& args, int threads);

constexpr std::int64_t channel_sums_pack_width = 64;  // numbers of the rows that are added up side by side

#define DECLARE(isa)                                                                     \
    namespace isa {                                                                      \
    void channel_sums(const ChannelSums&, std::int64_t pack, int threads, double* sums); \
    }
GANVAS_FOR_EACH_ISA(DECLARE)
#undef DECLARE

}  // namespace ganvas::cpu
