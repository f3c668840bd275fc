// Compiled once per instruction set. N·H·W is `rows`, C is `channels`; `width` = pack*C is the length of a packed row.
//
// The loops are plain C++ over contiguous channels, which the compiler turns into vector code of whatever width the
// target has. Reductions run down the rows, so lanes never mix and the result does not depend on the vector width's
// order.
#include <omp.h>

#include "batch_norm_leaky_relu.h"
#include "statistics.h"
#include "storage.h"

namespace ganvas::cpu::GANVAS_ISA {
namespace {

struct Range {
    Index begin, end;
};

// This thread's share of a group's rows, in whole packs but for the last thread's.
inline Range share(Index rows, Index pack, int thread, int team) {
    const Index packs = rows / pack;
    return {packs * thread / team * pack, thread + 1 == team ? rows : packs * (thread + 1) / team * pack};
}

template <bool activation_first, class T>
inline float normalised_value(T stored, Leaky leaky) {
    return activation_first ? leaky(load(stored)) : load(stored);
}

// Calls body(first_row, rows, width) over the range: packed blocks first, then the rows that do not fill a pack.
template <class Body>
inline void for_blocks(Range range, Index pack, Index channels, Index bytes, Body body) {
    const Index packed_end = range.begin + (range.end - range.begin) / pack * pack;
    const Index width = pack * channels;
    const Index block = larger(8, bytes / (4 * width));
    for (Index row = range.begin; row < packed_end; row += block * pack)
        body(row, smaller(block, (packed_end - row) / pack), width);
    if (packed_end < range.end) body(packed_end, range.end - packed_end, channels);
}

// Column statistics of a [rows, width] block, by the corrected two-pass algorithm (Chan, Golub & LeVeque 1983,
// equation 1.7): deviations are taken from a rounded mean, and their own sum tells by how much it was off. The second
// pass finds the block in the L2 cache, and nothing cancels however far the mean is from zero.
struct ColumnSums {
    float *mean, *residual, *square;  // Σx/n rounded, Σ(x − mean), Σ(x − mean)²
    ColumnSums(float* block, Index width) : mean(block), residual(block + width), square(block + 2 * width) {}
};

template <bool activation_first, class T>
void block_statistics(const T* __restrict x, Index rows, Index width, Leaky leaky, const ColumnSums& sums) {
    float* __restrict mean = sums.mean, * __restrict residual = sums.residual, * __restrict square = sums.square;
    for (Index c = 0; c < width; ++c) mean[c] = residual[c] = square[c] = 0.0f;
    const auto value = [leaky](T stored) { return normalised_value<activation_first>(stored, leaky); };
    Index row = 0;
    for (; row + 4 <= rows; row += 4) {
        const T* __restrict p = x + row * width;
        for (Index c = 0; c < width; ++c)
            mean[c] += (value(p[c]) + value(p[c + width])) + (value(p[c + 2 * width]) + value(p[c + 3 * width]));
    }
    for (; row < rows; ++row)
        for (Index c = 0; c < width; ++c) mean[c] += value(x[row * width + c]);
    const float inverse = 1.0f / static_cast<float>(rows);
    for (Index c = 0; c < width; ++c) mean[c] *= inverse;
    for (row = 0; row + 4 <= rows; row += 4) {
        const T* __restrict p = x + row * width;
        for (Index c = 0; c < width; ++c) {
            const float m = mean[c];
            const float d0 = value(p[c]) - m, d1 = value(p[c + width]) - m;
            const float d2 = value(p[c + 2 * width]) - m, d3 = value(p[c + 3 * width]) - m;
            residual[c] += (d0 + d1) + (d2 + d3);
            square[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
        }
    }
    for (; row < rows; ++row)
        for (Index c = 0; c < width; ++c) {
            const float d = value(x[row * width + c]) - mean[c];
            residual[c] += d;
            square[c] += d * d;
        }
}

template <bool activation_first, class T>
void range_statistics(const T* x, Range range, Index pack, Index channels, Leaky leaky, float* block,
                      double* __restrict mean, double* __restrict deviation) {
    double count = 0;
    for_blocks(range, pack, channels, block_bytes, [&](Index first, Index rows, Index width) {
        const ColumnSums sums(block, width);
        block_statistics<activation_first>(x + first * channels, rows, width, leaky, sums);
        const double rows_b = static_cast<double>(rows);
        for (Index lane = 0; lane < width; lane += channels) {
            const Join join(count, rows_b);
            for (Index c = 0; c < channels; ++c) {
                const double residual = static_cast<double>(sums.residual[lane + c]);
                join(mean[c], deviation[c], static_cast<double>(sums.mean[lane + c]) + residual / rows_b,
                     static_cast<double>(sums.square[lane + c]) - residual * residual / rows_b);
            }
            count += rows_b;
        }
    });
}

template <bool activation_first, class T>
void apply_forward(const T* __restrict x, Index rows, Index width, const float* __restrict scale,
                   const float* __restrict shift, Leaky leaky, T* __restrict output) {
    for (Index row = 0; row < rows; ++row)
        for (Index c = 0; c < width; ++c) {
            const float value = scale[c] * normalised_value<activation_first>(x[row * width + c], leaky) + shift[c];
            store(&output[row * width + c], activation_first ? value : leaky(value));
        }
}

template <bool adds_last, class T>
void apply_forward_add(const T* __restrict x, const T* __restrict residual, Index rows, Index width,
                       const float* __restrict scale, const float* __restrict shift, Leaky leaky,
                       T* __restrict output) {
    for (Index row = 0; row < rows; ++row)
        for (Index c = 0; c < width; ++c) {
            const Index i = row * width + c;
            const float value = scale[c] * load(x[i]) + shift[c], added = load(residual[i]);
            store(&output[i], adds_last ? leaky(value) + added : leaky(value + added));
        }
}

// Coefficients of a group, each repeated `pack` times so that a packed row has one per lane.
struct Coefficients {
    float *scale, *shift, *mean, *mean_grad, *projection;

    Coefficients(const BatchNormWorkspace& workspace, Index group, Index width) {
        float* first = workspace.coefficient + group * coefficients_per_group * width;
        scale = first, shift = first + width, mean = first + 2 * width;
        mean_grad = first + 3 * width, projection = first + 4 * width;
    }
    static void repeat(float* values, Index c, Index width, Index channels, float value) {
        for (Index lane = c; lane < width; lane += channels) values[lane] = value;
    }
};

inline double* partial_sums(const BatchNormWorkspace& workspace, const BatchNormShape& shape, int thread, Index group) {
    return workspace.partial + (thread * shape.groups + group) * 2 * shape.channels;
}

// Writes the range's result through compute(first, rows, width, destination), past the cache where that pays. Walks it
// backwards, piece by piece: what the reduction before read last is still in the cache.
template <class T, class Compute>
void write_range(T* output, Range range, Index channels, const BatchNormWorkspace& workspace, float* block,
                 Compute compute) {
    const Index piece = larger(1, write_piece_bytes / (4 * workspace.pack * channels)) * workspace.pack;
    const auto write = [&](Index first, Index rows, Index width) {
        T* destination = output + first * channels;
        if (!workspace.stream) return compute(first, rows, width, destination);
        T* buffer = reinterpret_cast<T*>(block);
        const Index rows_in_buffer = larger(1, stream_buffer_bytes / (4 * width));
        for (Index row = 0; row < rows; row += rows_in_buffer) {
            const Index count = smaller(rows_in_buffer, rows - row);
            compute(first + row * (width / channels), count, width, buffer);
            stream(destination + row * width, buffer, count * width * static_cast<Index>(sizeof(T)));
        }
    };
    for (Index begin = range.begin + (range.end - range.begin - 1) / piece * piece; begin >= range.begin;
         begin -= piece)
        for_blocks({begin, smaller(begin + piece, range.end)}, workspace.pack, channels, write_piece_bytes, write);
    if (workspace.stream) stream_fence();
}

template <bool activation_first, class T>
void forward(const BatchNormForward& args, const BatchNormWorkspace& workspace) {
    const BatchNormShape& shape = args.shape;
    const Index channels = shape.channels, pack = workspace.pack, width = pack * channels;
    const Index group_rows = shape.rows / shape.groups;
    const Leaky leaky(shape.negative_slope);
    const T* input = static_cast<const T*>(args.input);
    const T* residual = static_cast<const T*>(args.residual);
    const auto add = args.adds_last ? apply_forward_add<true, T> : apply_forward_add<false, T>;
    T* output = static_cast<T*>(args.output);

#pragma omp parallel num_threads(workspace.threads)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        float* block = workspace.block + thread * block_floats(width);
        const Range rows = share(group_rows, pack, thread, team);

        if (args.training) {
            for (Index group = 0; group < shape.groups; ++group) {
                double* mean = partial_sums(workspace, shape, thread, group);
                range_statistics<activation_first>(input + group * group_rows * channels, rows, pack, channels, leaky,
                                                   block, mean, mean + channels);
            }
#pragma omp barrier
        }
        const Range slice = share(channels, 1, thread, team);
        for (Index group = 0; group < shape.groups; ++group) {
            float* group_mean = args.mean + group * channels;
            float* group_var = args.var + group * channels;
            if (args.training) {
                // Thread 0's partial result becomes the total; each thread sees to a slice of the channels.
                double* total = partial_sums(workspace, shape, 0, group);
                Range part = share(group_rows, pack, 0, team);
                double count = static_cast<double>(part.end - part.begin);
                for (int other = 1; other < team; ++other) {
                    part = share(group_rows, pack, other, team);
                    if (part.end == part.begin) continue;
                    const double* sums = partial_sums(workspace, shape, other, group);
                    const Join join(count, static_cast<double>(part.end - part.begin));
                    for (Index c = slice.begin; c < slice.end; ++c)
                        join(total[c], total[channels + c], sums[c], sums[channels + c]);
                    count += static_cast<double>(part.end - part.begin);
                }
                for (Index c = slice.begin; c < slice.end; ++c) {
                    group_mean[c] = static_cast<float>(total[c]);
                    group_var[c] = static_cast<float>(total[channels + c] / static_cast<double>(group_rows));
                }
                if (args.running_mean) {
                    const double unbiased = 1.0 / static_cast<double>(larger(group_rows - 1, 1));
                    for (Index c = slice.begin; c < slice.end; ++c) {
                        move(args.running_mean[c], total[c], args.momentum);
                        move(args.running_var[c], total[channels + c] * unbiased, args.momentum);
                    }
                }
            }
            const Coefficients coefficients(workspace, group, width);
            for (Index c = slice.begin; c < slice.end; ++c) {
                const float scale = (args.weight ? args.weight[c] : 1.0f) * inverse_deviation(group_var[c], shape.eps);
                Coefficients::repeat(coefficients.scale, c, width, channels, scale);
                Coefficients::repeat(coefficients.shift, c, width, channels,
                                     (args.bias ? args.bias[c] : 0.0f) - group_mean[c] * scale);
            }
        }
#pragma omp barrier
        // Groups and blocks were read in this order: the last ones are still in the cache, so start from the end.
        for (Index group = shape.groups - 1; group >= 0; --group) {
            const Coefficients coefficients(workspace, group, width);
            const Index offset = group * group_rows * channels;
            write_range(output + offset, rows, channels, workspace, block,
                        [&](Index first, Index count, Index row_width, T* destination) {
                            const Index start = offset + first * channels;
                            if (residual)
                                add(input + start, residual + start, count, row_width, coefficients.scale,
                                    coefficients.shift, leaky, destination);
                            else
                                apply_forward<activation_first>(input + start, count, row_width, coefficients.scale,
                                                                coefficients.shift, leaky, destination);
                        });
        }
    }
}

// g = dL/d(scale*x + shift): the incoming gradient, times the kink where the activation came after.
template <bool activation_first, class T>
inline float pre_activation_grad(T grad, float value, float scale, float shift, Leaky leaky) {
    return activation_first ? load(grad) : leaky.grad(load(grad), scale * value + shift);
}

// Adds Σg and Σg·(x − mean) of each column.
template <bool activation_first, class T>
void block_sums(const T* __restrict grad, const T* __restrict x, Index rows, Index width,
                const Coefficients& coefficients, Leaky leaky, float* __restrict sum, float* __restrict sum_deviation) {
    const float* __restrict scale = coefficients.scale;
    const float* __restrict shift = coefficients.shift;
    const float* __restrict mean = coefficients.mean;
    for (Index c = 0; c < width; ++c) sum[c] = sum_deviation[c] = 0.0f;
    Index row = 0;
    for (; row + 2 <= rows; row += 2) {
        const T* __restrict g = grad + row * width, * __restrict p = x + row * width;
        for (Index c = 0; c < width; ++c) {
            const float x0 = normalised_value<activation_first>(p[c], leaky);
            const float x1 = normalised_value<activation_first>(p[c + width], leaky);
            const float g0 = pre_activation_grad<activation_first>(g[c], x0, scale[c], shift[c], leaky);
            const float g1 = pre_activation_grad<activation_first>(g[c + width], x1, scale[c], shift[c], leaky);
            sum[c] += g0 + g1;
            sum_deviation[c] += g0 * (x0 - mean[c]) + g1 * (x1 - mean[c]);
        }
    }
    for (; row < rows; ++row)
        for (Index c = 0; c < width; ++c) {
            const float value = normalised_value<activation_first>(x[row * width + c], leaky);
            const float g =
                pre_activation_grad<activation_first>(grad[row * width + c], value, scale[c], shift[c], leaky);
            sum[c] += g;
            sum_deviation[c] += g * (value - mean[c]);
        }
}

// g, as it is stored: the second pass reads it, so the sums are of that.
template <class T>
inline float store_after_kink(T* destination, T grad, T output, Leaky leaky) {
    T stored;
    store(&stored, leaky.grad(load(grad), load(output)));
    *destination = stored;
    return load(stored);
}

// The same sums where a residual was added; g, which is also the residual's gradient, is written out.
template <class T>
void add_sums(const T* __restrict grad, const T* __restrict x, const T* __restrict output, Index rows, Index width,
              const float* __restrict mean, Leaky leaky, T* __restrict grad_residual, float* __restrict sum,
              float* __restrict sum_deviation) {
    Index row = 0;
    for (; row + 2 <= rows; row += 2) {
        const T* __restrict g = grad + row * width, * __restrict p = x + row * width;
        const T* __restrict y = output + row * width;
        T* __restrict r = grad_residual + row * width;
        for (Index c = 0; c < width; ++c) {
            const float g0 = store_after_kink(&r[c], g[c], y[c], leaky);
            const float g1 = store_after_kink(&r[c + width], g[c + width], y[c + width], leaky);
            sum[c] += g0 + g1;
            sum_deviation[c] += g0 * (load(p[c]) - mean[c]) + g1 * (load(p[c + width]) - mean[c]);
        }
    }
    for (; row < rows; ++row)
        for (Index c = 0; c < width; ++c) {
            const Index i = row * width + c;
            const float g = store_after_kink(&grad_residual[i], grad[i], output[i], leaky);
            sum[c] += g;
            sum_deviation[c] += g * (load(x[i]) - mean[c]);
        }
}

// ... of a block, past the cache where that pays. `block` holds the two sums first; behind them results wait.
template <class T>
void add_block_sums(const T* grad, const T* x, const T* output, Index rows, Index width, const float* mean, Leaky leaky,
                    bool past_cache, T* grad_residual, float* block) {
    float *sum = block, *sum_deviation = block + width;
    for (Index c = 0; c < 2 * width; ++c) block[c] = 0.0f;
    if (!past_cache) return add_sums(grad, x, output, rows, width, mean, leaky, grad_residual, sum, sum_deviation);
    T* buffer = reinterpret_cast<T*>(block + 2 * width);
    const Index rows_in_buffer = larger(1, stream_buffer_bytes / (4 * width));
    for (Index row = 0; row < rows; row += rows_in_buffer) {
        const Index count = smaller(rows_in_buffer, rows - row), start = row * width;
        add_sums(grad + start, x + start, output + start, count, width, mean, leaky, buffer, sum, sum_deviation);
        stream(grad_residual + start, buffer, count * width * static_cast<Index>(sizeof(T)));
    }
}

// dL/dx = scale*(g − mean(g) − (x − mean)·projection), times the kink where the activation came before. Fixed
// statistics carry no gradient: then nothing is projected out, not even a NaN.
template <bool activation_first, bool training, class T>
void apply_backward(const T* __restrict grad, const T* __restrict x, Index rows, Index width,
                    const Coefficients& coefficients, Leaky leaky, T* __restrict output) {
    const float* __restrict scale = coefficients.scale;
    const float* __restrict shift = coefficients.shift;
    const float* __restrict mean = coefficients.mean;
    const float* __restrict mean_grad = coefficients.mean_grad;
    const float* __restrict projection = coefficients.projection;
    for (Index row = 0; row < rows; ++row)
        for (Index c = 0; c < width; ++c) {
            const float stored = load(x[row * width + c]);
            const float value = activation_first ? leaky(stored) : stored;
            const float g =
                pre_activation_grad<activation_first>(grad[row * width + c], value, scale[c], shift[c], leaky);
            const float projected = training ? (g - mean_grad[c]) - (value - mean[c]) * projection[c] : g;
            const float result = scale[c] * projected;
            store(&output[row * width + c], activation_first ? leaky.grad(result, stored) : result);
        }
}

template <bool activation_first, class T>
void backward(const BatchNormBackward& args, const BatchNormWorkspace& workspace) {
    const BatchNormShape& shape = args.shape;
    const Index channels = shape.channels, pack = workspace.pack, width = pack * channels;
    const Index group_rows = shape.rows / shape.groups;
    const Leaky leaky(shape.negative_slope);
    const T* input = static_cast<const T*>(args.input);
    const T* grad_output = static_cast<const T*>(args.grad_output);
    const T* output = static_cast<const T*>(args.output);
    T* grad_input = static_cast<T*>(args.grad_input);
    T* grad_residual = static_cast<T*>(args.grad_residual);
    const Leaky last_kink(grad_residual ? 1.0f : shape.negative_slope);  // what the first pass wrote is behind it

#pragma omp parallel num_threads(workspace.threads)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        float* block = workspace.block + thread * block_floats(width);
        const Range rows = share(group_rows, pack, thread, team);
        const Range slice = share(channels, 1, thread, team);

        for (Index group = 0; group < shape.groups; ++group) {
            const Coefficients coefficients(workspace, group, width);
            for (Index c = slice.begin; c < slice.end; ++c) {
                const float mean = args.mean[group * channels + c];
                const float scale = (args.weight ? args.weight[c] : 1.0f) *
                                    inverse_deviation(args.var[group * channels + c], shape.eps);
                Coefficients::repeat(coefficients.scale, c, width, channels, scale);
                Coefficients::repeat(coefficients.shift, c, width, channels,
                                     (args.bias ? args.bias[c] : 0.0f) - mean * scale);
                Coefficients::repeat(coefficients.mean, c, width, channels, mean);
            }
        }
#pragma omp barrier
        for (Index group = 0; group < shape.groups; ++group) {
            const Coefficients coefficients(workspace, group, width);
            const Index offset = group * group_rows * channels;
            double* sum = partial_sums(workspace, shape, thread, group);
            double* sum_deviation = sum + channels;
            for_blocks(rows, pack, channels, block_bytes, [&](Index first, Index count, Index row_width) {
                float* block_deviation = block + row_width;
                const Index start = offset + first * channels;
                if (grad_residual)
                    add_block_sums(grad_output + start, input + start, output + start, count, row_width,
                                   coefficients.mean, leaky, workspace.stream, grad_residual + start, block);
                else
                    block_sums<activation_first>(grad_output + start, input + start, count, row_width, coefficients,
                                                 leaky, block, block_deviation);
                for (Index lane = 0; lane < row_width; lane += channels)
                    for (Index c = 0; c < channels; ++c) {
                        sum[c] += static_cast<double>(block[lane + c]);
                        sum_deviation[c] += static_cast<double>(block_deviation[lane + c]);
                    }
            });
        }
#pragma omp barrier
        for (Index c = slice.begin; c < slice.end; ++c) {
            double grad_weight = 0, grad_bias = 0;
            for (Index group = 0; group < shape.groups; ++group) {
                double sum = 0, sum_deviation = 0;
                for (int other = 0; other < team; ++other) {
                    const double* sums = partial_sums(workspace, shape, other, group);
                    sum += sums[c];
                    sum_deviation += sums[channels + c];
                }
                const double inverse = inverse_deviation(args.var[group * channels + c], shape.eps);
                grad_bias += sum;
                grad_weight += sum_deviation * inverse;
                const double per_row = 1.0 / static_cast<double>(group_rows);
                const Coefficients coefficients(workspace, group, width);
                Coefficients::repeat(coefficients.mean_grad, c, width, channels, static_cast<float>(sum * per_row));
                Coefficients::repeat(coefficients.projection, c, width, channels,
                                     static_cast<float>(sum_deviation * per_row * inverse * inverse));
            }
            args.grad_weight[c] = static_cast<float>(grad_weight);
            args.grad_bias[c] = static_cast<float>(grad_bias);
        }
#pragma omp barrier
        for (Index group = shape.groups - 1; group >= 0; --group) {
            const Coefficients coefficients(workspace, group, width);
            const Index offset = group * group_rows * channels;
            const auto apply =
                args.training ? apply_backward<activation_first, true, T> : apply_backward<activation_first, false, T>;
            const T* grad = grad_residual ? grad_residual : grad_output;
            write_range(grad_input + offset, rows, channels, workspace, block,
                        [&](Index first, Index count, Index row_width, T* destination) {
                            const Index start = offset + first * channels;
                            apply(grad + start, input + start, count, row_width, coefficients, last_kink, destination);
                        });
        }
    }
}

}  // namespace

void batch_norm_leaky_relu_forward(const BatchNormForward& args, const BatchNormWorkspace& workspace) {
    const bool first = args.shape.activation_first;
    if (args.shape.dtype == Dtype::float32)
        first ? forward<true, float>(args, workspace) : forward<false, float>(args, workspace);
    else
        first ? forward<true, bfloat16>(args, workspace) : forward<false, bfloat16>(args, workspace);
}

void batch_norm_leaky_relu_backward(const BatchNormBackward& args, const BatchNormWorkspace& workspace) {
    const bool first = args.shape.activation_first;
    if (args.shape.dtype == Dtype::float32)
        first ? backward<true, float>(args, workspace) : backward<false, float>(args, workspace);
    else
        first ? backward<true, bfloat16>(args, workspace) : backward<false, bfloat16>(args, workspace);
}

}  // namespace ganvas::cpu::GANVAS_ISA
