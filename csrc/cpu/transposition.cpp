// The part that is compiled once: the choice of instruction set.
#include "transposition.h"

#include "parallel.h"

namespace ganvas::cpu {

void transpose(const Transposition& args, int threads) {
    const std::int64_t bytes = args.matrices * args.rows * args.columns * element_bytes(args.dtype);
    threads = team_size(2 * bytes, threads);
    expect_first_touch(args.to, bytes);
    GANVAS_DISPATCH(transpose(args, threads))
}

}  // namespace ganvas::cpu
