// BatchNorm's gradients from Σg and Σg·(x − mean), where g = dL/d(scale*x + shift):
//
//   dL/dx = scale*(g − Σg/n − (x − mean)·Σg(x − mean)/(n·(var + eps)))    with batch statistics, scale*g without
//
// x is lrelu(y) if the activation comes first; then dL/dy is that, times the kink.
#pragma once

#include "columns.h"

namespace ganvas::cuda {

// A thread's sums, or a block's.
template <int lanes>
struct GradientSums {
    float value[2 * lanes] = {};  // Σg, then Σg·(x − mean)

    __device__ void add(int lane, float g, float deviation) {
        value[lane] += g;
        value[lanes + lane] = fmaf(g, deviation, value[lanes + lane]);
    }
    // Those of a column's threads, in its first thread.
    __device__ void reduce(const Tiling& tiling, const Place& place) {
        reduce_columns(tiling, place, value, [](float (&mine)[2 * lanes], const float (&other)[2 * lanes]) {
#pragma unroll
            for (int i = 0; i < 2 * lanes; ++i) mine[i] += other[i];
        });
    }
    // ... of a slice, as one of `tiles` tiles: parts [2, G, tiles, C] are at the vector's place in tile 0 of group 0.
    __device__ void write(float* parts, Index from_sums_to_deviations, int count) const {
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) {
            if (lane >= count) break;
            parts[lane] = value[lane];
            parts[from_sums_to_deviations + lane] = value[lanes + lane];
        }
    }
};

// dL/dx = scale*(g − mean_grad − (x − mean)*projection). The affine map is what the activation behind the norm was
// applied to: the same operations as forward, so the same side of the kink.
template <int lanes>
struct GradientMap {
    Affine<lanes> affine;
    float mean_grad[lanes], projection[lanes];

    __device__ GradientMap(Staged staged, const Place& place) : affine(staged, place) {
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) {
            mean_grad[lane] = staged[3][place.column * lanes + lane];
            projection[lane] = staged[4][place.column * lanes + lane];
        }
    }

    // The stored value's gradient. Fixed statistics carry none: then nothing is projected out, not even a NaN.
    template <bool activation_first>
    __device__ float operator()(int lane, float grad, float stored, const Leaky& leaky, bool training) const {
        const float x = activation_first ? leaky(stored) : stored;
        const float g = activation_first ? grad : leaky.grad(grad, affine(lane, x));
        const float projected = (g - mean_grad[lane]) - (x - affine.mean[lane]) * projection[lane];
        const float result = affine.scale[lane] * (training ? projected : g);
        return activation_first ? leaky.grad(result, stored) : result;
    }
};

// Sums over the rows of each group.
struct GroupSums {
    const float* sum;            // [G, C]: Σg
    const float* sum_deviation;  // [G, C]: Σg·(x − mean)
    float rows;                  // of a group
};

// What GradientMap takes.
__device__ inline void stage_gradient(const Norm& norm, const GroupSums& sums, const Tiling& tiling, const Place& place,
                                      Staged staged) {
    stage_affine(norm, tiling, place, place.group, staged);
    for_tile_lanes(tiling, place, [&](int lane, Index c) {
        const Index at = place.group * tiling.channels + c;
        const float inverse = inverse_deviation(norm.var[at], norm.eps);
        staged[3][lane] = sums.sum[at] / sums.rows;
        staged[4][lane] = sums.sum_deviation[at] / sums.rows * inverse * inverse;
    });
}

// γ's and β's, which the first blocks of the first group write, each for the channels of its tile.
__device__ inline void write_parameter_gradients(const Norm& norm, const GroupSums& sums, const Tiling& tiling,
                                                 const Place& place, float* grad_weight, float* grad_bias) {
    if (place.slice > 0 || place.group > 0) return;
    for (int local = static_cast<int>(threadIdx.x); local < tiling.tile_channels(place.tile);
         local += tiling.threads()) {
        const Index c = tiling.first_channel(place.tile) + local;
        float of_weight = 0.0f, of_bias = 0.0f;
        for (Index at = c; at < tiling.groups * tiling.channels; at += tiling.channels) {
            of_weight += sums.sum_deviation[at] * inverse_deviation(norm.var[at], norm.eps);
            of_bias += sums.sum[at];
        }
        grad_weight[c] = of_weight;
        grad_bias[c] = of_bias;
    }
}

}  // namespace ganvas::cuda
