// Matrices turned: from channels_last to contiguous maps, and back.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "isa.h"

namespace ganvas::cpu {

struct Transposition {
    Dtype dtype;
    std::int64_t matrices, rows, columns;
    const void* from;  // [matrices, rows, columns]
    void* to;          // [matrices, columns, rows]
};

void transpose(const Transposition& args, int threads);

#define DECLARE(isa)                                   \
    namespace isa {                                    \
    void transpose(const Transposition&, int threads); \
    }
GANVAS_FOR_EACH_ISA(DECLARE)
#undef DECLARE

}  // namespace ganvas::cpu
