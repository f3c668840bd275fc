// 1×1 convolutions: products of matrices whose rows are pixels. Compiled once per instruction set.
//
//   forward          y[p][co] = Σ_ci a[p][ci]·w[co][ci]
//   backward_input   da[p][ci] = Σ_co dy[p][co]·w[co][ci]
//   backward_weight  dw[co][ci] = Σ_p dy[p][co]·a[p][ci]
//
// The pending activation a is made of some pixels at a time, as the left or right factor of products that lie in the
// cache; statistics are taken as results are stored. Pixels are numbered as those of the output.
#include <omp.h>

#include "convolution_output.h"
#include "convolutions.h"
#include "parallel.h"
#include "winograd_weight.h"
#include "workspace.h"

namespace ganvas::cpu::GANVAS_ISA {
namespace {

constexpr Index slice = 128;      // words of a sum that are added up in one chain
constexpr Index strip = 64;       // columns of products that are stored together
constexpr Index rows_least = 24;  // pixels of a block
constexpr Index rows_most = 144;
constexpr Index rows_bytes = 384 << 10;      // of a block's packed pixels
constexpr Index run_rows = 8;                // pixels whose sums are kept in registers
constexpr Index gradient_bytes = 512 << 10;  // of a part of the weight's gradient that a thread adds up in its cache
constexpr Index gradient_rows = 96;          // output channels of it that lie side by side
constexpr Index depth_least = 64, depth_most = 256;  // pixels that are packed at a time

// The input's pixel that each of the output's reads.
struct Grid {
    Index height, width, out_height, out_width;

    explicit Grid(const ConvolutionShape& s)
        : height(s.height), width(s.width), out_height(s.out_height), out_width(s.out_width) {}
    bool dense() const { return height == out_height && width == out_width; }
    Index at(Index pixel) const {
        if (dense()) return pixel;
        const Index row = pixel / out_width;
        return (row / out_height * height + row % out_height * 2) * width + pixel % out_width * 2;
    }
};

// A map whose pixels are rows of a factor.
struct Rows {
    PendingActivation pixels;
    Index channels;
    Index group_pixels;
    const Grid* grid;  // null: the output's own map

    Index at(Index pixel) const { return (grid ? grid->at(pixel) : pixel) * channels; }
};

// How the numbers of a factor become words.
enum class Packing { floats, channel_pairs, pixel_pairs };

#if defined(__AVX512F__)
// The nearest bfloat16. Only where has_bfloat16_products().
inline VectorHalves nearest_bfloat16(Vector value) {
    VectorHalves halves;
    asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(value));
    return halves;
}
#endif

// Channels [begin, end) of `count` pixels of one group as rows of `width` words, a pair of pixels or channels in each
// or one number. `begin` is a multiple of `lanes`; what is missing of a last vector or pair is zero.
template <class T, Packing packing, Activation kind>
void pack(const Rows& from, Index first, Index count, Index begin, Index end, float* words, Index width) {
    const Index of_group = first / from.group_pixels * from.channels;
    const float* scales = from.pixels.scale + of_group;
    const float* shifts = from.pixels.shift + of_group;
    const Leaky leaky(from.pixels.negative_slope);
    const auto load = [&](const T* pixel, Index c) {
        const Vector stored = load_lanes(pixel + c, end - c);
        if constexpr (kind == Activation::identity) return stored;
        return activate<kind>(stored, load_lanes(scales + c, end - c), load_lanes(shifts + c, end - c), leaky);
    };
#if defined(__AVX512F__)
    const auto load_halves = [&](const T* pixel, Index c) {
        if constexpr (kind == Activation::identity && sizeof(T) == sizeof(std::uint16_t)) {
            if (c + lanes <= end) {  // they lie there
                VectorHalves halves;
                std::memcpy(&halves, pixel + c, sizeof halves);
                return halves;
            }
        }
        return nearest_bfloat16(load(pixel, c));
    };
#endif
    const auto pixel_of = [&](Index row) { return static_cast<const T*>(from.pixels.stored) + from.at(first + row); };
    for (Index row = 0; row < count; row += packing == Packing::pixel_pairs ? 2 : 1, words += width) {
        const T* pixel = pixel_of(row);
        if constexpr (packing == Packing::floats) {
            for (Index c = begin; c < end; c += lanes) store_vector(words + c - begin, load(pixel, c));
        }
#if defined(__AVX512F__)
        if constexpr (packing == Packing::channel_pairs) {
            for (Index c = begin; c < end; c += lanes) {
                const VectorHalves halves = load_halves(pixel, c);
                std::memcpy(words + (c - begin) / 2, &halves, sizeof halves);
            }
        }
        if constexpr (packing == Packing::pixel_pairs) {
            const bool paired = row + 1 < count;
            const T* next = paired ? pixel_of(row + 1) : pixel;
            for (Index c = begin; c < end; c += lanes) {
                VectorBits bits = __builtin_convertvector(load_halves(pixel, c), VectorBits);
                if (paired) bits |= __builtin_convertvector(load_halves(next, c), VectorBits) << 16;
                std::memcpy(words + c - begin, &bits, sizeof bits);
            }
        }
#endif
    }
}

using Pack = void (*)(const Rows&, Index first, Index count, Index begin, Index end, float* words, Index width);

template <class T, Packing packing>
Pack pack_of(Activation kind) {
    switch (kind) {
        case Activation::affine_kink:
            return pack<T, packing, Activation::affine_kink>;
        case Activation::kink_affine:
            return pack<T, packing, Activation::kink_affine>;
        default:
            return pack<T, packing, Activation::identity>;
    }
}

template <Packing packing>
Pack pack_of(Dtype dtype, const PendingActivation& pixels) {
    return dtype == Dtype::float32 ? pack_of<float, packing>(activation_of(pixels))
                                   : pack_of<bfloat16, packing>(activation_of(pixels));
}

// Words [begin, end) of the weight's columns [panel, panel + width), as rows; `begin` is a multiple of `lanes`.
template <Elements elements>
void pack_weight(const Taps& w, const float* values, Index begin, Index end, Index panel, Index width, float* rows) {
    constexpr Index numbers = elements == Elements::floats ? 1 : 2;
    const Index until = smaller(w.channels, end * numbers);
    const auto take = [&](const TapBlock(&block)[1], Index k, Index n, Index count) {
        float* to = rows + (k / numbers - begin) * width + n - panel;
        for (Index i = 0; i < count; i += numbers, to += width) {
            if constexpr (elements == Elements::floats) store_vector(to, block[0][i]);
#if defined(__AVX512F__)
            if constexpr (elements == Elements::bfloat16_pairs) {
                VectorBits bits = __builtin_convertvector(nearest_bfloat16(block[0][i]), VectorBits);
                if (i + 1 < count) bits |= __builtin_convertvector(nearest_bfloat16(block[0][i + 1]), VectorBits) << 16;
                std::memcpy(to, &bits, sizeof bits);
            }
#endif
        }
    };
    for_each_block<1, 1>(w, values, begin * numbers, until, panel, width, take);
}

// Of the input's pixels those that no output reads have no gradient: zeros behind and below each of those that one
// does.
template <class T>
void clear_skipped(const Destination& to, const Grid& grid, Index first, Index count, Index begin, Index end) {
    const auto clear = [&](Index pixel) {
        __builtin_memset(static_cast<T*>(to.pixels) + pixel * to.channels + begin, 0,
                         static_cast<std::size_t>(end - begin) * sizeof(T));
    };
    for (Index p = first; p < first + count; ++p) {
        const Index pixel = grid.at(p);
        const bool behind = pixel % grid.width + 1 < grid.width;
        const bool below = pixel / grid.width % grid.height + 1 < grid.height;
        if (behind) clear(pixel + 1);
        if (below) clear(pixel + grid.width);
        if (behind && below) clear(pixel + grid.width + 1);
    }
}

template <class T, Output kind, bool whole>
inline void write_run(const Destination& to, const Grid* grid, Index first, Index count, Index column,
                      const float* products, Leaky leaky, Channels& of) {
    const Channels own = of;
    Vector sum{}, square{};
    for (Index p = first; p < first + count; ++p, products += strip) {
        const Index position = (grid ? grid->at(p) : p) * to.channels + column;
        if (reads_pixels<kind>(to))  // a later run's, too far apart for the processor to foresee
            __builtin_prefetch(static_cast<const T*>(to.pending.stored) + position + 3 * run_rows * to.channels, 0, 2);
        emit<T, kind, whole>(load_vector(products), to, position, leaky, own, sum, square);
    }
    of.sum += sum;
    of.square += square;
}

template <Output kind>
Vector mean_of(const float* products, Index count, Leaky leaky, Vector bias) {
    Vector sum{};
    for (Index row = 0; row < count; ++row) {
        const Vector value = load_vector(products + row * strip) + bias;
        sum += kind == Output::statistics ? value : leaky_relu(value, leaky);
    }
    return sum / static_cast<float>(count);
}

// Stores channels [begin, end), no more than a strip, of `count` pixels of one group, and their sums.
template <class T, Output kind>
void write_rows(const Destination& to, const Grid* grid, Index group, Index first, Index count, Index begin, Index end,
                const float* products, double* sums) {
    const Leaky leaky = leaky_of<kind>(to);
    const Index vectors = ceiling(end - begin, lanes);
    Channels channels[strip_vectors];
    for (Index i = 0; i < vectors; ++i) {
        channels[i] = channels_of<kind>(to, group, begin + i * lanes, end);
        if (takes_statistics<kind>)  // deviations from a near mean: nothing cancels
            channels[i].pivot =
                mean_of<kind>(products + i * lanes, smaller(count, 2 * run_rows), leaky, channels[i].bias);
    }
    for (Index row = 0; row < count; row += run_rows)
        for (Index i = 0; i < vectors; ++i) {
            const auto write = channels[i].count >= lanes ? write_run<T, kind, true> : write_run<T, kind, false>;
            write(to, grid, first + row, smaller(run_rows, count - row), begin + i * lanes,
                  products + row * strip + i * lanes, leaky, channels[i]);
        }
    if (grid) clear_skipped<T>(to, *grid, first, count, begin, end);
    keep_sums<kind>(channels, vectors, begin, count, to.channels, sums);
}

using WriteRows = void (*)(const Destination&, const Grid*, Index group, Index first, Index count, Index begin,
                           Index end, const float* products, double* sums);

template <class T>
WriteRows write_of(Output kind) {
    switch (kind) {
        case Output::statistics:
            return write_rows<T, Output::statistics>;
        case Output::activation_statistics:
            return write_rows<T, Output::activation_statistics>;
        case Output::activated:
            return write_rows<T, Output::activated>;
        case Output::activated_first:
            return write_rows<T, Output::activated_first>;
        case Output::affine_kink:
            return write_rows<T, Output::affine_kink>;
        case Output::kink_affine:
            return write_rows<T, Output::kink_affine>;
        default:
            return write_rows<T, Output::plain>;
    }
}

// Consecutive pixels of one group.
struct PixelBlocks {
    Index group_pixels;
    Index rows, per_group, count;

    PixelBlocks(Index pixels, Index groups, Index target) : group_pixels(pixels / groups) {
        constexpr Index whole = tile_rows<tile_vectors>;
        rows = ceiling(ceiling(group_pixels, ceiling(group_pixels, target)), whole) * whole;
        per_group = ceiling(group_pixels, rows);
        count = groups * per_group;
    }
    Index group(Index block) const { return block / per_group; }
    Index first(Index block) const { return group(block) * group_pixels + block % per_group * rows; }
    Index last(Index block) const { return smaller(first(block) + rows, (group(block) + 1) * group_pixels); }
};

// The sums of the blocks, as finish_statistics and finish_sums take them.
struct BlockSums {
    const PixelBlocks& blocks;
    Index channel_count;
    double* values;  // [block, 2, channels]

    Index channels() const { return channel_count; }
    Index groups() const { return blocks.count / blocks.per_group; }
    Index per_group() const { return blocks.per_group; }
    double* of(Index block) const { return values + block * 2 * channel_count; }
    double* of_group(Index group) const { return of(group * blocks.per_group); }
    double pixels(Index block) const { return static_cast<double>(blocks.last(block) - blocks.first(block)); }
};

// Pixels times the weight, its sums over `weight.channels`.
struct Pass {
    Rows rows;
    Destination destination;
    const Grid* grid;  // of the destination; null: the output's own map
    Taps weight;
    const float* values;
    Index pixels, groups;
    Dtype dtype;
    Output kind;
};

// Whether the pixels are the words of a factor as they lie in memory.
template <Elements elements>
bool lies_packed(const Rows& rows, Dtype dtype) {
    if (rows.grid || activation_of(rows.pixels) != Activation::identity) return false;
    if (elements == Elements::floats) return dtype == Dtype::float32;
    return dtype == Dtype::bfloat16 && rows.channels % 2 == 0 &&
           reinterpret_cast<std::uintptr_t>(rows.pixels.stored) % alignof(float) == 0;
}

// A hint: pixels that a thread is about to multiply as they lie in memory, where no stretch is long enough for the
// processor to foresee the next.
inline void expect_pixels(const char* pixels, Index bytes) {
    for (Index i = 0; i < bytes; i += 64) __builtin_prefetch(pixels + i, 0, 2);
}

// Each thread takes a block of pixels, and where blocks are few a part of the columns, through products and output
// while they lie in its cache. The packed weight is made first and shared. Then finish(sums, group, begin, end) is
// called for slices of the channels.
template <Elements elements, class Finish>
void run(const Pass& pass, int threads, Finish finish) {
    constexpr Index numbers = elements == Elements::floats ? 1 : 2;
    constexpr Packing packing = elements == Elements::floats ? Packing::floats : Packing::channel_pairs;
    const Destination& to = pass.destination;
    const Index channels = pass.rows.channels, depth = ceiling(channels, numbers);
    const Index width = whole_vectors(channels) / numbers, columns = whole_vectors(to.channels);
    const Index cached = clamped(rows_bytes / (width * static_cast<Index>(sizeof(float))), rows_least, rows_most);
    const PixelBlocks blocks(pass.pixels, pass.groups,
                             larger(rows_least, smaller(cached, ceiling(pass.pixels, 2 * threads))));
    const Index panels = ceiling(columns, tile_columns), splits = smaller(panels, ceiling(2 * threads, blocks.count));
    const Index split_columns = ceiling(panels, splits) * tile_columns;
    const bool direct = lies_packed<elements>(pass.rows, pass.dtype);

    const auto floats = [](Index count) { return Workspace::padded(static_cast<std::size_t>(count) * sizeof(float)); };
    const std::size_t weight_bytes = floats(depth * columns);
    const std::size_t sum_bytes = static_cast<std::size_t>(blocks.count * 2 * to.channels) * sizeof(double);
    const std::size_t row_bytes = floats(direct ? 0 : blocks.rows * width),
                      room = row_bytes + floats(blocks.rows * strip);
    Workspace workspace(weight_bytes + Workspace::padded(sum_bytes) + room * static_cast<std::size_t>(threads));
    float* const weight = static_cast<float*>(workspace.take(weight_bytes));
    const BlockSums sums{blocks, to.channels, static_cast<double*>(workspace.take(sum_bytes))};
    char* const scratch = static_cast<char*>(workspace.take(room * static_cast<std::size_t>(threads)));
    const Pack pack_pixels = pack_of<packing>(pass.dtype, pass.rows.pixels);
    const WriteRows write = pass.dtype == Dtype::float32 ? write_of<float>(pass.kind) : write_of<bfloat16>(pass.kind);
    const auto panel_width = [&](Index panel) { return smaller(tile_columns, columns - panel); };

#pragma omp parallel num_threads(threads)
    {
        const Index thread = omp_get_thread_num(), team = omp_get_num_threads();
        char* const own = scratch + static_cast<std::size_t>(thread) * room;
        float* const packed = reinterpret_cast<float*>(own);
        float* const products = reinterpret_cast<float*>(own + row_bytes);
        const Index pieces = ceiling(depth, lanes);
#pragma omp for schedule(static)
        for (Index item = 0; item < panels * pieces; ++item) {
            const Index panel = item / pieces * tile_columns, k = item % pieces * lanes;
            pack_weight<elements>(pass.weight, pass.values, k, smaller(depth, k + lanes), panel, panel_width(panel),
                                  weight + panel * depth + k * panel_width(panel));
        }
#pragma omp for schedule(dynamic, 1)
        for (Index item = 0; item < blocks.count * splits; ++item) {
            const Index block = item / splits, split = item % splits;
            const Index first = blocks.first(block), count = blocks.last(block) - first;
            Product p{packed, width, 1, nullptr, 0, nullptr, strip, depth};
            if (direct) {
                const Index pixel_bytes = channels * static_cast<Index>(sizeof(float)) / numbers;
                const char* const pixels = static_cast<const char*>(pass.rows.pixels.stored) + first * pixel_bytes;
                p.a = reinterpret_cast<const float*>(pixels);
                p.a_row = channels / numbers;
                expect_pixels(pixels + team * count * pixel_bytes, count * pixel_bytes);
            } else {
                pack_pixels(pass.rows, first, count, 0, channels, packed, width);
            }
            const Index split_end = smaller(columns, (split + 1) * split_columns);
            for (Index from = split * split_columns; from < split_end; from += strip) {
                const Index until = smaller(split_end, from + strip);
                for (Index panel = from; panel < until; panel += tile_columns) {
                    p.b = weight + panel * depth, p.b_depth = panel_width(panel), p.c = products + panel - from;
                    product<elements, false>(p, count, panel_width(panel), slice);
                }
                write(to, pass.grid, blocks.group(block), first, count, from, smaller(until, to.channels), products,
                      sums.of(block));
            }
        }
        finish_slice(sums, finish, thread, team);
    }
}

template <class Finish>
void run(const Pass& pass, bool rounded, int threads, Finish finish) {
#if defined(__AVX512F__)
    if (rounded && has_bfloat16_products()) return run<Elements::bfloat16_pairs>(pass, threads, finish);
#endif
    static_cast<void>(rounded);
    run<Elements::floats>(pass, threads, finish);
}

Index pixels_of(const ConvolutionShape& s) {
    return s.batch * s.out_height * s.out_width;
}

// The factors of the weight's gradient, packed in panels of columns, and how the work is divided: parts of the pixels,
// each added up by itself, and splits of the output channels.
template <Elements elements>
struct GradientCut {
    static constexpr Index numbers = elements == Elements::floats ? 1 : 2;  // pixels in a word
    Index out_channels, columns;                                            // of the gradient
    Index split_rows, splits;
    Index pixels, group_pixels, parts;
    Index depth;  // pixels that are packed at a time

    GradientCut(const ConvolutionShape& s, int threads)
        : out_channels(s.out_channels),
          columns(whole_vectors(s.in_channels)),
          pixels(pixels_of(s)),
          group_pixels(pixels / s.groups) {
        const Index most = ceiling(out_channels, gradient_rows),
                    row_bytes = columns * static_cast<Index>(sizeof(float));
        for (splits = 1; 2 * splits <= most && out_channels * row_bytes > splits * gradient_bytes;) splits *= 2;
        split_rows = ceiling(most, splits) * gradient_rows;
        splits = ceiling(out_channels, split_rows);
        parts = clamped(ceiling(threads, splits), 1, larger(1, pixels / depth_least));
        const Index width = columns + smaller(split_rows, out_channels);
        depth = clamped(rows_bytes / (width * static_cast<Index>(sizeof(float)) / numbers) / depth_least * depth_least,
                        depth_least, depth_most);
    }
    Index part_begin(Index part) const { return pixels * part / parts; }
    Index words() const { return ceiling(depth, numbers); }
    Index rows() const { return whole_vectors(smaller(split_rows, out_channels)); }
};

// dw += dyᵀ·a of a part's pixels, channels [begin, end) of dy.
template <Elements elements>
void add_up(const GradientCut<elements>& cut, const Rows& input, Pack pack_input, const Rows& grad_output,
            Pack pack_grad, Index part, Index begin, Index end, float* left, float* right, float* gradient) {
    const Index origin = cut.part_begin(part), last = cut.part_begin(part + 1);
    for (Index first = origin, count; first < last; first += count) {
        const Index group_end = (first / cut.group_pixels + 1) * cut.group_pixels;
        count = smaller(cut.depth, smaller(last, group_end) - first);
        for (Index row = begin; row < end; row += gradient_rows)
            pack_grad(grad_output, first, count, row, smaller(end, row + gradient_rows),
                      left + (row - begin) * cut.words(), gradient_rows);
        for (Index panel = 0; panel < cut.columns; panel += tile_columns) {
            const Index width = smaller(tile_columns, cut.columns - panel);
            pack_input(input, first, count, panel, smaller(panel + width, input.channels), right, width);
            for (Index row = begin; row < end; row += gradient_rows) {
                const Product p{left + (row - begin) * cut.words(),
                                1,
                                gradient_rows,
                                right,
                                width,
                                gradient + (row - begin) * cut.columns + panel,
                                cut.columns,
                                ceiling(count, cut.numbers)};
                const Index rows = smaller(gradient_rows, end - row);
                first > origin ? product<elements, true>(p, rows, width, slice)
                               : product<elements, false>(p, rows, width, slice);
            }
        }
    }
}

// Row `row` of the gradient: the parts' sums, in order.
void join_parts(const ConvolutionWeight& layout, float* grad_weight, Index row, Index channels, const float* gradient,
                Index parts, Index part_floats) {
    float* to = grad_weight + row * layout.out;
    for (Index c = 0; c < channels; c += lanes) {
        Vector sum = load_vector(gradient + c);
        for (Index part = 1; part < parts; ++part) sum += load_vector(gradient + part * part_floats + c);
        const Index count = smaller(lanes, channels - c);
        if (layout.in == 1) {
            store_lanes(to + c, sum, count);
        } else {
            for (Index lane = 0; lane < count; ++lane) to[(c + lane) * layout.in] = sum[lane];
        }
    }
}

template <Elements elements>
void weight_gradient(const ConvolutionBackwardWeight& args, int threads) {
    constexpr Packing packing = elements == Elements::floats ? Packing::floats : Packing::pixel_pairs;
    const ConvolutionShape& s = args.shape;
    const Grid grid(s);
    const GradientCut<elements> cut(s, threads);
    const Rows input{args.input, s.in_channels, cut.group_pixels, grid.dense() ? nullptr : &grid};
    const Rows grad_output{written(args.grad_output), s.out_channels, cut.group_pixels, nullptr};
    const Pack pack_input = pack_of<packing>(s.dtype, input.pixels);
    const Pack pack_grad = pack_of<packing>(s.dtype, grad_output.pixels);

    const auto floats = [](Index count) { return Workspace::padded(static_cast<std::size_t>(count) * sizeof(float)); };
    const Index part_floats = cut.out_channels * cut.columns;
    const std::size_t gradient_bytes_of_all = floats(cut.parts * part_floats);
    const std::size_t left_bytes = floats(cut.words() * ceiling(cut.rows(), gradient_rows) * gradient_rows);
    const std::size_t room = left_bytes + floats(cut.words() * tile_columns);
    Workspace workspace(gradient_bytes_of_all + room * static_cast<std::size_t>(threads));
    float* const gradient = static_cast<float*>(workspace.take(gradient_bytes_of_all));
    char* const scratch = static_cast<char*>(workspace.take(room * static_cast<std::size_t>(threads)));

#pragma omp parallel num_threads(threads)
    {
        char* const own = scratch + static_cast<std::size_t>(omp_get_thread_num()) * room;
        float* const left = reinterpret_cast<float*>(own);
        float* const right = reinterpret_cast<float*>(own + left_bytes);
#pragma omp for schedule(dynamic, 1)
        for (Index item = 0; item < cut.parts * cut.splits; ++item) {
            const Index part = item / cut.splits, begin = item % cut.splits * cut.split_rows;
            add_up(cut, input, pack_input, grad_output, pack_grad, part, begin,
                   smaller(cut.out_channels, begin + cut.split_rows), left, right,
                   gradient + part * part_floats + begin * cut.columns);
        }
#pragma omp for schedule(static)
        for (Index row = 0; row < cut.out_channels; ++row)
            join_parts(args.layout, args.grad_weight, row, s.in_channels, gradient + row * cut.columns, cut.parts,
                       part_floats);
    }
}

}  // namespace

void conv1x1_forward(const ConvolutionForward& args, int threads) {
    const ConvolutionShape& s = args.shape;
    const OutputStatistics& statistics = args.statistics;
    const Grid grid(s);
    const Index pixels = pixels_of(s), images = s.batch / s.groups;
    Pass pass{{args.input, s.in_channels, pixels / s.groups, grid.dense() ? nullptr : &grid},
              {args.output, s.out_height, s.out_width, s.out_channels, images, 1, args.bias, args.activation, nullptr,
               statistics.negative_slope, false},
              nullptr,
              {s.in_channels, s.out_channels, args.weight.in, args.weight.out, 0, 0},
              args.weight.values,
              pixels,
              s.groups,
              s.dtype,
              output_of(statistics, args.activation)};
    run(pass, s.integers, threads, [&](const BlockSums& sums, Index group, Index begin, Index end) {
        if (statistics.scale) finish_statistics(statistics, sums, group, begin, end);
    });
}

void conv1x1_backward_input(const ConvolutionBackwardInput& args, int threads) {
    const ConvolutionShape& s = args.shape;
    const Grid grid(s);
    const Index pixels = pixels_of(s), images = s.batch / s.groups;
    Pass pass{
        {written(args.grad_output), s.out_channels, pixels / s.groups, nullptr},
        {args.grad_input, s.height, s.width, s.in_channels, images, 1, nullptr, args.input, args.mean, 1.0f, false},
        grid.dense() ? nullptr : &grid,
        {s.out_channels, s.in_channels, args.weight.out, args.weight.in, 0, 0},
        args.weight.values,
        pixels,
        s.groups,
        s.dtype,
        Output::plain};
    if (args.input.scale) pass.kind = args.input.activation_first ? Output::kink_affine : Output::affine_kink;
    run(pass, s.integers, threads, [&](const BlockSums& sums, Index group, Index begin, Index end) {
        if (args.input.scale && args.sum) finish_sums(args, sums, group, begin, end);
    });
}

void conv1x1_backward_weight(const ConvolutionBackwardWeight& args, int threads) {
#if defined(__AVX512F__)
    if (args.shape.integers && has_bfloat16_products()) return weight_gradient<Elements::bfloat16_pairs>(args, threads);
#endif
    weight_gradient<Elements::floats>(args, threads);
}

}  // namespace ganvas::cpu::GANVAS_ISA
