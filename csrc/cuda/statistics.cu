// A block takes neighbouring channels, with several threads for each that go through the tiles in turn. Two walks, of
// which the second one knows the mean, take the place of Chan's pairwise formula: the same result without a division
// for each tile.
#include "statistics.h"

#include <cuda_runtime.h>

#include "columns.h"
#include "launch.h"

namespace ganvas::cuda {
namespace {

constexpr int threads = most_threads;
constexpr Index tiles_per_thread = 8;      // estimated: with fewer, threads of one channel only wait for each other
constexpr Index joined_at_once = 1 << 17;  // tiles times channels: with more, the few channels' blocks would take long
constexpr Index joined_tiles = 64;         // that many are left for the second launch

// A thread's channel, and its share of the tiles: every `step`-th from `first` on.
struct Lane {
    Index channel;
    int first, step;
};

// Threads for each of a block's channels: a power of two.
int lanes_for(Index tiles) {
    int lanes = 1;
    while (lanes < threads && lanes * tiles_per_thread < tiles) lanes *= 2;
    return lanes;
}

__device__ Lane lane_of(int lanes, Index block) {
    const int channels = threads / lanes, thread = static_cast<int>(threadIdx.x);
    return {block * channels + thread % channels, thread / channels, lanes};
}

// The sums over a channel's threads, in each of them. Every thread of the block calls it.
template <int values>
__device__ void sum_lanes(int lanes, double (&value)[values]) {
    __shared__ double shared[values][threads];
    const int thread = static_cast<int>(threadIdx.x), channels = threads / lanes;
#pragma unroll
    for (int i = 0; i < values; ++i) shared[i][thread] = value[i];
    __syncthreads();
    for (int half = lanes / 2; half > 0; half /= 2) {
        if (thread < half * channels) {
#pragma unroll
            for (int i = 0; i < values; ++i) shared[i][thread] += shared[i][thread + half * channels];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < values; ++i) value[i] = shared[i][thread % channels];
    __syncthreads();
}

struct Moments {
    double count, mean, deviation;
};

// Of tiles [begin, end) of a group.
__device__ Moments join_tiles(const TileStatistics& args, Index group, Index begin, Index end, const Lane& lane) {
    const float* const counts = args.counts + group * args.tiles;
    const Index start = group * args.tiles * args.channels + lane.channel;
    const bool there = lane.channel < args.channels;
    double sums[2] = {};  // of the counts, of the values
#pragma unroll 4
    for (Index tile = begin + lane.first; there && tile < end; tile += lane.step) {
        const float count = counts[tile], mean = args.means[start + tile * args.channels];
        if (count > 0.0f) {
            sums[0] += static_cast<double>(count);
            sums[1] += static_cast<double>(count) * static_cast<double>(mean);
        }
    }
    sum_lanes(lane.step, sums);
    const double mean = sums[1] / sums[0];
    double deviation[1] = {};
#pragma unroll 4
    for (Index tile = begin + lane.first; there && tile < end; tile += lane.step) {
        const float count = counts[tile];
        const double offset = static_cast<double>(args.means[start + tile * args.channels]) - mean;
        const float own = args.deviations[start + tile * args.channels];
        if (count > 0.0f) deviation[0] += static_cast<double>(own) + static_cast<double>(count) * offset * offset;
    }
    sum_lanes(lane.step, deviation);
    return {sums[0], mean, deviation[0]};
}

struct JoinArgs {
    TileStatistics tiles;
    int lanes;
    Index channel_blocks, parts;         // of the grid
    float *counts, *means, *deviations;  // [G, parts], [G, parts, C] twice
};

__global__ void __launch_bounds__(threads, 4) join_kernel(const __grid_constant__ JoinArgs args) {
    const TileStatistics& tiles = args.tiles;
    const Index block = blockIdx.x, part = block / args.channel_blocks % args.parts;
    const Index group = block / args.channel_blocks / args.parts;
    const Lane lane = lane_of(args.lanes, block % args.channel_blocks);
    const Index begin = tiles.tiles * part / args.parts, end = tiles.tiles * (part + 1) / args.parts;
    const Moments joined = join_tiles(tiles, group, begin, end, lane);
    if (lane.first > 0 || lane.channel >= tiles.channels) return;
    const Index at = group * args.parts + part;
    if (lane.channel == 0) args.counts[at] = static_cast<float>(joined.count);
    args.means[at * tiles.channels + lane.channel] = static_cast<float>(joined.mean);
    args.deviations[at * tiles.channels + lane.channel] = static_cast<float>(joined.deviation);
}

struct FinishArgs {
    TileStatistics tiles;
    int lanes;
};

__device__ void finish_channel(const TileStatistics& args, Index group, Index c, const Moments& moments) {
    const Index at = group * args.channels + c;
    const float mean = static_cast<float>(moments.mean), var = static_cast<float>(moments.deviation / moments.count);
    args.mean[at] = mean;
    args.var[at] = var;
    if (args.running_mean != nullptr) {
        const double unbiased = moments.deviation / (moments.count > 1.0 ? moments.count - 1.0 : 1.0);
        move_running(args.running_mean + c, mean, args.momentum);
        move_running(args.running_var + c, static_cast<float>(unbiased), args.momentum);
    }
    if (args.scale == nullptr) return;
    const float scale = (args.weight == nullptr ? 1.0f : args.weight[c]) * inverse_deviation(var, args.eps);
    args.scale[at] = scale;
    args.shift[at] = fmaf(-mean, scale, args.bias == nullptr ? 0.0f : args.bias[c]);
}

__global__ void __launch_bounds__(threads, 4) finish_kernel(const __grid_constant__ FinishArgs args) {
    const TileStatistics& tiles = args.tiles;
    const Lane lane = lane_of(args.lanes, blockIdx.x);
    for (Index group = 0; group < tiles.groups; ++group) {
        const Moments moments = join_tiles(tiles, group, 0, tiles.tiles, lane);
        if (lane.first == 0 && lane.channel < tiles.channels) finish_channel(tiles, group, lane.channel, moments);
    }
}

struct SumArgs {
    TileSums tiles;
    int lanes;
    Index channel_blocks;
};

__global__ void __launch_bounds__(threads, 4) sum_kernel(const __grid_constant__ SumArgs args) {
    const TileSums& tiles = args.tiles;
    const Index array = blockIdx.x / args.channel_blocks;
    const Lane lane = lane_of(args.lanes, blockIdx.x % args.channel_blocks);
    const float* const parts = tiles.parts + array * tiles.tiles * tiles.channels + lane.channel;
    double sum[1] = {};
#pragma unroll 4
    for (Index tile = lane.first; lane.channel < tiles.channels && tile < tiles.tiles; tile += lane.step)
        sum[0] += static_cast<double>(parts[tile * tiles.channels]);
    sum_lanes(lane.step, sum);
    if (lane.first == 0 && lane.channel < tiles.channels)
        tiles.sums[array * tiles.channels + lane.channel] = static_cast<float>(sum[0]);
}

bool joins_twice(Index tiles, Index channels) {
    return tiles > joined_tiles && tiles * channels > joined_at_once;
}

}  // namespace

std::int64_t finish_workspace_floats(std::int64_t groups, std::int64_t tiles, std::int64_t channels) {
    return joins_twice(tiles, channels) ? groups * joined_tiles * (2 * channels + 1) : 0;
}

void finish_statistics(const TileStatistics& args, Queue queue) {
    TileStatistics tiles = args;
    if (joins_twice(tiles.tiles, tiles.channels)) {
        const int lanes = lanes_for(ceiling(tiles.tiles, joined_tiles));
        const Index channel_blocks = ceiling(tiles.channels, threads / lanes);
        float* const counts = args.workspace;
        float* const means = counts + tiles.groups * joined_tiles;
        float* const deviations = means + tiles.groups * joined_tiles * tiles.channels;
        launch("join_statistics", join_kernel, channel_blocks * joined_tiles * tiles.groups, threads,
               JoinArgs{tiles, lanes, channel_blocks, joined_tiles, counts, means, deviations}, queue);
        tiles.tiles = joined_tiles;
        tiles.counts = counts, tiles.means = means, tiles.deviations = deviations;
    }
    const int lanes = lanes_for(tiles.tiles);
    launch("finish_statistics", finish_kernel, ceiling(tiles.channels, threads / lanes), threads,
           FinishArgs{tiles, lanes}, queue);
}

void sum_tiles(const TileSums& args, Queue queue) {
    const int lanes = lanes_for(args.tiles);
    const Index channel_blocks = ceiling(args.channels, threads / lanes);
    launch("sum_tiles", sum_kernel, channel_blocks * args.arrays, threads, SumArgs{args, lanes, channel_blocks}, queue);
}

}  // namespace ganvas::cuda
