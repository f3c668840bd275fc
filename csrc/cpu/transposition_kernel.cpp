// Compiled once per instruction set.
#include "transposition.h"
#include "vector.h"

namespace ganvas::cpu::GANVAS_ISA {
namespace {

using Half = std::uint16_t;

// A square of numbers of 32 bits, of which `rows` by `columns` exist.
inline void turn_square(const float* from, Index from_row, float* to, Index to_row, Index rows, Index columns) {
    Vector square[lanes];
    for (Index i = 0; i < lanes; ++i) square[i] = i < rows ? load_lanes(from + i * from_row, columns) : Vector{};
    transpose(square);
    for (Index i = 0; i < smaller(columns, lanes); ++i) store_lanes(to + i * to_row, square[i], rows);
}

inline void store_halves(Half* to, VectorBits words, Index count) {
    const VectorHalves halves = __builtin_convertvector(words, VectorHalves);
    if (count >= lanes)
        std::memcpy(to, &halves, sizeof halves);
    else
        std::memcpy(to, &halves, static_cast<std::size_t>(count) * sizeof(Half));
}

// The same of numbers of 16 bits, twice as many columns: pairs of them are turned, and then parted.
inline void turn_square(const Half* from, Index from_row, Half* to, Index to_row, Index rows, Index columns) {
    Vector square[lanes]{};
    for (Index i = 0; i < smaller(rows, lanes); ++i) {
        if (columns >= 2 * lanes)
            std::memcpy(square + i, from + i * from_row, sizeof(Vector));
        else
            std::memcpy(square + i, from + i * from_row, static_cast<std::size_t>(columns) * sizeof(Half));
    }
    transpose(square);
    for (Index i = 0; i < smaller(columns, 2 * lanes); i += 2) {
        VectorBits pairs;
        std::memcpy(&pairs, square + i / 2, sizeof pairs);
        store_halves(to + i * to_row, pairs & 0xFFFFu, rows);
        if (i + 1 < columns) store_halves(to + (i + 1) * to_row, pairs >> 16, rows);
    }
}

template <class T>
void transpose_all(const Transposition& args, int threads) {
    constexpr Index width = lanes * static_cast<Index>(sizeof(float) / sizeof(T));  // of a square
    const Index strips = (args.columns + width - 1) / width;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (Index item = 0; item < args.matrices * strips; ++item) {
        const Index first = item / strips * args.rows * args.columns, column = item % strips * width;
        const T* const from = static_cast<const T*>(args.from) + first + column;
        T* const to = static_cast<T*>(args.to) + first + column * args.rows;
        for (Index row = 0; row < args.rows; row += lanes)
            turn_square(from + row * args.columns, args.columns, to + row, args.rows, args.rows - row,
                        args.columns - column);
    }
}

}  // namespace

void transpose(const Transposition& args, int threads) {
    args.dtype == Dtype::float32 ? transpose_all<float>(args, threads) : transpose_all<Half>(args, threads);
}

}  // namespace ganvas::cpu::GANVAS_ISA
