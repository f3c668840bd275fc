// Sums of parts become those of the whole. A kernel that writes many values leaves statistics of each tile of them;
// what is here joins the tiles, always in the same order. All addresses are device memory.
#pragma once

#include <cstdint>

#include "device.h"

namespace ganvas::cuda {

// Statistics of T tiles in each of G groups, and what a layer needs of the whole (Chan, Golub & LeVeque 1983).
struct TileStatistics {
    std::int64_t groups, tiles, channels;  // G, T, C
    const float* counts;      // [G, T]: 0 for a tile with nothing in it, whose statistics are not looked at
    const float* means;       // [G, T, C]
    const float* deviations;  // [G, T, C]: Σ(x − the tile's mean)²
    const float* weight;      // γ: [C] or null: 1
    const float* bias;        // β: [C] or null: 0
    float eps;
    float* running_mean;  // [C] or null; moved by `momentum` towards each group's statistics, in order
    float* running_var;   // [C] or null; likewise, with Bessel's correction
    float momentum;
    float* mean;       // [G, C]
    float* var;        // [G, C], biased
    float* scale;      // [G, C] or null: γ/√(var + eps)
    float* shift;      // [G, C] or null: β − mean·scale
    float* workspace;  // finish_workspace_floats
};

// Scratch: many tiles are joined in two launches.
std::int64_t finish_workspace_floats(std::int64_t groups, std::int64_t tiles, std::int64_t channels);

void finish_statistics(const TileStatistics& args, Queue queue);

// sums[i, c] = Σ_t parts[i, t, c], for `arrays` many i.
struct TileSums {
    std::int64_t arrays, tiles, channels;
    const float* parts;  // [arrays, T, C]
    float* sums;         // [arrays, C]
};

void sum_tiles(const TileSums& args, Queue queue);

}  // namespace ganvas::cuda
