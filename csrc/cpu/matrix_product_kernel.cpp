// Compiled once per instruction set.
#include "matrix_product.h"

#include <omp.h>

#include "gemm.h"
#include "parallel.h"
#include "workspace.h"

namespace ganvas::cpu::GANVAS_ISA {
namespace {

constexpr Index row_block_most = 288, column_block_most = 256;  // of c: what a thread has in its cache
constexpr Index row_block_least = 24;
constexpr Index depth_block = 128;
constexpr Index chain = 64;    // terms of a sum that are added up in one chain
constexpr Index stagger = 16;  // floats between rows that would lie a power of two apart

// How c is cut up: large blocks, but enough of them to go round.
struct Cut {
    Index row_block, column_block;
    Index row_blocks, column_blocks;

    Cut(const MatrixProduct& args, int threads) {
        const Index balanced = ceiling(args.rows, ceiling(args.rows, row_block_most));
        row_block = ceiling(balanced, 12) * 12;
        column_block = smaller(column_block_most, ceiling(args.columns, tile_columns) * tile_columns);
        count(args);
        while (row_blocks * column_blocks < threads && column_block > tile_columns) {
            column_block = ceiling(column_block / 2, tile_columns) * tile_columns;
            count(args);
        }
        while (row_blocks * column_blocks < threads && row_block > row_block_least) {
            row_block = ceiling(row_block / 2, 12) * 12;
            count(args);
        }
    }
    Index blocks() const { return row_blocks * column_blocks; }

  private:
    void count(const MatrixProduct& args) {
        row_blocks = ceiling(args.rows, row_block);
        column_blocks = ceiling(args.columns, column_block);
    }
};

// b[k][column] for `depth` k and `columns` columns, as rows of `width`, whole vectors; zero past the columns.
void pack_columns(const MatrixProduct& args, Index k, Index depth, Index column, Index columns, Index width,
                  float* rows) {
    const float* from = args.b + k * args.b_depth + column * args.b_column;
    if (args.b_column == 1) {
        for (Index i = 0; i < depth; ++i)
            for (Index j = 0; j < width; j += lanes) {
                prefetch(from + i * args.b_depth + j + tile_columns);  // the next panel's: a line of each row
                store_vector(rows + i * width + j,
                             j < columns ? load_lanes(from + i * args.b_depth + j, columns - j) : Vector{});
            }
        return;
    }
    for (Index i = 0; i < depth; i += lanes)
        for (Index j = 0; j < width; j += lanes) {
            Vector block[lanes] = {};
            for (Index n = 0; n < smaller(lanes, columns - j); ++n) {
                const float* along = from + i + (j + n) * args.b_column;
                prefetch(along + lanes);
                block[n] = load_lanes(along, depth - i);
            }
            transpose(block);
            for (Index n = 0; n < smaller(lanes, depth - i); ++n) store_vector(rows + (i + n) * width + j, block[n]);
        }
}

// a[row][k] for `depth` k and `count` rows, as columns of `height`.
void pack_rows(const MatrixProduct& args, Index row, Index count, Index k, Index depth, Index height, float* columns) {
    for (Index i = 0; i < depth; ++i) {
        const float* from = args.a + row + (k + i) * args.a_depth;
        for (Index j = 0; j < count; j += lanes)
            store_lanes(columns + i * height + j, load_lanes(from + j, count - j), count - j);
    }
}

}  // namespace

void matrix_product(const MatrixProduct& args, int threads) {
    const Cut cut(args, threads);
    const Index height = cut.row_block + stagger;
    const std::size_t a_bytes = floats(depth_block * height), b_bytes = floats(depth_block * tile_columns);
    const std::size_t own = a_bytes + b_bytes + floats(cut.row_block * cut.column_block);
    const ThreadWorkspaces scratch(own, threads);
    const bool streams =
        vector_is_line && goes_past_cache(args.c, args.rows, args.columns * static_cast<Index>(sizeof(float)));

#pragma omp parallel num_threads(threads)
    {
        char* const mine = scratch.of(omp_get_thread_num());
        float* const a = reinterpret_cast<float*>(mine);
        float* const b = reinterpret_cast<float*>(mine + a_bytes);
        float* const c = reinterpret_cast<float*>(mine + a_bytes + b_bytes);
#pragma omp for schedule(dynamic, 1)
        for (Index block = 0; block < cut.blocks(); ++block) {
            const Index row = block % cut.row_blocks * cut.row_block,
                        column = block / cut.row_blocks * cut.column_block;
            const Index rows = smaller(cut.row_block, args.rows - row);
            const Index columns = smaller(cut.column_block, args.columns - column);
            for (Index k = 0; k < args.depth; k += depth_block) {
                const Index depth = smaller(depth_block, args.depth - k);
                Product p{args.a + row * args.a_row + k, args.a_row, 1, b, 0, c, cut.column_block, depth};
                if (args.a_depth != 1) {
                    pack_rows(args, row, rows, k, depth, height, a);
                    p.a = a, p.a_row = 1, p.a_depth = height;
                }
                for (Index panel = 0; panel < columns; panel += tile_columns) {
                    const Index width = smaller(tile_columns, whole_vectors(columns - panel));
                    pack_columns(args, k, depth, column + panel, smaller(width, columns - panel), width, b);
                    p.b_depth = width, p.c = c + panel;
                    k > 0 ? product<Elements::floats, true>(p, rows, width, chain)
                          : product<Elements::floats, false>(p, rows, width, chain);
                }
            }
            for (Index i = 0; i < rows; ++i)
                for (Index j = 0; j < columns; j += lanes) {
                    Vector value = load_vector(c + i * cut.column_block + j);
                    if (args.bias) value += load_lanes(args.bias + column + j, columns - j);
                    float* const to = args.c + (row + i) * args.columns + column + j;
                    streams ? stream_vector(to, value) : store_lanes(to, value, columns - j);
                }
        }
        if (streams) stream_fence();
    }
}

}  // namespace ganvas::cpu::GANVAS_ISA
