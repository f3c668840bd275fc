// Compiled once per instruction set.
#include "max_pool.h"

#include <omp.h>

#include "vector.h"

namespace ganvas::cpu::GANVAS_ISA {
namespace {

inline void store_index(std::uint8_t* destination, VectorBits index, Index count) {
    const VectorBytes bytes = __builtin_convertvector(index, VectorBytes);
    if (count >= lanes) {
        std::memcpy(destination, &bytes, sizeof bytes);
    } else {
        for (Index lane = 0; lane < count; ++lane) destination[lane] = bytes[lane];
    }
}

inline VectorBits load_index(const std::uint8_t* source, Index count) {
    VectorBytes bytes{};
    if (count >= lanes) {
        std::memcpy(&bytes, source, sizeof bytes);
    } else {
        for (Index lane = 0; lane < count; ++lane) bytes[lane] = source[lane];
    }
    return widened(bytes);
}

// The four stored values under a pooled one, as offsets from the first.
struct Window {
    Index offset[4];
    explicit Window(const MaxPoolShape& s) : offset{0, s.channels, s.width * s.channels, (s.width + 1) * s.channels} {}
};

// Where pooled row `row` (of the whole batch) begins among the stored values.
inline Index stored_row(const MaxPoolShape& s, Index row) {
    const Index pooled_height = s.height / 2;
    return (row / pooled_height * s.height + row % pooled_height * 2) * s.width * s.channels;
}

// The largest activation of four stored values, and which it is of: the first of equals, a NaN before all.
template <bool activation_first>
inline Vector largest_activation(const Vector (&four)[4], Vector scale, Vector shift, Leaky leaky, VectorBits& index) {
    Vector best{};
    for (unsigned k = 0; k < 4; ++k) {
        const Vector value = pending_activation<activation_first>(four[k], scale, shift, leaky);
        const auto better = (value > best) | (value != value);
        best = k == 0 ? value : better ? value : best;
        index = k == 0 ? VectorBits{} : better ? VectorBits{} + k : index;
    }
    return best;
}

// The same of an activation that rises with what is stored or, where the scale is negative, falls: that of the largest
// stored value, or of the smallest.
template <bool activation_first>
inline Vector largest_activation(const Vector (&four)[4], Vector scale, Vector shift, Leaky leaky) {
    Vector largest = four[0], smallest = four[0];
    for (unsigned k = 1; k < 4; ++k) {
        largest = four[k] > largest ? four[k] : largest;
        smallest = four[k] < smallest ? four[k] : smallest;
    }
    // A NaN may be in no place, or come of an infinity.
    if (has_nan(scale * ((four[0] + four[1]) + (four[2] + four[3])))) {
        VectorBits index;
        return largest_activation<activation_first>(four, scale, shift, leaky, index);
    }
    return pending_activation<activation_first>(scale < 0.0f ? smallest : largest, scale, shift, leaky);
}

template <bool activation_first, bool by_ends, class T>
void forward_row(const MaxPoolForward& args, Index row) {
    const MaxPoolShape& s = args.shape;
    const Index pooled_width = s.width / 2, channels = s.channels;
    const Index group = row / (s.batch / s.groups * (s.height / 2));
    const Window window(s);
    const Leaky leaky(args.input.negative_slope);
    const T* stored = static_cast<const T*>(args.input.stored) + stored_row(s, row);
    T* output = static_cast<T*>(args.output) + row * pooled_width * channels;
    std::uint8_t* const indices = args.index ? args.index + row * pooled_width * channels : nullptr;
    for (Index x = 0; x < pooled_width; ++x)
        for (Index c = 0; c < channels; c += lanes) {
            const Index count = channels - c;
            const Vector scale = load_lanes(args.input.scale + group * channels + c, count);
            const Vector shift = load_lanes(args.input.shift + group * channels + c, count);
            Vector four[4];
            for (unsigned k = 0; k < 4; ++k)
                four[k] = load_lanes(stored + 2 * x * channels + c + window.offset[k], count);
            Vector best;
            if constexpr (by_ends) {
                best = largest_activation<activation_first>(four, scale, shift, leaky);
            } else {
                VectorBits index;
                best = largest_activation<activation_first>(four, scale, shift, leaky, index);
                if (indices) store_index(indices + x * channels + c, index, count);
            }
            store_lanes(output + x * channels + c, best, count);
        }
}

template <bool activation_first, class T>
void forward(const MaxPoolForward& args, int threads) {
    const Index rows = args.shape.batch * (args.shape.height / 2);
    const bool by_ends = !args.index && args.input.negative_slope >= 0.0f;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index row = 0; row < rows; ++row)
        by_ends ? forward_row<activation_first, true, T>(args, row)
                : forward_row<activation_first, false, T>(args, row);
}

// Adds up Σg and Σg·(x − mean) of pooled rows [begin, end) of a group.
template <bool activation_first, class T>
void sum_rows(const MaxPoolBackward& args, Index group, Index begin, Index end, double* sums) {
    const MaxPoolShape& s = args.shape;
    const Index pooled_width = s.width / 2, channels = s.channels, group_rows = s.batch / s.groups * (s.height / 2);
    const Window window(s);
    const Leaky leaky(args.input.negative_slope);
    for (Index c = 0; c < channels; c += lanes) {
        const Index count = channels - c, at = group * channels + c;
        const Vector scale = load_lanes(args.input.scale + at, count);
        const Vector shift = load_lanes(args.input.shift + at, count);
        const Vector mean = load_lanes(args.mean + at, count);
        Vector sum{}, sum_deviation{};
        for (Index row = group * group_rows + begin; row < group * group_rows + end; ++row) {
            const T* stored = static_cast<const T*>(args.input.stored) + stored_row(s, row) + c;
            const Index pooled = row * pooled_width * channels + c;
            for (Index x = 0; x < pooled_width; ++x) {
                const T* four = stored + 2 * x * channels;
                const VectorBits index = load_index(args.index + pooled + x * channels, count);
                Vector y = load_lanes(four, count);
                for (unsigned k = 1; k < 4; ++k) y = index == k ? load_lanes(four + window.offset[k], count) : y;
                Vector g = load_lanes(static_cast<const T*>(args.grad_output) + pooled + x * channels, count);
                if (!activation_first) g = leaky_relu_grad(g, scale * y + shift, leaky);
                sum += g;
                sum_deviation += g * ((activation_first ? leaky_relu(y, leaky) : y) - mean);
            }
        }
        for (Index lane = 0; lane < smaller(lanes, count); ++lane) {
            sums[c + lane] = static_cast<double>(sum[lane]);
            sums[channels + c + lane] = static_cast<double>(sum_deviation[lane]);
        }
    }
}

template <bool activation_first, class T>
inline void settle(Vector g, const T* stored, T* grad, Index count, Vector scale, Vector mean, Vector mean_grad,
                   Vector projection, Leaky leaky) {
    const Vector y = load_lanes(stored, count), x = activation_first ? leaky_relu(y, leaky) : y;
    const Vector value = scale * (g - mean_grad - (x - mean) * projection);
    store_lanes(grad, activation_first ? leaky_relu_grad(value, y, leaky) : value, count);
}

// The gradient of the stored values under pooled row `row`, and of the left-out row below the last one.
template <bool activation_first, class T>
void backward_row(const MaxPoolBackward& args, Index row, float* coefficients) {
    const MaxPoolShape& s = args.shape;
    const Index pooled_height = s.height / 2, pooled_width = s.width / 2, channels = s.channels;
    const Index group = row / (s.batch / s.groups * pooled_height);
    const GradientCoefficients of(coefficients, group, channels);
    const Window window(s);
    const Leaky leaky(args.input.negative_slope);
    const T* stored = static_cast<const T*>(args.input.stored) + stored_row(s, row);
    T* grad = static_cast<T*>(args.grad_input) + stored_row(s, row);
    const Index pooled = row * pooled_width * channels;
    for (Index c = 0; c < channels; c += lanes) {
        const Index count = channels - c, at = group * channels + c;
        const Vector act_scale = load_lanes(args.input.scale + at, count);
        const Vector act_shift = load_lanes(args.input.shift + at, count);
        const Vector scale = load_lanes(of.scale + c, count), mean = load_lanes(of.mean + c, count);
        const Vector mean_grad = load_lanes(of.mean_grad + c, count), projection = load_lanes(of.projection + c, count);
        const auto write = [&](Vector g, Index offset) {
            settle<activation_first>(g, stored + offset, grad + offset, count, scale, mean, mean_grad, projection,
                                     leaky);
        };
        for (Index x = 0; x < pooled_width; ++x) {
            const VectorBits index = load_index(args.index + pooled + x * channels + c, count);
            const Vector incoming =
                load_lanes(static_cast<const T*>(args.grad_output) + pooled + x * channels + c, count);
            for (unsigned k = 0; k < 4; ++k) {
                const Index offset = 2 * x * channels + c + window.offset[k];
                Vector g = index == k ? incoming : Vector{};
                if (!activation_first)
                    g = leaky_relu_grad(g, act_scale * load_lanes(stored + offset, count) + act_shift, leaky);
                write(g, offset);
            }
        }
        if (s.width % 2)
            for (Index y = 0; y < 2; ++y) write(Vector{}, ((y + 1) * s.width - 1) * channels + c);
        if (s.height % 2 && row % pooled_height == pooled_height - 1)
            for (Index x = 0; x < s.width; ++x) write(Vector{}, (2 * s.width + x) * channels + c);
    }
}

template <bool activation_first, class T>
void backward(const MaxPoolBackward& args, const MaxPoolWorkspace& workspace) {
    const MaxPoolShape& s = args.shape;
    const Index channels = s.channels, group_rows = s.batch / s.groups * (s.height / 2);
    const Index block_rows = max_pool_block_rows(s), blocks = (group_rows + block_rows - 1) / block_rows;
    const double pixels = static_cast<double>(s.batch / s.groups * s.height * s.width);
#pragma omp parallel num_threads(workspace.threads)
    {
#pragma omp for schedule(static)
        for (Index item = 0; item < s.groups * blocks; ++item) {
            const Index begin = item % blocks * block_rows;
            sum_rows<activation_first, T>(args, item / blocks, begin, smaller(group_rows, begin + block_rows),
                                          workspace.sums + item * 2 * channels);
        }
        const Index thread = omp_get_thread_num(), team = omp_get_num_threads();
        for (Index c = channels * thread / team; c < channels * (thread + 1) / team; ++c) {
            double grad_weight = 0, grad_bias = 0;
            for (Index group = 0; group < s.groups; ++group) {
                double sum = 0, sum_deviation = 0;
                for (Index block = group * blocks; block < (group + 1) * blocks; ++block) {
                    sum += workspace.sums[block * 2 * channels + c];
                    sum_deviation += workspace.sums[(block * 2 + 1) * channels + c];
                }
                const Index at = group * channels + c;
                const GradientCoefficients of(workspace.coefficients, group, channels);
                const float inverse = of.set(c, args.weight ? args.weight[c] : 1.0f, args.mean[at], args.var[at],
                                             args.eps, args.training, sum, sum_deviation, pixels);
                grad_weight += sum_deviation * static_cast<double>(inverse);
                grad_bias += sum;
            }
            args.grad_weight[c] = static_cast<float>(grad_weight);
            args.grad_bias[c] = static_cast<float>(grad_bias);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (Index row = 0; row < s.groups * group_rows; ++row)
            backward_row<activation_first, T>(args, row, workspace.coefficients);
    }
}

}  // namespace

void max_pool_forward(const MaxPoolForward& args, int threads) {
    const bool first = args.input.activation_first;
    if (args.shape.dtype == Dtype::float32)
        first ? forward<true, float>(args, threads) : forward<false, float>(args, threads);
    else
        first ? forward<true, bfloat16>(args, threads) : forward<false, bfloat16>(args, threads);
}

void max_pool_backward(const MaxPoolBackward& args, const MaxPoolWorkspace& workspace) {
    const bool first = args.input.activation_first;
    if (args.shape.dtype == Dtype::float32)
        first ? backward<true, float>(args, workspace) : backward<false, float>(args, workspace);
    else
        first ? backward<true, bfloat16>(args, workspace) : backward<false, bfloat16>(args, workspace);
}

}  // namespace ganvas::cpu::GANVAS_ISA
