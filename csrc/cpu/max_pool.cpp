// The part that is compiled once: workspace, and the choice of instruction set.
#include "max_pool.h"

#include <algorithm>

#include "parallel.h"
#include "workspace.h"

namespace ganvas::cpu {
namespace {

std::int64_t input_bytes(const MaxPoolShape& s) {
    return s.batch * s.height * s.width * s.channels * element_bytes(s.dtype);
}

}  // namespace

std::int64_t max_pool_block_rows(const MaxPoolShape& shape) {
    return std::max<std::int64_t>(1, max_pool_block_pixels / (shape.width / 2));
}

void max_pool_forward(const MaxPoolForward& args, int threads) {
    threads = team_size(2 * input_bytes(args.shape), threads);
    GANVAS_DISPATCH(max_pool_forward(args, threads))
}

void max_pool_backward(const MaxPoolBackward& args, int threads) {
    const MaxPoolShape& s = args.shape;
    const std::int64_t rows = s.batch / s.groups * (s.height / 2), block = max_pool_block_rows(s);
    const auto sums = static_cast<std::size_t>(s.groups * ((rows + block - 1) / block) * 2 * s.channels) * 8;
    const auto coefficients = static_cast<std::size_t>(s.groups * gradient_coefficients * s.channels) * 4;
    Workspace workspace(Workspace::padded(sums) + Workspace::padded(coefficients));
    const MaxPoolWorkspace parts{team_size(3 * input_bytes(s), threads), static_cast<double*>(workspace.take(sums)),
                                 static_cast<float*>(workspace.take(coefficients))};
    expect_first_touch(args.grad_input, input_bytes(s));
    GANVAS_DISPATCH(max_pool_backward(args, parts))
}

}  // namespace ganvas::cpu
