// Numbers of one dtype as numbers of the other, of many tensors at once.
#pragma once

#include <cstdint>
#include <vector>

#include "../dtype.h"
#include "isa.h"

namespace ganvas::cpu {

struct Conversion {
    const void* from;
    void* to;
    std::int64_t count;
};

// From bfloat16 to float32, or from float32 to bfloat16, which rounds to nearest.
void convert(const std::vector<Conversion>& conversions, Dtype to, int threads);

#define DECLARE(isa)                                           \
    namespace isa {                                            \
    void convert(const Conversion& of, Dtype to, int threads); \
    }
GANVAS_FOR_EACH_ISA(DECLARE)
#undef DECLARE

}  // namespace ganvas::cpu
