// Backward. Each slice of the rows leaves its sums of the gradient, which a small kernel adds up; a last pass writes
// the input's gradient. Where a block can take all rows of its channels, one launch does it all.
#include <cuda_runtime.h>

#include <algorithm>

#include "batch_norm_plan.h"
#include "gradient.h"
#include "launch.h"
#include "statistics.h"

namespace ganvas::cuda {
namespace {

enum class Form { bn_act, bn_add_act, act_bn };

template <class T>
struct PassArgs {
    Tiling tiling;
    const T* grad_output;
    const T* input;
    const T* output;   // with a residual
    T* grad_residual;  // with a residual
    T* grad_input;
    Norm norm;
    Leaky leaky;
    const T* last_grad;  // what the second pass reads: grad_output, or grad_residual where the kink is behind it
    Leaky last_kink;
    bool training;
    float* parts;        // [2, G, slices*pack, C]: what the first pass leaves
    const float* sums;   // [2, G, C]: what the second pass takes
    float* grad_weight;  // [C]
    float* grad_bias;    // [C]
};

template <Form form>
constexpr int sums_unroll = form == Form::bn_add_act ? few_unroll : backward_unroll;

// The first pass over the slice of the group's rows that the place tells.
template <Form form, class T>
__device__ void add_slice(const PassArgs<T>& args, const Place& place, Index group,
                          const Affine<Vector<T>::lanes>& affine, GradientSums<Vector<T>::lanes>& sums) {
    constexpr int lanes = Vector<T>::lanes, unroll = sums_unroll<form>;
    const Tiling& tiling = args.tiling;
    // With a residual, `grad` becomes the gradient after the kink, as it is stored: the second pass reads that.
    const auto add = [&](Vector<T>& grad, const Vector<T>& x, const Vector<T>& output, int count) {
        if constexpr (form == Form::bn_add_act) {
            float values[lanes];
#pragma unroll
            for (int lane = 0; lane < lanes; ++lane) values[lane] = args.leaky.grad(grad[lane], output[lane]);
            grad.set(values);
        }
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) {
            const float value = form == Form::act_bn ? args.leaky(x[lane]) : x[lane];
            const float g = form == Form::bn_act ? args.leaky.grad(grad[lane], affine(lane, value)) : grad[lane];
            if (lane < count) sums.add(lane, g, value - affine.mean[lane]);
        }
    };
    walk<unroll, false>(
        tiling, place, group,
        [&](Index offset, Index stride, int present) {
            Vector<T> grad[unroll], x[unroll], output[unroll];
            load_batch(args.grad_output + offset, stride, present, grad);
            load_batch(args.input + offset, stride, present, x);
            if constexpr (form == Form::bn_add_act) load_batch(args.output + offset, stride, present, output);
#pragma unroll
            for (int u = 0; u < unroll; ++u) {
                if (u >= present) break;
                add(grad[u], x[u], output[u], lanes);
                if constexpr (form == Form::bn_add_act) store_vector(args.grad_residual + offset + u * stride, grad[u]);
            }
        },
        [&](Index offset, int count) {
            Vector<T> grad = load_part(args.grad_output + offset, count, tiling.access), output{};
            const Vector<T> x = load_part(args.input + offset, count, tiling.access);
            if constexpr (form == Form::bn_add_act) output = load_part(args.output + offset, count, tiling.access);
            add(grad, x, output, count);
            if constexpr (form == Form::bn_add_act) store_part(args.grad_residual + offset, grad, count, tiling.access);
        });
}

template <Form form, class T>
__global__ void __launch_bounds__(most_threads, backward_blocks) sums_kernel(const __grid_constant__ PassArgs<T> args) {
    constexpr int lanes = Vector<T>::lanes;
    __shared__ float shared[3][most_tile_values];
    const Tiling& tiling = args.tiling;
    const Place place(tiling, blockIdx.x, static_cast<int>(threadIdx.x));
    stage_affine(args.norm, tiling, place, place.group, shared);
    __syncthreads();
    GradientSums<lanes> sums;
    add_slice<form>(args, place, place.group, Affine<lanes>(shared, place), sums);
    sums.reduce(tiling, place);
    if (place.row > 0 || !place.active) return;
    const Index tiles = tiles_of(tiling), first = place.group * tiles + place.slice * tiling.pack;
    sums.write(args.parts + first * tiling.channels + place.vector * lanes, tiling.groups * tiles * tiling.channels,
               lanes);
}

template <bool activation_first>
constexpr int write_unroll = activation_first ? few_unroll : backward_unroll;

// The second pass over it.
template <bool activation_first, class T>
__device__ void write_slice(const PassArgs<T>& args, const Place& place, Index group,
                            const GradientMap<Vector<T>::lanes>& map) {
    constexpr int lanes = Vector<T>::lanes, unroll = write_unroll<activation_first>;
    const Tiling& tiling = args.tiling;
    const auto gradient = [&](const Vector<T>& grad, const Vector<T>& x) {
        float values[lanes];
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane)
            values[lane] =
                map.template operator()<activation_first>(lane, grad[lane], x[lane], args.last_kink, args.training);
        Vector<T> result;
        result.set(values);
        return result;
    };
    walk<unroll, true>(
        tiling, place, group,
        [&](Index offset, Index stride, int present) {
            Vector<T> grad[unroll], x[unroll];
            load_batch(args.last_grad + offset, stride, present, grad);
            load_batch(args.input + offset, stride, present, x);
#pragma unroll
            for (int u = 0; u < unroll; ++u)
                if (u < present) store_vector(args.grad_input + offset + u * stride, gradient(grad[u], x[u]));
        },
        [&](Index offset, int count) {
            const Vector<T> grad = load_part(args.last_grad + offset, count, tiling.access);
            const Vector<T> x = load_part(args.input + offset, count, tiling.access);
            store_part(args.grad_input + offset, gradient(grad, x), count, tiling.access);
        });
}

template <bool activation_first, class T>
__global__ void __launch_bounds__(most_threads, backward_blocks)
    write_kernel(const __grid_constant__ PassArgs<T> args) {
    __shared__ float shared[5][most_tile_values];
    const Tiling& tiling = args.tiling;
    const Place place(tiling, blockIdx.x, static_cast<int>(threadIdx.x));
    const GroupSums sums{args.sums, args.sums + tiling.groups * tiling.channels, static_cast<float>(tiling.rows)};
    stage_gradient(args.norm, sums, tiling, place, shared);
    write_parameter_gradients(args.norm, sums, tiling, place, args.grad_weight, args.grad_bias);
    __syncthreads();
    write_slice<activation_first>(args, place, place.group, GradientMap<Vector<T>::lanes>(shared, place));
}

// All of it, for the channels of one tile.
template <Form form, class T>
__global__ void __launch_bounds__(most_threads, backward_blocks)
    whole_columns_kernel(const __grid_constant__ PassArgs<T> args) {
    constexpr int lanes = Vector<T>::lanes;
    __shared__ float shared[5][most_tile_values];
    const Tiling& tiling = args.tiling;
    const Place place(tiling, blockIdx.x, static_cast<int>(threadIdx.x));
    const int channels = tiling.tile_channels(place.tile);
    const float rows = static_cast<float>(tiling.rows);
    for (Index group = 0; group < tiling.groups; ++group) {
        stage_affine(args.norm, tiling, place, group, shared);
        __syncthreads();
        GradientSums<lanes> sums;
        add_slice<form>(args, place, group, Affine<lanes>(shared, place), sums);
        sums.reduce(tiling, place);
        if (place.row == 0) {
#pragma unroll
            for (int i = 0; i < 2 * lanes; ++i) shared[3 + i / lanes][place.column * lanes + i % lanes] = sums.value[i];
        }
        __syncthreads();
        for (int local = static_cast<int>(threadIdx.x); local < channels; local += tiling.threads()) {
            const Index c = tiling.first_channel(place.tile) + local;
            const float inverse = inverse_deviation(args.norm.var[group * tiling.channels + c], args.norm.eps);
            float sum = 0.0f, sum_deviation = 0.0f;
            for (int row = 0, lane = local; row < tiling.pack; ++row, lane += static_cast<int>(tiling.channels)) {
                sum += shared[3][lane];
                sum_deviation += shared[4][lane];
            }
            for (int row = 0, lane = local; row < tiling.pack; ++row, lane += static_cast<int>(tiling.channels)) {
                shared[3][lane] = sum / rows;
                shared[4][lane] = sum_deviation / rows * inverse * inverse;
            }
            args.grad_weight[c] = (group == 0 ? 0.0f : args.grad_weight[c]) + sum_deviation * inverse;
            args.grad_bias[c] = (group == 0 ? 0.0f : args.grad_bias[c]) + sum;
        }
        __syncthreads();
        write_slice<form == Form::act_bn>(args, place, group, GradientMap<lanes>(shared, place));
        __syncthreads();  // before the next group is staged
    }
}

template <Form form, class T>
void backward(const BatchNormBackward& args, Queue queue) {
    constexpr const char* name = "batch_norm_leaky_relu_backward";
    const BatchNormShape& shape = args.shape;
    const int processors = multiprocessors(name, queue);
    const bool add = form == Form::bn_add_act;
    T* const grad_residual = static_cast<T*>(args.grad_residual);
    const T* const grad_output = static_cast<const T*>(args.grad_output);
    PassArgs<T> pass{tiling_of(shape, {args.grad_output, args.input, args.output, args.grad_residual, args.grad_input}),
                     grad_output,
                     static_cast<const T*>(args.input),
                     static_cast<const T*>(args.output),
                     grad_residual,
                     static_cast<T*>(args.grad_input),
                     {args.weight, args.bias, args.mean, args.var, shape.eps},
                     Leaky(shape.negative_slope),
                     add ? grad_residual : grad_output,
                     Leaky(add ? 1.0f : shape.negative_slope),
                     args.training,
                     nullptr,
                     nullptr,
                     args.grad_weight,
                     args.grad_bias};
    if (take_whole_columns(pass.tiling, processors))
        return launch(name, whole_columns_kernel<form, T>, pass.tiling.tiles, pass.tiling.threads(), pass, queue);
    cut(pass.tiling, sums_unroll<form>, processors * backward_blocks);
    const Index tiles = tiles_of(pass.tiling);
    float* const sums = args.workspace;
    pass.sums = sums;
    pass.parts = sums + 2 * shape.groups * shape.channels;
    launch(name, sums_kernel<form, T>, pass.tiling.blocks(), pass.tiling.threads(), pass, queue);
    sum_tiles({2 * shape.groups, tiles, shape.channels, pass.parts, sums}, queue);
    cut(pass.tiling, write_unroll<form == Form::act_bn>, processors * backward_blocks);
    launch(name, write_kernel<form == Form::act_bn, T>, pass.tiling.blocks(), pass.tiling.threads(), pass, queue);
}

template <class T>
void backward_of(const BatchNormBackward& args, Queue queue) {
    if (args.grad_residual != nullptr) return backward<Form::bn_add_act, T>(args, queue);
    if (args.shape.activation_first) return backward<Form::act_bn, T>(args, queue);
    return backward<Form::bn_act, T>(args, queue);
}

template <class T>
void settle_of(const PendingGradient& args, Queue queue) {
    constexpr const char* name = "settle_pending_gradient";
    const BatchNormShape& shape = args.shape;
    PassArgs<T> pass{tiling_of(shape, {args.grad, args.stored}),
                     nullptr,
                     static_cast<const T*>(args.stored),
                     nullptr,
                     nullptr,
                     static_cast<T*>(args.grad),
                     {args.weight, nullptr, args.mean, args.var, shape.eps},
                     Leaky(shape.negative_slope),
                     static_cast<const T*>(args.grad),
                     Leaky(shape.activation_first ? shape.negative_slope : 1.0f),
                     args.training,
                     nullptr,
                     args.sums,
                     args.grad_weight,
                     args.grad_bias};
    cut(pass.tiling, shape.activation_first ? write_unroll<true> : write_unroll<false>,
        multiprocessors(name, queue) * backward_blocks);
    launch(name, shape.activation_first ? write_kernel<true, T> : write_kernel<false, T>, pass.tiling.blocks(),
           pass.tiling.threads(), pass, queue);
}

}  // namespace

void batch_norm_leaky_relu_backward(const BatchNormBackward& args, Queue queue) {
    switch (args.shape.dtype) {
        case Dtype::float32:
            return backward_of<float>(args, queue);
        case Dtype::bfloat16:
            return backward_of<__nv_bfloat16>(args, queue);
        case Dtype::float16:
            return backward_of<__half>(args, queue);
    }
}

void settle_pending_gradient(const PendingGradient& args, Queue queue) {
    switch (args.shape.dtype) {
        case Dtype::float32:
            return settle_of<float>(args, queue);
        case Dtype::bfloat16:
            return settle_of<__nv_bfloat16>(args, queue);
        case Dtype::float16:
            return settle_of<__half>(args, queue);
    }
}

std::int64_t batch_norm_workspace_floats(const BatchNormShape& shape, int device) {
    const int processors = multiprocessors("batch_norm_workspace", {device, nullptr});
    Tiling tiling = tiling_of(shape, {});
    if (take_whole_columns(tiling, processors)) return 0;
    cut(tiling, few_unroll, processors * backward_blocks);  // at least as many tiles as without a residual
    const Index of_sums = 2 * shape.groups * (tiles_of(tiling) + 1) * shape.channels;
    return std::max(batch_statistics_workspace_floats(shape, device), of_sums);
}

}  // namespace ganvas::cuda
