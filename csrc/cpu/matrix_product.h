// c = a·b, and a bias. Blocked for the cache; the torch of some processors has no fast product of float32 matrices.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ganvas::cpu {

// Of float32. Each factor lies row by row or column by column: one of its strides is 1.
struct MatrixProduct {
    const float* a;  // a[row*a_row + k*a_depth]
    std::int64_t a_row, a_depth;
    const float* b;  // b[k*b_depth + column*b_column]
    std::int64_t b_depth, b_column;
    const float* bias;  // [columns] or null
    float* c;           // c[row*columns + column]
    std::int64_t rows, columns, depth;
};

void matrix_product(const MatrixProduct& args, int threads);

#define DECLARE(isa)                                             \
    namespace isa {                                              \
    void matrix_product(const MatrixProduct& args, int threads); \
    }
GANVAS_FOR_EACH_ISA(DECLARE)
#undef DECLARE

}  // namespace ganvas::cpu
