// The part that is compiled once: workspace, and the choice of instruction set.
#include "pending_gradient.h"

#include "parallel.h"
#include "workspace.h"

namespace ganvas::cpu {

void settle_pending_gradient(const PendingGradient& args, int threads) {
    const std::int64_t bytes = args.rows * args.channels * element_bytes(args.dtype);
    const std::size_t floats =
        static_cast<std::size_t>(args.groups * gradient_coefficients * args.channels) * sizeof(float);
    Workspace workspace(Workspace::padded(floats));
    float* coefficients = static_cast<float*>(workspace.take(floats));
    threads = team_size(3 * bytes, threads);
    GANVAS_DISPATCH(settle_pending_gradient(args, threads, coefficients))
}

}  // namespace ganvas::cpu
