// The register-blocked product at the heart of the convolutions. Included by kernel sources only.
#pragma once

#include <array>

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

constexpr Index cache_line = 64 / sizeof(float);

// Numbers that lie together, in lines of the cache.
struct Stretch {
    const float* at{};
    Index lines{};
};

using Stretches = std::array<Stretch, 2>;

// What a tile of a product fetches: beside each word of its depth a line, `step` words after the one before.
struct Fetch {
    const float* at;
    Index step;
};

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
    // What is read later and lies in a far cache. Its lines are fetched while products are taken, a few at a time: many
    // at once wait for each other, and the products for them.
    Stretches later{};

    // Those beside `depth` words; after the last, a line that is at hand.
    Fetch fetch() {
        for (Stretch& s : later)
            if (s.lines > 0) {
                const Fetch result{s.at, cache_line};
                s.at += depth * cache_line, s.lines -= depth;
                return result;
            }
        return {b, 0};
    }
};

// Not inlined: registers are all the accumulators', whatever surrounds a call.
template <int rows, int vectors, Elements elements, bool accumulate, bool fetches>
[[gnu::noinline]] void multiply_tile(const Product& p, Index row, Index column, Fetch fetched) {
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
        if constexpr (fetches) prefetch<2>(fetched.at), fetched.at += fetched.step;
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

template <int rows, int vectors, Elements elements, bool accumulate>
inline void product_tile(Product& p, Index row, Index column) {
    const Fetch fetched = p.fetch();
    if (lanes == 16 || fetched.step > 0)  // beside products of 512 bits, to fetch what is at hand costs nothing
        multiply_tile<rows, vectors, elements, accumulate, true>(p, row, column, fetched);
    else
        multiply_tile<rows, vectors, elements, accumulate, false>(p, row, column, fetched);
}

// The last rows, fewer than a tile has.
template <int rows, int vectors, Elements elements, bool accumulate>
inline void product_rest(Product& p, Index rest, Index row, Index column) {
    if (rest == rows) return product_tile<rows, vectors, elements, accumulate>(p, row, column);
    if constexpr (rows > 1) product_rest<rows - 1, vectors, elements, accumulate>(p, rest, row, column);
}

template <int vectors, Elements elements, bool accumulate>
inline void product_column(Product& p, Index rows, Index column) {
    constexpr int whole = tile_rows<vectors>;
    for (Index row = 0, count; row < rows; row += count) {
        // At the end two tiles of a medium size, rather than a whole one and one of a row or two: such wait for b.
        const Index left = rows - row;
        count = left <= whole ? left : 2 * left < 3 * whole ? ceiling(left, 2) : whole;
        if (count == whole)
            product_tile<whole, vectors, elements, accumulate>(p, row, column);
        else
            product_rest<whole - 1, vectors, elements, accumulate>(p, count, row, column);
    }
}

// The last vectors of a row, fewer than a tile has.
template <int vectors, Elements elements, bool accumulate>
inline void product_last_column(Product& p, Index rows, Index rest, Index column) {
    if (rest == vectors) return product_column<vectors, elements, accumulate>(p, rows, column);
    if constexpr (vectors > 1) product_last_column<vectors - 1, elements, accumulate>(p, rows, rest, column);
}

template <Elements elements, bool accumulate>
inline void product_slice(Product& p, Index rows, Index columns) {
    Index column = 0;
    for (; column + tile_columns <= columns; column += tile_columns)
        product_column<tile_vectors, elements, accumulate>(p, rows, column);
    if (column < columns)
        product_last_column<tile_vectors - 1, elements, accumulate>(p, rows, (columns - column) / lanes, column);
}

// c = a·b, or c += a·b; `columns` is a multiple of `lanes`. Each sum starts from zero every `slice` words: rounding
// errors grow with the length of a chain of additions, and integers overflow. A sum of nothing is zero. Before each
// slice before(product, its first word) is called.
template <Elements elements, bool accumulate, class Before>
inline void product(Product p, Index rows, Index columns, Index slice, Before before) {
    const Index depth = p.depth;
    Index k = 0;
    do {
        p.depth = smaller(slice, depth - k);
        before(p, k);
        accumulate || k > 0 ? product_slice<elements, true>(p, rows, columns)
                            : product_slice<elements, false>(p, rows, columns);
        p.a += p.depth * p.a_depth;
        p.b += p.depth * p.b_depth;
        k += slice;
    } while (k < depth);
}

template <Elements elements, bool accumulate>
inline void product(const Product& p, Index rows, Index columns, Index slice) {
    product<elements, accumulate>(p, rows, columns, slice, [](Product&, Index) {});
}

}  // namespace ganvas::cpu::GANVAS_ISA
