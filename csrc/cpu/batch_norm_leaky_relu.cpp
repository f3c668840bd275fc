// The part that is compiled once: workspace, and the choice of instruction set.
#include "batch_norm_leaky_relu.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "parallel.h"

namespace ganvas::cpu {
namespace {

std::int64_t array_bytes(const BatchNormShape& shape) {
    return shape.rows * shape.channels * element_bytes(shape.dtype);
}

constexpr std::int64_t full_width = 64;  // lanes: below this a row is too short for the vector loops

struct Workspace : BatchNormWorkspace {
    Workspace(const BatchNormShape& shape, std::int64_t arrays_moved, int max_threads) {
        const std::int64_t bytes = arrays_moved * array_bytes(shape);
        threads = team_size(bytes, max_threads);
        pack = std::max<std::int64_t>(1, full_width / shape.channels);
        stream = bytes > cache_bytes();
        const std::int64_t width = pack * shape.channels;
        doubles = std::make_unique<double[]>(threads * shape.groups * 2 * shape.channels);
        floats = std::make_unique_for_overwrite<float[]>(shape.groups * coefficients_per_group * width +
                                                         threads * block_floats(width));
        partial = doubles.get();
        coefficient = floats.get();
        block = coefficient + shape.groups * coefficients_per_group * width;
    }
    std::unique_ptr<double[]> doubles;
    std::unique_ptr<float[]> floats;
};

}  // namespace

void batch_norm_coefficients(const BatchNormCoefficients& args) {
    for (std::int64_t group = 0; group < args.groups; ++group) {
        for (std::int64_t c = 0; c < args.channels; ++c) {
            const std::int64_t at = group * args.channels + c;
            const double deviation = std::sqrt(static_cast<double>(args.var[at]) + static_cast<double>(args.eps));
            args.scale[at] = (args.weight ? args.weight[c] : 1.0f) * static_cast<float>(1.0 / deviation);
            args.shift[at] = (args.bias ? args.bias[c] : 0.0f) - args.mean[at] * args.scale[at];
        }
    }
}

void batch_norm_leaky_relu_forward(const BatchNormForward& args, int threads) {
    const Workspace workspace(args.shape, (args.training ? 3 : 2) + (args.residual ? 1 : 0), threads);
    expect_first_touch(args.output, array_bytes(args.shape));
    GANVAS_DISPATCH(batch_norm_leaky_relu_forward(args, workspace))
}

void batch_norm_leaky_relu_backward(const BatchNormBackward& args, int threads) {
    const Workspace workspace(args.shape, args.grad_residual ? 5 : 3, threads);
    expect_first_touch(args.grad_input, array_bytes(args.shape));
    if (args.grad_residual) expect_first_touch(args.grad_residual, array_bytes(args.shape));
    GANVAS_DISPATCH(batch_norm_leaky_relu_backward(args, workspace))
}

}  // namespace ganvas::cpu
