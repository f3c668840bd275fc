// The part that is compiled once: the choice of instruction set.
#include "matrix_product.h"

#include "parallel.h"

namespace ganvas::cpu {

void matrix_product(const MatrixProduct& args, int threads) {
    expect_first_touch(args.c, args.rows * args.columns * 4);
    // Arithmetic outweighs memory: a factor's number takes part in as many products as the other has rows or columns.
    threads = team_size(args.rows * args.columns * args.depth / 16, threads);
    GANVAS_DISPATCH(matrix_product(args, threads))
}

}  // namespace ganvas::cpu
