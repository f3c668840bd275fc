// A thread takes a vector of channels in a window of 2×2 pixels. Backward goes from the pooled map's gradient straight
// to that of the stored values: one pass for the sums that BatchNorm needs, one that writes.
#include "max_pool.h"

#include <cuda_runtime.h>

#include "gradient.h"
#include "launch.h"
#include "statistics.h"
#include "windows.h"

namespace ganvas::cuda {
namespace {

constexpr int forward_blocks = 3, backward_blocks = 2;  // of a multiprocessor: __launch_bounds__ sees to it

template <class T>
struct PoolArgs {
    Tiling tiling;
    Windows windows;
    const T* stored;
    Norm norm;
    Leaky leaky;
    T* output = nullptr;
    std::uint8_t* index = nullptr;
    // Backward.
    const T* grad_output = nullptr;
    T* grad_input = nullptr;
    bool training = false;
    float* parts = nullptr;       // [2, G, slices, C]
    const float* sums = nullptr;  // [2, G, C]
    float rows = 0.0f;            // stored pixels of a group
    float* grad_weight = nullptr;
    float* grad_bias = nullptr;
};

// Calls body(window, channel, count) for the windows of the place's slice: a thread's lanes are `count` channels.
template <class Body>
__device__ void for_windows(const Tiling& tiling, const Windows& windows, const Place& place, Body body) {
    const int count = tiling.count(0, place.vector);
    if (!place.active || count == 0) return;
    for (Index i = place.slice * tiling.row_lanes + place.row; i < windows.count();
         i += tiling.slices * tiling.row_lanes)
        body(Window(windows, place.group, i), place.vector * tiling.lanes, count);
}

// Which of a window's four pixels each lane's value comes from: a byte for each.
template <int lanes>
struct Winners {
    unsigned word[lanes / 4] = {};

    __device__ int operator[](int lane) const { return static_cast<int>(word[lane / 4] >> lane % 4 * 8 & 3u); }
    __device__ void set(int lane, int pixel) { word[lane / 4] |= static_cast<unsigned>(pixel) << lane % 4 * 8; }

    __device__ static Winners load(const std::uint8_t* source, int count, bool whole) {
        Winners winners;
        if (whole) {
#pragma unroll
            for (int i = 0; i < lanes / 4; ++i) winners.word[i] = reinterpret_cast<const unsigned*>(source)[i];
        } else {
#pragma unroll
            for (int lane = 0; lane < lanes; ++lane)
                if (lane < count) winners.set(lane, source[lane]);
        }
        return winners;
    }
    __device__ void store(std::uint8_t* destination, int count, bool whole) const {
        if (whole) {
#pragma unroll
            for (int i = 0; i < lanes / 4; ++i) reinterpret_cast<unsigned*>(destination)[i] = word[i];
        } else {
#pragma unroll
            for (int lane = 0; lane < lanes; ++lane)
                if (lane < count) destination[lane] = static_cast<std::uint8_t>((*this)[lane]);
        }
    }
};

// The four pixels, row by row; those that the map does not have are zeros.
template <class T>
__device__ void load_window(const PoolArgs<T>& args, const Window& window, Index channel, int count,
                            Vector<T> (&pixel)[4]) {
    const Tiling& tiling = args.tiling;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        pixel[k] = Vector<T>{};
        if (k / 2 < window.rows && k % 2 < window.columns)
            pixel[k] =
                load_part(args.stored + (window.first + k / 2 * args.windows.width + k % 2) * tiling.channels + channel,
                          count, tiling.access);
    }
}

template <bool activation_first, class T>
__global__ void __launch_bounds__(most_threads, forward_blocks)
    forward_kernel(const __grid_constant__ PoolArgs<T> args) {
    constexpr int lanes = Vector<T>::lanes;
    __shared__ float shared[3][most_tile_values];
    const Tiling& tiling = args.tiling;
    const Place place(tiling, blockIdx.x, static_cast<int>(threadIdx.x));
    stage_affine(args.norm, tiling, place, place.group, shared);
    __syncthreads();
    const Affine<lanes> affine(shared, place);
    for_windows(tiling, args.windows, place, [&](const Window& window, Index channel, int count) {
        Vector<T> pixel[4], pooled;
        load_window(args, window, channel, count, pixel);
        float values[lanes];
        Winners<lanes> winners;
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) {
            int winner = 0;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float x = pixel[k][lane];
                const float value = activation_first ? affine(lane, args.leaky(x)) : args.leaky(affine(lane, x));
                if (k == 0 || value > values[lane] || value != value) values[lane] = value, winner = k;
            }
            winners.set(lane, winner);
        }
        pooled.set(values);
        const Index at = window.pooled * tiling.channels + channel;
        store_part(args.output + at, pooled, count, tiling.access);
        winners.store(args.index + at, count, tiling.access == vector_bytes);
    });
}

template <bool activation_first, class T>
__global__ void __launch_bounds__(most_threads, backward_blocks) sums_kernel(const __grid_constant__ PoolArgs<T> args) {
    constexpr int lanes = Vector<T>::lanes;
    __shared__ float shared[3][most_tile_values];
    const Tiling& tiling = args.tiling;
    const Place place(tiling, blockIdx.x, static_cast<int>(threadIdx.x));
    stage_affine(args.norm, tiling, place, place.group, shared);
    __syncthreads();
    const Affine<lanes> affine(shared, place);
    GradientSums<lanes> sums;
    for_windows(tiling, args.windows, place, [&](const Window& window, Index channel, int count) {
        const Index at = window.pooled * tiling.channels + channel;
        Vector<T> pixel[4];
        load_window(args, window, channel, count, pixel);
        const Vector<T> grad = load_part(args.grad_output + at, count, tiling.access);
        const auto winners = Winners<lanes>::load(args.index + at, count, tiling.access == vector_bytes);
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) {
            const int winner = winners[lane];
            const float upper = winner & 1 ? pixel[1][lane] : pixel[0][lane];
            const float lower = winner & 1 ? pixel[3][lane] : pixel[2][lane];
            const float stored = winner & 2 ? lower : upper, x = activation_first ? args.leaky(stored) : stored;
            const float g = activation_first ? grad[lane] : args.leaky.grad(grad[lane], affine(lane, x));
            if (lane < count) sums.add(lane, g, x - affine.mean[lane]);
        }
    });
    sums.reduce(tiling, place);
    if (place.row > 0 || !place.active) return;
    const Index tile = place.group * tiling.slices + place.slice;
    sums.write(args.parts + tile * tiling.channels + place.vector * lanes,
               tiling.groups * tiling.slices * tiling.channels, tiling.count(0, place.vector));
}

// Every stored value has a gradient, the winner's and, through the statistics, that of the others and of pixels left
// out.
template <bool activation_first, class T>
__global__ void __launch_bounds__(most_threads, backward_blocks)
    write_kernel(const __grid_constant__ PoolArgs<T> args) {
    constexpr int lanes = Vector<T>::lanes;
    __shared__ float shared[5][most_tile_values];
    const Tiling& tiling = args.tiling;
    const Place place(tiling, blockIdx.x, static_cast<int>(threadIdx.x));
    const GroupSums sums{args.sums, args.sums + tiling.groups * tiling.channels, args.rows};
    stage_gradient(args.norm, sums, tiling, place, shared);
    write_parameter_gradients(args.norm, sums, tiling, place, args.grad_weight, args.grad_bias);
    __syncthreads();
    const GradientMap<lanes> map(shared, place);
    for_windows(tiling, args.windows, place, [&](const Window& window, Index channel, int count) {
        Vector<T> pixel[4], grad{};
        Winners<lanes> winners;
        load_window(args, window, channel, count, pixel);
        if (window.pooled >= 0) {
            const Index at = window.pooled * tiling.channels + channel;
            grad = load_part(args.grad_output + at, count, tiling.access);
            winners = Winners<lanes>::load(args.index + at, count, tiling.access == vector_bytes);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (k / 2 < window.rows && k % 2 < window.columns) {
                float values[lanes];
#pragma unroll
                for (int lane = 0; lane < lanes; ++lane)
                    values[lane] = map.template operator()<activation_first>(
                        lane, winners[lane] == k ? grad[lane] : 0.0f, pixel[k][lane], args.leaky, args.training);
                Vector<T> result;
                result.set(values);
                const Index at = (window.first + k / 2 * args.windows.width + k % 2) * tiling.channels + channel;
                store_part(args.grad_input + at, result, count, tiling.access);
            }
        }
    });
}

template <class T>
Tiling tiling_of(const MaxPoolInput& input, const Windows& windows, std::initializer_list<const void*> arrays,
                 const std::uint8_t* index) {
    constexpr int bytes = sizeof(T), lanes = Vector<T>::lanes;
    int access = widest_access(arrays, input.channels * bytes);
    if (reinterpret_cast<std::uintptr_t>(index) % lanes != 0 && access == vector_bytes) access /= 2;
    return tiling_of_pixels(bytes, windows.count(), input.channels, input.groups, access);
}

template <class T>
PoolArgs<T> pool_args(const MaxPoolInput& input, bool open) {
    return {{},
            Windows(input.batch / input.groups, input.height, input.width, open),
            static_cast<const T*>(input.stored),
            {input.weight, input.bias, input.mean, input.var, input.eps},
            Leaky(input.negative_slope)};
}

template <bool activation_first, class T>
void forward(const MaxPoolForward& args, Queue queue) {
    constexpr const char* name = "max_pool_forward";
    PoolArgs<T> pool = pool_args<T>(args.input, false);
    pool.tiling = tiling_of<T>(args.input, pool.windows, {args.input.stored, args.output}, args.index);
    cut(pool.tiling, 1, Index{multiprocessors(name, queue)} * forward_blocks);
    pool.output = static_cast<T*>(args.output);
    pool.index = args.index;
    launch(name, forward_kernel<activation_first, T>, pool.tiling.blocks(), pool.tiling.threads(), pool, queue);
}

template <bool activation_first, class T>
void backward(const MaxPoolBackward& args, Queue queue) {
    constexpr const char* name = "max_pool_backward";
    const MaxPoolInput& input = args.input;
    const Index blocks = Index{multiprocessors(name, queue)} * backward_blocks;
    const std::initializer_list<const void*> arrays = {input.stored, args.grad_output, args.grad_input};
    PoolArgs<T> pool = pool_args<T>(input, false);
    pool.tiling = tiling_of<T>(input, pool.windows, arrays, args.index);
    cut(pool.tiling, 1, blocks);
    float* const sums = args.workspace;
    pool.index = const_cast<std::uint8_t*>(args.index);
    pool.grad_output = static_cast<const T*>(args.grad_output);
    pool.grad_input = static_cast<T*>(args.grad_input);
    pool.training = args.training;
    pool.sums = sums;
    pool.parts = sums + 2 * input.groups * input.channels;
    pool.rows = static_cast<float>(input.batch / input.groups * input.height * input.width);
    pool.grad_weight = args.grad_weight;
    pool.grad_bias = args.grad_bias;
    launch(name, sums_kernel<activation_first, T>, pool.tiling.blocks(), pool.tiling.threads(), pool, queue);
    sum_tiles({2 * input.groups, pool.tiling.slices, input.channels, pool.parts, sums}, queue);
    pool.windows = Windows(input.batch / input.groups, input.height, input.width, true);
    pool.tiling = tiling_of<T>(input, pool.windows, arrays, args.index);
    cut(pool.tiling, 1, blocks);
    launch(name, write_kernel<activation_first, T>, pool.tiling.blocks(), pool.tiling.threads(), pool, queue);
}

}  // namespace

std::int64_t max_pool_workspace_floats(const MaxPoolInput& input, int device) {
    const Windows windows(input.batch / input.groups, input.height, input.width, false);
    Tiling tiling = input.dtype == Dtype::float32 ? tiling_of<float>(input, windows, {}, nullptr)
                                                  : tiling_of<__half>(input, windows, {}, nullptr);
    cut(tiling, 1, Index{multiprocessors("max_pool_workspace", {device, nullptr})} * backward_blocks);
    return 2 * input.groups * (tiling.slices + 1) * input.channels;
}

void max_pool_forward(const MaxPoolForward& args, Queue queue) {
    const bool first = args.input.activation_first;
    switch (args.input.dtype) {
        case Dtype::float32:
            return first ? forward<true, float>(args, queue) : forward<false, float>(args, queue);
        case Dtype::bfloat16:
            return first ? forward<true, __nv_bfloat16>(args, queue) : forward<false, __nv_bfloat16>(args, queue);
        case Dtype::float16:
            return first ? forward<true, __half>(args, queue) : forward<false, __half>(args, queue);
    }
}

void max_pool_backward(const MaxPoolBackward& args, Queue queue) {
    const bool first = args.input.activation_first;
    switch (args.input.dtype) {
        case Dtype::float32:
            return first ? backward<true, float>(args, queue) : backward<false, float>(args, queue);
        case Dtype::bfloat16:
            return first ? backward<true, __nv_bfloat16>(args, queue) : backward<false, __nv_bfloat16>(args, queue);
        case Dtype::float16:
            return first ? backward<true, __half>(args, queue) : backward<false, __half>(args, queue);
    }
}

}  // namespace ganvas::cuda
