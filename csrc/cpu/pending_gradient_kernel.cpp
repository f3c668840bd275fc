// Compiled once per instruction set.
#include "pending_gradient.h"

#include <omp.h>

#include "statistics.h"
#include "storage.h"

namespace ganvas::cpu::GANVAS_ISA {
namespace {

void prepare(const PendingGradient& args, float* workspace) {
    const double rows = static_cast<double>(args.rows / args.groups);
    for (Index c = 0; c < args.channels; ++c) args.grad_weight[c] = args.grad_bias[c] = 0.0f;
    for (Index group = 0; group < args.groups; ++group) {
        const GradientCoefficients of(workspace, group, args.channels);
        for (Index c = 0; c < args.channels; ++c) {
            const Index at = group * args.channels + c;
            const float inverse = of.set(c, args.weight ? args.weight[c] : 1.0f, args.mean[at], args.var[at], args.eps,
                                         args.training, args.sum[at], args.sum_deviation[at], rows);
            args.grad_weight[c] += args.sum_deviation[at] * inverse;
            args.grad_bias[c] += args.sum[at];
        }
    }
}

template <bool activation_first, class T>
void settle(const T* __restrict stored, const T* grad, Index rows, Index channels, const GradientCoefficients& of,
            Leaky leaky, T* result) {
    const float* __restrict scale = of.scale, * __restrict mean = of.mean;
    const float* __restrict mean_grad = of.mean_grad, * __restrict projection = of.projection;
    for (Index row = 0; row < rows; ++row)
#pragma GCC ivdep
        for (Index c = 0; c < channels; ++c) {
            const Index at = row * channels + c;
            const float y = load(stored[at]), x = activation_first ? leaky(y) : y;
            const float value = scale[c] * (load(grad[at]) - mean_grad[c] - (x - mean[c]) * projection[c]);
            store(&result[at], activation_first ? leaky.grad(value, y) : value);
        }
}

template <bool activation_first, class T>
void run(const PendingGradient& args, int threads, float* workspace) {
    prepare(args, workspace);
    const Index group_rows = args.rows / args.groups;
#pragma omp parallel num_threads(threads)
    {
        const Index thread = omp_get_thread_num(), team = omp_get_num_threads();
        const Index begin = group_rows * thread / team, end = group_rows * (thread + 1) / team;
        for (Index group = 0; group < args.groups; ++group) {
            const Index at = (group * group_rows + begin) * args.channels;
            settle<activation_first>(static_cast<const T*>(args.stored) + at, static_cast<const T*>(args.grad) + at,
                                     end - begin, args.channels, GradientCoefficients(workspace, group, args.channels),
                                     Leaky(args.negative_slope), static_cast<T*>(args.result) + at);
        }
    }
}

}  // namespace

void settle_pending_gradient(const PendingGradient& args, int threads, float* workspace) {
    const bool first = args.activation_first;
    if (args.dtype == Dtype::float32)
        first ? run<true, float>(args, threads, workspace) : run<false, float>(args, threads, workspace);
    else
        first ? run<true, bfloat16>(args, threads, workspace) : run<false, bfloat16>(args, threads, workspace);
}

}  // namespace ganvas::cpu::GANVAS_ISA
