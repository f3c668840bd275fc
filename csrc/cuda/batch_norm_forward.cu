// Forward. Batch statistics: each slice of the rows leaves mean and squared deviations of its own, which a small kernel
// joins. A last pass normalises. Where a block can take all rows of its channels, one launch does it all.
#include <cuda_runtime.h>

#include "batch_norm_plan.h"
#include "columns.h"
#include "launch.h"
#include "statistics.h"

namespace ganvas::cuda {
namespace {

enum class Form { bn_act, bn_add_act, act_bn };

// The group's first value of a channel, from which float32 statistics count: a large mean leaves no digits for the
// deviations. Values of 16 bits have none either, and count from 0.
template <bool activation_first, class T>
__device__ float origin_of(const T* input, const Tiling& tiling, Index group, Index channel, const Leaky& leaky) {
    if constexpr (sizeof(T) < 4) return 0.0f;
    const float first = load(input + group * tiling.rows * tiling.channels + channel);
    return activation_first ? leaky(first) : first;
}

// Count, mean and squared deviations of each of a thread's lanes, by Chan, Golub & LeVeque's formula (1983, equation
// 2.1) for batches of a few rows: nothing cancels however far the mean is from zero. Means are distances from the
// origin.
template <bool activation_first, class T>
struct Moments {
    static constexpr int lanes = Vector<T>::lanes;
    static constexpr int unroll = statistics_unroll(sizeof(T));

    Leaky leaky;
    float origin[lanes] = {};
    float rows = 0.0f;
    float mean[lanes] = {}, deviation[lanes] = {};
    int more = 0;  // the first lanes, of a vector that is not whole, have met one row more

    __device__ Moments(const T* input, const Tiling& tiling, const Place& place, Index group, Leaky leaky)
        : leaky(leaky) {
        if (!place.active) return;
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) {
            const Index value = place.vector * lanes + lane, c = tiling.pack == 1 ? value : value % tiling.channels;
            origin[lane] = origin_of<activation_first>(input, tiling, group, c, leaky);
        }
    }

    __device__ float value(const Vector<T>& x, int lane) const {
        return (activation_first ? leaky(x[lane]) : x[lane]) - origin[lane];
    }

    // The first `present` of the vectors; `whole`: all.
    template <bool whole>
    __device__ void add(const Vector<T> (&x)[unroll], int present) {
        const float batch = whole ? unroll : present, inverse = 1.0f / batch;
        const float total = rows + batch, share = batch / total, weight = rows * share;
        rows = total;
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) {
            float sum = 0.0f, squares = 0.0f;
#pragma unroll
            for (int u = 0; u < unroll; u += 2)
                sum += (whole || u < present ? value(x[u], lane) : 0.0f) +
                       (whole || u + 1 < present ? value(x[u + 1], lane) : 0.0f);
            float own = sum * inverse;
            if (!whole) own = fmaf(fmaf(-own, batch, sum), inverse, own);  // so that equal values have no variance
#pragma unroll
            for (int u = 0; u < unroll; ++u) {
                const float d = whole || u < present ? value(x[u], lane) - own : 0.0f;
                squares = fmaf(d, d, squares);
            }
            const float delta = own - mean[lane];
            mean[lane] = fmaf(delta, share, mean[lane]);
            deviation[lane] += fmaf(delta * delta, weight, squares);
        }
    }

    __device__ void add(const Vector<T> (&x)[unroll], int present) {
        if (present == unroll)
            add<true>(x, present);
        else if (present > 0)
            add<false>(x, present);
    }

    __device__ void add_one(const Vector<T>& x, int count) {
        const float share = 1.0f / (rows + 1.0f), weight = rows * share;
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) {
            const float delta = value(x, lane) - mean[lane];
            if (lane < count) {
                mean[lane] = fmaf(delta, share, mean[lane]);
                deviation[lane] = fmaf(delta * delta, weight, deviation[lane]);
            }
        }
        if (count == lanes)
            rows += 1.0f;
        else
            more = count;
    }

    // Joined over the threads of a column, in its first thread: count, mean, squared deviations of each lane.
    __device__ void reduce(const Tiling& tiling, const Place& place, float (&joined)[3 * lanes]) const {
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) {
            joined[lane] = rows + (lane < more ? 1.0f : 0.0f);
            joined[lanes + lane] = mean[lane];
            joined[2 * lanes + lane] = deviation[lane];
        }
        reduce_columns(tiling, place, joined, [](float (&mine)[3 * lanes], const float (&other)[3 * lanes]) {
#pragma unroll
            for (int lane = 0; lane < lanes; ++lane) {
                if (other[lane] == 0.0f) continue;
                const float count = mine[lane] + other[lane], share = other[lane] / count;
                const float delta = other[lanes + lane] - mine[lanes + lane];
                mine[lanes + lane] = fmaf(delta, share, mine[lanes + lane]);
                mine[2 * lanes + lane] += fmaf(delta * delta, mine[lane] * share, other[2 * lanes + lane]);
                mine[lane] = count;
            }
        });
    }
};

// Of the slice of the group's rows that the place tells.
template <bool activation_first, class T>
__device__ void slice_moments(const T* input, const Tiling& tiling, const Place& place, Index group,
                              Moments<activation_first, T>& moments) {
    constexpr int unroll = statistics_unroll(sizeof(T));
    walk<unroll, false>(
        tiling, place, group,
        [&](Index offset, Index stride, int present) {
            Vector<T> x[unroll];
            load_batch(input + offset, stride, present, x);
            moments.add(x, present);
        },
        [&](Index offset, int count) { moments.add_one(load_part(input + offset, count, tiling.access), count); });
}

template <class T>
struct StatisticsArgs {
    Tiling tiling;
    const T* input;
    Leaky leaky;
    float* counts;      // [G, slices*pack]
    float* means;       // [G, slices*pack, C]
    float* deviations;  // [G, slices*pack, C]
};

template <bool activation_first, class T>
__global__ void __launch_bounds__(most_threads, statistics_blocks)
    statistics_kernel(const __grid_constant__ StatisticsArgs<T> args) {
    constexpr int lanes = Vector<T>::lanes;
    const Tiling& tiling = args.tiling;
    const Place place(tiling, blockIdx.x, static_cast<int>(threadIdx.x));
    Moments<activation_first, T> moments(args.input, tiling, place, place.group, args.leaky);
    slice_moments(args.input, tiling, place, place.group, moments);
    float joined[3 * lanes];
    moments.reduce(tiling, place, joined);
    if (place.row > 0 || !place.active) return;
    // The rows of a packed row are tiles of their own: C values each, one behind the other.
    const Index first = (place.group * tiling.slices + place.slice) * tiling.pack;
#pragma unroll
    for (int lane = 0; lane < lanes; ++lane) {
        const Index value = place.vector * lanes + lane;
        if (value % tiling.channels == 0) args.counts[first + value / tiling.channels] = joined[lane];
        args.means[first * tiling.channels + value] = moments.origin[lane] + joined[lanes + lane];
        args.deviations[first * tiling.channels + value] = joined[2 * lanes + lane];
    }
}

template <class T>
struct ApplyArgs {
    Tiling tiling;
    const T* input;
    const T* residual;
    T* output;
    Norm norm;
    Leaky leaky;
};

template <Form form>
constexpr int unroll_of = form == Form::bn_add_act ? 2 : apply_unroll;

template <Form form, class T>
__device__ void apply(const ApplyArgs<T>& args, const Place& place, Index group,
                      const Affine<Vector<T>::lanes>& affine) {
    constexpr int lanes = Vector<T>::lanes, unroll = unroll_of<form>;
    const Tiling& tiling = args.tiling;
    const auto activation = [&](const Vector<T>& x, const Vector<T>& residual) {
        float values[lanes];
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) {
            if constexpr (form == Form::act_bn)
                values[lane] = affine(lane, args.leaky(x[lane]));
            else if constexpr (form == Form::bn_act)
                values[lane] = args.leaky(affine(lane, x[lane]));
            else
                values[lane] = args.leaky(affine(lane, x[lane]) + residual[lane]);
        }
        Vector<T> result;
        result.set(values);
        return result;
    };
    walk<unroll, true>(
        tiling, place, group,
        [&](Index offset, Index stride, int present) {
            Vector<T> x[unroll], residual[unroll];
            load_batch(args.input + offset, stride, present, x);
            if constexpr (form == Form::bn_add_act) load_batch(args.residual + offset, stride, present, residual);
#pragma unroll
            for (int u = 0; u < unroll; ++u)
                if (u < present) store_vector(args.output + offset + u * stride, activation(x[u], residual[u]));
        },
        [&](Index offset, int count) {
            const Vector<T> x = load_part(args.input + offset, count, tiling.access);
            Vector<T> residual{};
            if constexpr (form == Form::bn_add_act) residual = load_part(args.residual + offset, count, tiling.access);
            store_part(args.output + offset, activation(x, residual), count, tiling.access);
        });
}

template <Form form, class T>
__global__ void __launch_bounds__(most_threads, apply_blocks) apply_kernel(const __grid_constant__ ApplyArgs<T> args) {
    __shared__ float shared[3][most_tile_values];
    const Place place(args.tiling, blockIdx.x, static_cast<int>(threadIdx.x));
    stage_affine(args.norm, args.tiling, place, place.group, shared);
    __syncthreads();
    apply<form>(args, place, place.group, Affine<Vector<T>::lanes>(shared, place));
}

template <class T>
struct WholeColumnsArgs {
    ApplyArgs<T> apply;  // whose norm has the statistics yet to be written
    float *mean, *var;
    float *running_mean, *running_var;
    float momentum;
};

// Joins the `pack` lanes of a channel, which are `channels` apart: counts, means and squared deviations.
struct ChannelMoments {
    float mean, var, unbiased;

    __device__ ChannelMoments(const Tiling& tiling, int lane, Staged staged) {
        float count = 0.0f, deviation = 0.0f;
        mean = 0.0f;
        for (int row = 0; row < tiling.pack; ++row, lane += static_cast<int>(tiling.channels)) {
            const float other = staged[0][lane];
            if (other == 0.0f) continue;
            const float total = count + other, share = other / total, delta = staged[1][lane] - mean;
            mean = fmaf(delta, share, mean);
            deviation += fmaf(delta * delta, count * share, staged[2][lane]);
            count = total;
        }
        var = deviation / count;
        unbiased = deviation / fmaxf(count - 1.0f, 1.0f);
    }
};

// All of it, for the channels of one tile.
template <Form form, class T>
__global__ void __launch_bounds__(most_threads, statistics_blocks)
    whole_columns_kernel(const __grid_constant__ WholeColumnsArgs<T> args) {
    constexpr int lanes = Vector<T>::lanes;
    __shared__ float shared[3][most_tile_values];
    const Tiling& tiling = args.apply.tiling;
    const Place place(tiling, blockIdx.x, static_cast<int>(threadIdx.x));
    const int channels = tiling.tile_channels(place.tile);
    for (Index group = 0; group < tiling.groups; ++group) {
        Moments<form == Form::act_bn, T> moments(args.apply.input, tiling, place, group, args.apply.leaky);
        slice_moments(args.apply.input, tiling, place, group, moments);
        float joined[3 * lanes];
        moments.reduce(tiling, place, joined);
        __syncthreads();  // the group before has taken what is staged
        if (place.row == 0) {
#pragma unroll
            for (int i = 0; i < 3 * lanes; ++i) shared[i / lanes][place.column * lanes + i % lanes] = joined[i];
        }
        __syncthreads();
        for (int local = static_cast<int>(threadIdx.x); local < channels; local += tiling.threads()) {
            const Index c = tiling.first_channel(place.tile) + local, at = group * tiling.channels + c;
            ChannelMoments of(tiling, local, shared);
            of.mean += origin_of<form == Form::act_bn>(args.apply.input, tiling, group, c, args.apply.leaky);
            args.mean[at] = of.mean;
            args.var[at] = of.var;
            if (args.running_mean != nullptr) {
                move_running(args.running_mean + c, of.mean, args.momentum);
                move_running(args.running_var + c, of.unbiased, args.momentum);
            }
            const float scale = args.apply.norm.weight_of(c) * inverse_deviation(of.var, args.apply.norm.eps);
            for (int row = 0, lane = local; row < tiling.pack; ++row, lane += static_cast<int>(tiling.channels)) {
                shared[0][lane] = scale;
                shared[1][lane] = of.mean;
                shared[2][lane] = args.apply.norm.bias_of(c);
            }
        }
        __syncthreads();
        apply<form>(args.apply, place, group, Affine<lanes>(shared, place));
    }
}

// Of slices, then of the whole.
template <bool activation_first, class T>
void take_statistics(const BatchStatistics& args, Tiling tiling, Queue queue) {
    constexpr const char* name = "batch_statistics";
    const BatchNormShape& shape = args.shape;
    cut(tiling, statistics_unroll(sizeof(T)), multiprocessors(name, queue) * statistics_blocks);
    const Index tiles = tiles_of(tiling), values = shape.groups * tiles * shape.channels;
    float* const counts = args.workspace;
    float* const means = counts + shape.groups * tiles;
    float* const deviations = means + values;
    launch(name, statistics_kernel<activation_first, T>, tiling.blocks(), tiling.threads(),
           StatisticsArgs<T>{tiling, static_cast<const T*>(args.input), Leaky(shape.negative_slope), counts, means,
                             deviations},
           queue);
    finish_statistics({shape.groups, tiles, shape.channels, counts, means, deviations, args.weight, args.bias,
                       shape.eps, args.running_mean, args.running_var, args.momentum, args.mean, args.var, args.scale,
                       args.shift, deviations + values},
                      queue);
}

template <class T>
void statistics_of(const BatchStatistics& args, Queue queue) {
    const Tiling tiling = tiling_of(args.shape, {args.input});
    if (args.shape.activation_first) return take_statistics<true, T>(args, tiling, queue);
    return take_statistics<false, T>(args, tiling, queue);
}

template <Form form, class T>
void forward(const BatchNormForward& args, Queue queue) {
    constexpr const char* name = "batch_norm_leaky_relu_forward";
    const BatchNormShape& shape = args.shape;
    const int processors = multiprocessors(name, queue);
    const Tiling tiling = tiling_of(shape, {args.input, args.residual, args.output});
    ApplyArgs<T> apply_args{
        tiling,
        static_cast<const T*>(args.input),
        static_cast<const T*>(args.residual),
        static_cast<T*>(args.output),
        {args.weight, args.bias, args.mean, args.var, shape.eps},
        Leaky(shape.negative_slope),
    };
    if (args.training) {
        if (take_whole_columns(apply_args.tiling, processors)) {
            const Tiling& columns = apply_args.tiling;
            return launch(name, whole_columns_kernel<form, T>, columns.tiles, columns.threads(),
                          WholeColumnsArgs<T>{apply_args, args.mean, args.var, args.running_mean, args.running_var,
                                              args.momentum},
                          queue);
        }
        take_statistics<form == Form::act_bn, T>(
            {shape, args.input, nullptr, nullptr, args.running_mean, args.running_var, args.momentum, args.mean,
             args.var, nullptr, nullptr, args.workspace},
            tiling, queue);
    }
    cut(apply_args.tiling, unroll_of<form>, processors * apply_blocks);
    launch(name, apply_kernel<form, T>, apply_args.tiling.blocks(), apply_args.tiling.threads(), apply_args, queue);
}

template <class T>
void forward_of(const BatchNormForward& args, Queue queue) {
    if (args.residual != nullptr) return forward<Form::bn_add_act, T>(args, queue);
    if (args.shape.activation_first) return forward<Form::act_bn, T>(args, queue);
    return forward<Form::bn_act, T>(args, queue);
}

}  // namespace

void batch_norm_leaky_relu_forward(const BatchNormForward& args, Queue queue) {
    switch (args.shape.dtype) {
        case Dtype::float32:
            return forward_of<float>(args, queue);
        case Dtype::bfloat16:
            return forward_of<__nv_bfloat16>(args, queue);
        case Dtype::float16:
            return forward_of<__half>(args, queue);
    }
}

std::int64_t batch_statistics_workspace_floats(const BatchNormShape& shape, int device) {
    Tiling tiling = tiling_of(shape, {});
    cut(tiling, statistics_unroll(element_bytes(shape.dtype)),
        multiprocessors("batch_statistics_workspace", {device, nullptr}) * statistics_blocks);
    const Index tiles = tiles_of(tiling);
    return shape.groups * tiles * (2 * shape.channels + 1) +
           finish_workspace_floats(shape.groups, tiles, shape.channels);
}

void batch_statistics(const BatchStatistics& args, Queue queue) {
    switch (args.shape.dtype) {
        case Dtype::float32:
            return statistics_of<float>(args, queue);
        case Dtype::bfloat16:
            return statistics_of<__nv_bfloat16>(args, queue);
        case Dtype::float16:
            return statistics_of<__half>(args, queue);
    }
}

}  // namespace ganvas::cuda
