// What kernels that keep to their channels have in common: the way down the rows, sums over a block, values per
// channel. Tiling and Place are explained in channels.h.
#pragma once

#include "channels.h"
#include "vector.h"

namespace ganvas::cuda {

// LeakyReLU. With slope 0 it is ReLU, also at -inf, where -inf*0 would be NaN.
struct Leaky {
    float slope, lowest;

    explicit Leaky(float slope) : slope(slope), lowest(slope == 0.0f ? -3.40282347e38f : -INFINITY) {}
    __device__ float operator()(float x) const { return x > 0.0f ? x : (x < lowest ? lowest : x) * slope; }
    __device__ float grad(float incoming, float x) const { return x > 0.0f ? incoming : incoming * slope; }
};

// One value per channel of a group: a normalisation's statistics and parameters.
struct Norm {
    const float* weight;  // [C] or null: 1
    const float* bias;    // [C] or null: 0
    const float* mean;    // [G, C]
    const float* var;     // [G, C]
    float eps;

    __device__ float weight_of(Index c) const { return weight == nullptr ? 1.0f : weight[c]; }
    __device__ float bias_of(Index c) const { return bias == nullptr ? 0.0f : bias[c]; }
};

__device__ inline float inverse_deviation(float var, float eps) {
    return __frsqrt_rn(var + eps);
}

__device__ inline void move_running(float* running, float batch, float momentum) {
    *running += momentum * (batch - *running);
}

// Calls batch(offset, stride, present) for `unroll` vectors at a time, `stride` values apart, of which the first
// `present` are there: loads that wait for none of the others. Where accesses are narrower than a vector, calls
// one(offset, count) for each. Backwards, the last chunk comes first: what the walk before read last is still in the L2
// cache.
template <int unroll, bool backwards, class Batch, class One>
__device__ void walk(const Tiling& tiling, const Place& place, Index group, Batch batch, One one) {
    if (!place.active) return;
    const Index chunks = tiling.chunks(unroll), whole = tiling.whole_packed_rows();
    const Index rows = whole + (tiling.count(whole, place.vector) > 0);  // that this vector is in
    for (Index i = place.slice; i < chunks; i += tiling.slices) {
        const Index chunk = backwards ? chunks - 1 - i : i;
        const Index first = chunk * tiling.row_lanes * unroll + place.row;
        if (tiling.access == vector_bytes) {
            int present = 0;
#pragma unroll
            for (int u = 0; u < unroll; ++u) present += first + u * tiling.row_lanes < rows;
            batch(tiling.offset(group, first, place.vector), tiling.row_lanes * tiling.width(), present);
        } else {
#pragma unroll 1
            for (Index row = first; row < rows && row < first + unroll * tiling.row_lanes; row += tiling.row_lanes)
                one(tiling.offset(group, row, place.vector), tiling.count(row, place.vector));
        }
    }
}

// The first `present` vectors, zeros for the others.
template <int unroll, class T>
__device__ void load_batch(const T* source, Index stride, int present, Vector<T> (&vector)[unroll]) {
#pragma unroll
    for (int u = 0; u < unroll; ++u) vector[u] = u < present ? load_vector(source + u * stride) : Vector<T>{};
}

// Joins `value` of the threads of a column, two and two, into that of its first thread: join(mine, other). Every thread
// of the block calls it.
template <int values, class Join>
__device__ void reduce_columns(const Tiling& tiling, const Place& place, float (&value)[values], Join join) {
    __shared__ float shared[values][most_threads / 2];
    for (int rows = tiling.row_lanes; rows > 1;) {
        const int half = (rows + 1) / 2;
        if (place.row >= half && place.row < rows) {
#pragma unroll
            for (int i = 0; i < values; ++i) shared[i][(place.row - half) * tiling.tile + place.column] = value[i];
        }
        __syncthreads();
        if (place.row + half < rows) {
            float other[values];
#pragma unroll
            for (int i = 0; i < values; ++i) other[i] = shared[i][place.row * tiling.tile + place.column];
            join(value, other);
        }
        __syncthreads();
        rows = half;
    }
}

// Values per lane of a block's tile, in shared memory: threads prepare them together, then each takes those of its
// column.
using Staged = float (*)[most_tile_values];

// Calls put(lane, channel) for each lane of the block's tile that has a channel, spread over its threads.
template <class Put>
__device__ void for_tile_lanes(const Tiling& tiling, const Place& place, Put put) {
    const Index first = place.tile * tiling.tile * tiling.lanes;
    for (int lane = static_cast<int>(threadIdx.x); lane < tiling.tile * tiling.lanes; lane += tiling.threads()) {
        const Index channel = tiling.pack == 1 ? first + lane : (first + lane) % tiling.channels;
        if (channel < tiling.channels) put(lane, channel);
    }
}

// scale*(x − mean) + bias: the difference first, so that nothing cancels where the mean is large.
template <int lanes>
struct Affine {
    float scale[lanes], mean[lanes], bias[lanes];

    __device__ Affine(Staged staged, const Place& place) {
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) {
            scale[lane] = staged[0][place.column * lanes + lane];
            mean[lane] = staged[1][place.column * lanes + lane];
            bias[lane] = staged[2][place.column * lanes + lane];
        }
    }
    __device__ float operator()(int lane, float x) const { return fmaf(scale[lane], x - mean[lane], bias[lane]); }
};

// What Affine takes.
__device__ inline void stage_affine(const Norm& norm, const Tiling& tiling, const Place& place, Index group,
                                    Staged staged) {
    for_tile_lanes(tiling, place, [&](int lane, Index c) {
        const Index at = group * tiling.channels + c;
        staged[0][lane] = norm.weight_of(c) * inverse_deviation(norm.var[at], norm.eps);
        staged[1][lane] = norm.mean[at];
        staged[2][lane] = norm.bias_of(c);
    });
}

}  // namespace ganvas::cuda
