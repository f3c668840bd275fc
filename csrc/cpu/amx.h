// Tiles of the Advanced Matrix Extensions: 16 rows of 64 bytes, of which a processor has eight. Included by kernel
// sources only, and to be used where has_bfloat16_tiles().
#pragma once

#include "vector.h"

namespace ganvas::cpu::GANVAS_ISA {

constexpr Index tile_side = 16;   // rows of a tile, and sums in one
constexpr Index tile_depth = 32;  // bfloat16 numbers in a row: terms of each sum
constexpr Index tile_words = tile_side * tile_side;

// While one exists, the thread's tiles are 16×16 words each; those of factors are for sums of `depth` terms, an even
// number.
class Tiles {
  public:
    explicit Tiles(Index depth) {
        struct Configuration {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t row_bytes[16] = {};
            std::uint8_t rows[16] = {};
        } configuration;
        static_assert(sizeof configuration == 64);
        for (int tile = 0; tile < 8; ++tile) {
            const bool left = tile == 4 || tile == 5, right = tile > 5;
            configuration.row_bytes[tile] = static_cast<std::uint16_t>(left ? 2 * depth : 64);
            configuration.rows[tile] = static_cast<std::uint8_t>(right ? depth / 2 : tile_side);
        }
        asm volatile("ldtilecfg %0" ::"m"(configuration));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

template <int tile>
[[gnu::always_inline]] inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

template <int tile>
[[gnu::always_inline]] inline void load_tile(const void* rows, Index row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(row_bytes), "i"(tile) : "memory");
}

// The same of rows that others are read before, again: a hint to leave those in the nearest cache.
template <int tile>
[[gnu::always_inline]] inline void load_passing_tile(const void* rows, Index row_bytes) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(row_bytes), "i"(tile) : "memory");
}

template <int tile>
[[gnu::always_inline]] inline void store_tile(void* rows, Index row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(row_bytes), "i"(tile) : "memory");
}

// sums += left·right of bfloat16 numbers: rows of `left` hold a sum's terms one after the other, those of `right` two
// terms of each sum.
template <int sums, int left, int right>
[[gnu::always_inline]] inline void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(left), "i"(right));
}

// Tiles 0 to 3 are sums of two by two, 4 and 5 the factors on the left, 6 and 7 those on the right. Those of one or the
// other may be but one.
template <int rows, int columns, class Each>
[[gnu::always_inline]] inline void each_sum(Each each) {
    each.template operator()<0>(0, 0);
    if constexpr (columns == 2) each.template operator()<1>(0, 1);
    if constexpr (rows == 2) each.template operator()<2>(1, 0);
    if constexpr (rows == 2 && columns == 2) each.template operator()<3>(1, 1);
}

// Adds the products of `depth` tiles to the sums. From one to the next `left_step` and `right_step` bytes are gone;
// second tiles lie `left_next` and `right_next` bytes after the first.
template <int rows, int columns, class Beside>
[[gnu::always_inline]] inline void add_tile_products(const char* left, Index left_row, Index left_next, Index left_step,
                                                     const char* right, Index right_row, Index right_next,
                                                     Index right_step, Index depth, Beside beside) {
    for (Index k = 0; k < depth; ++k, left += left_step, right += right_step) {
        load_tile<4>(left, left_row);
        load_passing_tile<6>(right, right_row);
        multiply_tiles<0, 4, 6>();
        if constexpr (columns == 2) {
            load_passing_tile<7>(right + right_next, right_row);
            multiply_tiles<1, 4, 7>();
        }
        if constexpr (rows == 2) {
            load_tile<5>(left + left_next, left_row);
            multiply_tiles<2, 5, 6>();
            if constexpr (columns == 2) multiply_tiles<3, 5, 7>();
        }
        beside();
    }
}

}  // namespace ganvas::cpu::GANVAS_ISA
