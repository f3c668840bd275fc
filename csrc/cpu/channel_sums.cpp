// The part that is compiled once: workspace, and the choice of instruction set.
#include "channel_sums.h"

#include <algorithm>

#include "parallel.h"
#include "workspace.h"

namespace ganvas::cpu {

void channel_sums(const ChannelSums& args, int threads) {
    threads = team_size(args.rows * args.channels * element_bytes(args.dtype), threads);
    // Few channels: some rows side by side, so that they fill the vector registers.
    const std::int64_t pack = std::max<std::int64_t>(1, channel_sums_pack_width / args.channels);
    const auto bytes = static_cast<std::size_t>(threads * pack * args.channels) * sizeof(double);
    Workspace workspace(Workspace::padded(bytes));
    double* const sums = static_cast<double*>(workspace.take(bytes));
    GANVAS_DISPATCH(channel_sums(args, pack, threads, sums))
}

}  // namespace ganvas::cpu
