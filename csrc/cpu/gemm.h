// The register-blocked product at the heart of the convolutions. Included by kernel sources only.
#pragma once

#include "vector.h"

namespace ganvas::cpu::GANVAS_ISA {

// Accumulators fill the vector registers, but for one broadcast and a row of b.
constexpr int tile_rows = 6;
#if defined(__AVX512F__)
constexpr int tile_vectors = 4;
#else
constexpr int tile_vectors = 2;
#endif
constexpr Index tile_columns = tile_vectors * lanes;

struct Product {
    const float* a;  // a[row*a_row + k*a_depth]
    Index a_row, a_depth;
    const float* b;  // b[k*b_depth + column]
    Index b_depth;
    float* c;  // c[row*c_row + column]
    Index c_row;
    Index depth;
};

// Not inlined: registers are all the accumulators', whatever surrounds a call.
template <int rows, int vectors, bool accumulate>
[[gnu::noinline]] void product_tile(const Product& p, Index row, Index column) {
    Vector sum[rows][vectors] = {};
    // Two pointers reach six rows by addressing modes alone, so that no register is spilled.
    const float* a = p.a + row * p.a_row;
    const float* lower = a + 3 * p.a_row;
    const float* b = p.b + column;
    for (Index k = 0; k < p.depth; ++k, a += p.a_depth, lower += p.a_depth, b += p.b_depth) {
        Vector right[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) right[v] = load_vector(b + v * lanes);
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
            const Vector left = broadcast(r < 3 ? a[r * p.a_row] : lower[(r - 3) * p.a_row]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sum[r][v] += left * right[v];
        }
    }
    const Index c_row = p.c_row;
    float* c = p.c + row * c_row + column;
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            float* destination = c + r * c_row + v * lanes;
            store_vector(destination, accumulate ? load_vector(destination) + sum[r][v] : sum[r][v]);
        }
}

template <int vectors, bool accumulate>
inline void product_column(const Product& p, Index rows, Index column) {
    Index row = 0;
    for (; row + tile_rows <= rows; row += tile_rows) product_tile<tile_rows, vectors, accumulate>(p, row, column);
    switch (rows - row) {
        case 5:
            return product_tile<5, vectors, accumulate>(p, row, column);
        case 4:
            return product_tile<4, vectors, accumulate>(p, row, column);
        case 3:
            return product_tile<3, vectors, accumulate>(p, row, column);
        case 2:
            return product_tile<2, vectors, accumulate>(p, row, column);
        case 1:
            return product_tile<1, vectors, accumulate>(p, row, column);
        default:
            return;
    }
}

template <bool accumulate>
inline void product_slice(const Product& p, Index rows, Index columns) {
    Index column = 0;
    for (; column + tile_columns <= columns; column += tile_columns)
        product_column<tile_vectors, accumulate>(p, rows, column);
    for (; column < columns; column += lanes) product_column<1, accumulate>(p, rows, column);
}

// c = a·b, or c += a·b; `columns` is a multiple of `lanes`. Each sum starts from zero every `slice` terms: rounding
// errors grow with the length of a chain of additions.
template <bool accumulate>
inline void product(Product p, Index rows, Index columns, Index slice) {
    const Index depth = p.depth;
    for (Index k = 0; k < depth; k += slice) {
        p.depth = smaller(slice, depth - k);
        accumulate || k > 0 ? product_slice<true>(p, rows, columns) : product_slice<false>(p, rows, columns);
        p.a += p.depth * p.a_depth;
        p.b += p.depth * p.b_depth;
    }
}

}  // namespace ganvas::cpu::GANVAS_ISA
