// The register-blocked product at the heart of the convolutions. Included by kernel sources only.
#pragma once

#include "vector.h"

namespace ganvas::cpu::GANVAS_ISA {

// Vectors of a tile's row. Accumulators fill the vector registers, but for one broadcast and a row of b.
#if defined(__AVX512F__)
constexpr int tile_vectors = 4;
template <int vectors>
constexpr int tile_rows = vectors == 1 ? 12 : 24 / vectors;
#else
constexpr int tile_vectors = 2;
template <int vectors>
constexpr int tile_rows = 12 / vectors;
#endif
constexpr Index tile_columns = tile_vectors * lanes;

// Of what a and b are made, in words of 32 bits: floats, or two numbers of 16 bits each that are neighbours along the
// sum.
enum class Elements { floats, int16_pairs, bfloat16_pairs };

template <bool integers>
constexpr Elements elements_of = integers ? Elements::int16_pairs : Elements::floats;

template <Elements elements>
struct Words {
    using Values = Vector;
    using Sums = Vector;
    static Values load(const float* words) { return load_vector(words); }
    static Values repeat(const float* word) { return broadcast(*word); }
    static void multiply_add(Values& sum, Values left, Values right) { sum += left * right; }
};

#if defined(__AVX512F__)
struct Pairs {
    using Values = VectorInts;
    static Values load(const float* words) {
        Values result;
        std::memcpy(&result, words, sizeof result);
        return result;
    }
    static Values repeat(const float* word) {
        std::int32_t bits;
        std::memcpy(&bits, word, sizeof bits);
        return bits + Values{};
    }
};

template <>
struct Words<Elements::int16_pairs> : Pairs {
    using Sums = VectorInts;
    static void multiply_add(Sums& sum, Values left, Values right) { add_int16_products(sum, left, right); }
};

template <>
struct Words<Elements::bfloat16_pairs> : Pairs {
    using Sums = Vector;
    static void multiply_add(Sums& sum, Values left, Values right) { add_bfloat16_products(sum, left, right); }
};
#endif

struct Product {
    const float* a;  // a[row*a_row + k*a_depth]
    Index a_row, a_depth;
    const float* b;  // b[k*b_depth + column]
    Index b_depth;
    float* c;  // c[row*c_row + column]
    Index c_row;
    Index depth;                                // in words
    const float *row_scale{}, *column_scale{};  // of integers: what one in a row of a, or in a column of b, stands for
    Index row_scale_stride{};
    const float* next{};  // where b's are too large for the cache: the one after this, which is fetched meanwhile
    bool rows_are_far{};  // a's, in the shared cache: those of a tile are fetched during the one before
};

// Not inlined: registers are all the accumulators', whatever surrounds a call.
template <int rows, int vectors, Elements elements, bool accumulate>
[[gnu::noinline]] void product_tile(const Product& p, Index row, Index column) {
    using W = Words<elements>;
    typename W::Sums sum[rows][vectors] = {};
    // A pointer reaches three rows by addressing modes alone, so that no register is spilled.
    const float* a[(rows + 2) / 3];
#pragma GCC unroll 4
    for (int i = 0; i < (rows + 2) / 3; ++i) a[i] = p.a + (row + 3 * i) * p.a_row;
    const float* b = p.b + column;
    if (accumulate) {  // sums that others were made after, long ago perhaps
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) __builtin_prefetch(p.c + (row + r) * p.c_row + column + v * lanes, 1);
    }
    for (Index k = 0; k < p.depth; ++k, b += p.b_depth) {
        typename W::Values right[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) right[v] = W::load(b + v * lanes);
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) {
            const typename W::Values left = W::repeat(a[r / 3] + r % 3 * p.a_row);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) W::multiply_add(sum[r][v], left, right[v]);
        }
#pragma GCC unroll 4
        for (const float*& rows_of_a : a) rows_of_a += p.a_depth;
    }
    const Index c_row = p.c_row;
    float* c = p.c + row * c_row + column;
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            Vector value;
            if constexpr (elements == Elements::int16_pairs) {
                const Vector column_scale = load_vector(p.column_scale + column + v * lanes);
                value = __builtin_convertvector(sum[r][v], Vector) * column_scale *
                        p.row_scale[(row + r) * p.row_scale_stride];
            } else {
                value = sum[r][v];
            }
            float* destination = c + r * c_row + v * lanes;
            store_vector(destination, accumulate ? load_vector(destination) + value : value);
        }
}

// The last rows, fewer than a tile has.
template <int rows, int vectors, Elements elements, bool accumulate>
inline void product_rest(const Product& p, Index rest, Index row, Index column) {
    if (rest == rows) return product_tile<rows, vectors, elements, accumulate>(p, row, column);
    if constexpr (rows > 1) product_rest<rows - 1, vectors, elements, accumulate>(p, rest, row, column);
}

template <int vectors, Elements elements, bool accumulate>
inline void product_column(const Product& p, Index rows, Index column) {
    constexpr int whole = tile_rows<vectors>;
    constexpr Index line = 64 / sizeof(float);
    const Index part = p.next ? ceiling(p.depth * p.b_depth / line, larger(1, rows / whole)) * line : 0;
    const float* next = p.next;
    Index row = 0;
    for (; row + whole <= rows; row += whole) {
        for (const float* const end = next + part; next < end; next += line) prefetch<2>(next);
        if (p.rows_are_far)
            for (Index i = row + whole; i < smaller(rows, row + 2 * whole); ++i)
                for (Index k = 0; k < p.depth; k += line) prefetch<2>(p.a + i * p.a_row + k);
        product_tile<whole, vectors, elements, accumulate>(p, row, column);
    }
    if (row < rows) product_rest<whole - 1, vectors, elements, accumulate>(p, rows - row, row, column);
}

// The last vectors of a row, fewer than a tile has.
template <int vectors, Elements elements, bool accumulate>
inline void product_last_column(const Product& p, Index rows, Index rest, Index column) {
    if (rest == vectors) return product_column<vectors, elements, accumulate>(p, rows, column);
    if constexpr (vectors > 1) product_last_column<vectors - 1, elements, accumulate>(p, rows, rest, column);
}

template <Elements elements, bool accumulate>
inline void product_slice(const Product& p, Index rows, Index columns) {
    Index column = 0;
    for (; column + tile_columns <= columns; column += tile_columns)
        product_column<tile_vectors, elements, accumulate>(p, rows, column);
    if (column < columns)
        product_last_column<tile_vectors - 1, elements, accumulate>(p, rows, (columns - column) / lanes, column);
}

// c = a·b, or c += a·b; `columns` is a multiple of `lanes`. Each sum starts from zero every `slice` words: rounding
// errors grow with the length of a chain of additions, and integers overflow. A sum of nothing is zero.
template <Elements elements, bool accumulate>
inline void product(Product p, Index rows, Index columns, Index slice) {
    const Index depth = p.depth;
    const float* const next = p.next;
    Index k = 0;
    do {
        p.depth = smaller(slice, depth - k);
        if (next) p.next = k + slice < depth ? p.b + p.depth * p.b_depth : next;
        accumulate || k > 0 ? product_slice<elements, true>(p, rows, columns)
                            : product_slice<elements, false>(p, rows, columns);
        p.a += p.depth * p.a_depth;
        p.b += p.depth * p.b_depth;
        k += slice;
    } while (k < depth);
}

}  // namespace ganvas::cpu::GANVAS_ISA
