// Convolutions as products of matrices, whatever the kernel. Compiled once per instruction set.
//
// Where the output is the plain map (direct_window.h), windows onto the input are gathered: each is a row of the left
// factor, the weight is the right one. Where the input is, each of its pixels times the weight gives what it adds to a
// window of the output, and windows are scattered. With stride 1 both ways lead there, and the one with fewer
// multiplications is taken: gathering has columns for the output's channels, scattering for those of a whole window,
// which fill the registers even if they are 1 or 3. Input gradients are the same with maps exchanged.
//
//   backward_weight   dw[p][n] = Σ_q P[q][p]·W[q][n], with pixels P of the plain map and windows W onto the other
//
// The pending activation is applied as factors are packed, some pixels at a time; statistics are taken as results are
// stored.
#include <omp.h>

#include "convolutions.h"
#include "direct_window.h"
#include "kept_weights.h"
#include "parallel.h"
#include "workspace.h"

namespace ganvas::cpu::GANVAS_ISA {
namespace {

constexpr Index slice = 128;      // words of a sum that are added up in one chain
constexpr Index strip = 64;       // columns of products that are stored together
constexpr Index rows_least = 24;  // pixels of a block
constexpr Index rows_most = 144;
constexpr Index rows_bytes = 384 << 10;         // of a block's packed windows
constexpr Index stretch_rows = 32 * run_rows;   // pixels whose sums are added up in one chain
constexpr Index band_bytes = 96 << 10;          // of the output that windows are scattered to
constexpr Index band_rows_least = 8;            // what reaches over a band's edge is multiplied twice
constexpr Index gradient_bytes = 512 << 10;     // of a part of the weight's gradient that a thread adds up in its cache
constexpr Index gradient_rows = most_together;  // channels of the plain map that lie side by side
constexpr Index left_pitch = gradient_rows + lanes, right_pitch = strip + lanes;  // words from pixel to pixel
constexpr Index depth_least = 64, depth_most = 256;                               // pixels that are packed at a time
constexpr Index kept_pixels_most = 4096;  // in evaluation: of more, the weight is packed in no time
constexpr Index scattering_costs = 5;     // quarters of what gathering with as many multiplications does

// The pixels of [first, last) in parts, each of one group.
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

// Rows of one image.
struct Bands {
    Index images, group_images, height, width;
    Index rows, per_image, per_group, count;

    Bands(Index images, Index groups, Index height, Index width, Index target)
        : images(images), group_images(images / groups), height(height), width(width) {
        rows = ceiling(height, ceiling(height, larger(1, target)));
        per_image = ceiling(height, rows);
        per_group = group_images * per_image;
        count = images * per_image;
    }
    Index group(Index band) const { return band / per_group; }
    Index image(Index band) const { return band / per_image; }
    Index top(Index band) const { return band % per_image * rows; }
    Index bottom(Index band) const { return smaller(top(band) + rows, height); }
    Index first(Index band) const { return (image(band) * height + top(band)) * width; }
    Index last(Index band) const { return (image(band) * height + bottom(band)) * width; }
};

// The weight, its taps numbered as the window's.
struct Kernel {
    const float* values;
    Index plain, looked;  // strides of the channels of either map
    Index row, column;
    const Window& window;
    Index plain_channels;

    Index taps() const { return window.y.count * window.x.count; }
    Index offset_of(Index tap) const {
        return window.y.kernel_tap(tap / window.x.count) * row + window.x.kernel_tap(tap % window.x.count) * column;
    }
    // Whether a plain channel's numbers lie side by side, in the order of a window's.
    bool lies_by_windows() const {
        const Index channels = window.channels;
        return looked == 1 && plain == taps() * channels && window.y.tap_step > 0 &&
               (window.x.count == 1 || column == channels) && (window.y.count == 1 || row == window.x.count * channels);
    }
    // Whether all numbers of a plain channel lie together, a looked-at channel's taps in their order.
    bool lies_by_channels() const { return column == 1 && row == window.x.count && looked == taps() && taps() > 1; }
};

// The right factor of gathered windows: columns [panel, panel + width) are channels of the plain map, rows the numbers
// of one tap, as words.
template <Elements elements>
void pack_tap(const Kernel& w, Index tap, Index panel, Index width, float* words) {
    constexpr Index step = elements == Elements::floats ? 1 : 2;
    const Index channels = w.window.channels;
    const Taps taps{channels, w.plain_channels, w.looked, w.plain, 0, 0};
    const float* const values = w.values + w.offset_of(tap);
    for (Index k = 0; k < channels; k += lanes)
        for (Index n = panel; n < panel + width; n += lanes) {
            TapBlock block[1];
            const Index count = smaller(lanes, channels - k);
            load_taps<1>(taps, values + k * w.looked + n * w.plain, count, smaller(lanes, w.plain_channels - n), block);
            store_rows<elements>(reinterpret_cast<const float*>(block[0]), lanes, count, lanes,
                                 words + k / step * width + n - panel, width);
        }
}

// The same of numbers [begin, end) of each plain channel as they lie in memory, of every tap.
void pack_by_channels(const Kernel& w, Index begin, Index end, Index panel, Index width, float* rows) {
    const Index taps = w.taps(), channels = w.window.channels, total = taps * channels;
    const bool mirrored = w.window.y.tap_step < 0;
    for (Index n = panel; n < panel + width; n += lanes)
        for (Index j = begin; j < end; j += lanes) {
            Vector block[lanes] = {};
            for (Index i = 0; i < smaller(lanes, w.plain_channels - n); ++i)
                block[i] = load_lanes(w.values + (n + i) * w.plain + j, total - j);
            transpose(block);
            for (Index i = 0; i < smaller(lanes, total - j); ++i) {
                const Index tap = (j + i) % taps, channel = (j + i) / taps;
                store_vector(rows + ((mirrored ? taps - 1 - tap : tap) * channels + channel) * width + n - panel,
                             block[i]);
            }
        }
}

// The right factor of scattered windows: columns are a window's numbers in panels, rows channels [begin, begin + lanes)
// of the plain map, of `depth` words. `numbers` has room for `lanes` rows of them.
template <Elements elements>
void pack_columns(const Kernel& w, Index begin, Index depth, float* numbers, float* words) {
    constexpr Index step = elements == Elements::floats ? 1 : 2;
    const Index channels = w.window.channels, columns = whole_vectors(w.window.depth()), pitch = columns + lanes;
    const Index count = smaller(lanes, w.plain_channels - begin);
    const Taps taps{w.plain_channels, channels, w.plain, w.looked, 0, 0};
    for (Index tap = 0; tap < w.taps(); ++tap)
        for (Index n = 0; n < channels; n += lanes) {
            TapBlock block[1];  // zeros past the channels
            load_taps<1>(taps, w.values + w.offset_of(tap) + begin * w.plain + n * w.looked, count,
                         smaller(lanes, channels - n), block);
            for (Index i = 0; i < count; ++i) store_vector(numbers + i * pitch + tap * channels + n, block[0][i]);
        }
    for (Index panel = 0; panel < columns; panel += tile_columns) {
        const Index width = smaller(tile_columns, columns - panel);
        store_rows<elements>(numbers + panel, pitch, count, width, words + panel * depth + begin / step * width, width);
    }
}

// Of few windows the weight is read once, as it lies: packing it would take longer than the products do.
constexpr Index few_windows = 48;
constexpr int dot_rows = 4, dot_columns = lanes == 16 ? 6 : 3;  // whose sums fill the registers
constexpr Index dot_strip = lanes == 16 ? 48 : 24;              // columns that are stored together

// products[r][n] = Σ_k rows[r][k]·weight[n][k] of a tile; rows are zero from `depth` up to whole vectors.
template <int rows_of_tile, int columns_of_tile>
[[gnu::noinline]] void dot_tile(const float* rows, Index width, const float* weight, Index depth, float* products,
                                Index products_row) {
    Vector sum[rows_of_tile][columns_of_tile] = {};
    for (Index k = 0; k < depth; k += lanes) {
        Vector right[columns_of_tile];
#pragma GCC unroll 6
        for (int n = 0; n < columns_of_tile; ++n) right[n] = load_lanes(weight + n * depth + k, depth - k);
#pragma GCC unroll 4
        for (int r = 0; r < rows_of_tile; ++r) {
            const Vector left = load_vector(rows + r * width + k);
#pragma GCC unroll 6
            for (int n = 0; n < columns_of_tile; ++n) sum[r][n] += left * right[n];
        }
    }
    for (int r = 0; r < rows_of_tile; ++r)
        for (int n = 0; n < columns_of_tile; ++n) {
            float total = 0;
            for (int lane = 0; lane < lanes; ++lane) total += sum[r][n][lane];
            products[r * products_row + n] = total;
        }
}

template <int columns_of_tile>
void dot_column(const float* rows, Index width, Index count, const float* weight, Index depth, float* products,
                Index products_row) {
    const auto tile_of = [](Index rest) {
        return rest >= 4   ? dot_tile<4, columns_of_tile>
               : rest == 3 ? dot_tile<3, columns_of_tile>
               : rest == 2 ? dot_tile<2, columns_of_tile>
                           : dot_tile<1, columns_of_tile>;
    };
    for (Index r = 0; r < count; r += dot_rows)
        tile_of(count - r)(rows + r * width, width, weight, depth, products + r * products_row, products_row);
}

// The same for all of `count` rows and `columns` columns.
void multiply_in_place(const float* rows, Index width, Index count, const float* weight, Index depth, Index columns,
                       float* products, Index products_row) {
    Index n = 0;
    for (; n + dot_columns <= columns; n += dot_columns)
        dot_column<dot_columns>(rows, width, count, weight + n * depth, depth, products + n, products_row);
    for (; n < columns; ++n) dot_column<1>(rows, width, count, weight + n * depth, depth, products + n, products_row);
}

// Numbers of windows in the order in which the weight has them, channel by channel, and zeros after them.
void order_by_channels(const Kernel& w, float* rows, Index width, Index count, float* scratch) {
    const Index taps = w.taps(), channels = w.window.channels;
    const bool mirrored = w.window.y.tap_step < 0;
    for (Index row = 0; row < count; ++row, rows += width) {
        __builtin_memcpy(scratch, rows, static_cast<std::size_t>(taps * channels) * sizeof(float));
        for (Index tap = 0; tap < taps; ++tap)
            for (Index c = 0; c < channels; ++c)
                rows[c * taps + (mirrored ? taps - 1 - tap : tap)] = scratch[tap * channels + c];
    }
}

// Stores channels [begin, end), no more than a strip, of `count` pixels of one group, and their sums.
template <class T, Output kind>
void write_rows(const Destination& to, Index group, Index first, Index count, Index begin, Index end,
                const float* products, Index products_row, double* sums) {
    const Leaky leaky = leaky_of<kind>(to);
    const Index vectors = ceiling(end - begin, lanes);
    Channels channels[strip_vectors];
    begin_channels<kind>(to, group, begin, end, products, products_row, count, leaky, channels);
    for (Index stretch = 0; stretch < count; stretch += stretch_rows) {
        Vector sums_before[strip_vectors], squares_before[strip_vectors];
        for (Index i = 0; i < vectors; ++i) {
            sums_before[i] = channels[i].sum, squares_before[i] = channels[i].square;
            channels[i].sum = channels[i].square = Vector{};
        }
        write_runs<T, kind>(to, (first + stretch) * to.channels + begin, to.channels,
                            smaller(stretch_rows, count - stretch), vectors, products + stretch * products_row,
                            products_row, leaky, channels);
        for (Index i = 0; i < vectors; ++i) channels[i].sum += sums_before[i], channels[i].square += squares_before[i];
    }
    keep_sums<kind>(channels, vectors, begin, count, to.channels, sums);
}

using WriteRows = void (*)(const Destination&, Index group, Index first, Index count, Index begin, Index end,
                           const float* products, Index products_row, double* sums);

// A pass from one map to another.
struct Pass {
    Windowed from;  // scattered: the plain map, a window for each of its pixels
    Destination to;
    Kernel kernel;
    Index images, groups;
    Dtype dtype;
    Output kind;
    Index weight_numbers;  // of a weight whose packed form may be kept

    // What the packed weight hangs on.
    WeightForm form(bool gathers, Elements elements) const {
        const Along &y = kernel.window.y, &x = kernel.window.x;
        return {{direct_form, gathers, static_cast<Index>(elements), kernel.window.channels, kernel.plain_channels,
                 kernel.plain, kernel.looked, kernel.row, kernel.column, y.count, y.tap, y.tap_step, x.count, x.tap,
                 x.tap_step}};
    }
    // The packed weight, if it is kept: of few pixels, of which packing takes its share.
    KeptWeight kept(bool gathers, Elements elements, std::size_t bytes, int threads) const {
        const bool few = images * to.height * to.width <= kept_pixels_most;
        return {kernel.values, few ? weight_numbers : 0, form(gathers, elements), bytes, threads};
    }

    WriteRows write() const {
        return for_output(dtype, kind, []<class T, Output of>() -> WriteRows { return write_rows<T, of>; });
    }
};

// Each thread takes a block of pixels, and where blocks are few a part of the columns, through products and output
// while they lie in its cache. The packed weight is made first and shared. Then finish(sums, group, begin, end) is
// called for slices of the channels.
template <Elements elements, class Finish>
void gather(Pass pass, int threads, Finish finish) {
    constexpr Index numbers = elements == Elements::floats ? 1 : 2;
    constexpr Packing packing = elements == Elements::floats ? Packing::floats : Packing::number_pairs;
    const Destination& to = pass.to;
    const Kernel& kernel = pass.kernel;
    const Index channels = kernel.window.channels, taps = kernel.taps(), depth = taps * channels / numbers;
    const Index columns = whole_vectors(to.channels), panels = ceiling(columns, tile_columns);
    const bool packed = lie_packed<elements>(pass.from, pass.dtype);
    // Words that are multiplied at a time: all, or as many as the cache has room for beside the least of rows.
    const Index most = rows_bytes / (rows_least * static_cast<Index>(sizeof(float)));
    const Index chunk = packed ? depth : ceiling(depth, ceiling(depth, most));
    const Index width = (whole_vectors(chunk * numbers) + lanes) / numbers;
    const Index cached = clamped(rows_bytes / (width * static_cast<Index>(sizeof(float))), rows_least, rows_most);
    const Index pixels = pass.images * to.height * to.width;
    const PixelBlocks blocks(pixels, pass.groups, larger(rows_least, smaller(cached, ceiling(pixels, 2 * threads))));
    const Index splits = smaller(panels, ceiling(2 * threads, blocks.count));
    const Index split_columns = ceiling(panels, splits) * tile_columns;
    const bool whole = chunk == depth;
    const Index products_row = whole ? strip : split_columns;

    const std::size_t weight_bytes = floats(depth * columns);
    const std::size_t sum_bytes = PartSums<PixelBlocks>::bytes(blocks, to.channels);
    const std::size_t coefficient_bytes = floats(pass.groups * pass.from.coefficient_floats());
    const std::size_t row_bytes = floats(packed ? 0 : blocks.rows * width);
    const std::size_t room = row_bytes + floats(blocks.rows * products_row);
    KeptWeight kept = pass.kept(true, elements, weight_bytes, threads);
    Workspace workspace(weight_bytes + Workspace::padded(sum_bytes) + coefficient_bytes);
    const ThreadWorkspaces scratch(room, threads);
    float* const weight = static_cast<float*>(kept.memory() ? kept.memory() : workspace.take(weight_bytes));
    const PartSums<PixelBlocks> sums{blocks, to.channels, static_cast<double*>(workspace.take(sum_bytes))};
    pass.from.set_coefficients(static_cast<float*>(workspace.take(coefficient_bytes)), pass.groups);
    const PackWords pack = pack_words_of<packing>(pass.dtype, pass.from.source.pixels);
    const WriteRows write = pass.write();
    const auto panel_width = [&](Index panel) { return smaller(tile_columns, columns - panel); };
    const bool by_channels = elements == Elements::floats && kernel.lies_by_channels();
    const Index pieces = by_channels ? ceiling(depth, strip) : taps;
    Shares shares(blocks.count * splits, threads);

#pragma omp parallel num_threads(threads)
    {
        const Index thread = omp_get_thread_num(), team = omp_get_num_threads();
        char* const own = scratch.of(thread);
        float* const rows = reinterpret_cast<float*>(own);
        float* const products = reinterpret_cast<float*>(own + row_bytes);
        const Index items = kept.is_made() ? 0 : panels * pieces;
#pragma omp for schedule(static)
        for (Index item = 0; item < items; ++item) {
            const Index panel = item / pieces * tile_columns, piece = item % pieces, panel_columns = panel_width(panel);
            float* const words = weight + panel * depth;
            if (by_channels)
                pack_by_channels(kernel, piece * strip, smaller(depth, (piece + 1) * strip), panel, panel_columns,
                                 words);
            else
                pack_tap<elements>(kernel, piece, panel, panel_columns,
                                   words + piece * (channels / numbers) * panel_columns);
        }
        for (Index item; (item = shares.take(thread)) >= 0;) {
            const Index block = item / splits, split = item % splits;
            const Index first = blocks.first(block), count = blocks.last(block) - first;
            const Index split_begin = split * split_columns, split_end = smaller(columns, split_begin + split_columns);
            const auto write_strips = [&](Index from, Index until) {
                for (Index begin = from; begin < until; begin += strip)
                    write(to, blocks.group(block), first, count, begin,
                          smaller(smaller(begin + strip, until), to.channels), products + begin - from, products_row,
                          sums.of(block));
            };
            for (Index k = 0; k < depth; k += chunk) {
                Product p{rows, width, 1, nullptr, 0, nullptr, products_row, smaller(chunk, depth - k)};
                if (packed) {
                    p.a = static_cast<const float*>(pass.from.source.pixels.stored) + first * depth;
                    p.a_row = depth;
                    // The block after this one: no stretch is long enough for the processor to foresee the next.
                    p.later = {Stretch{p.a + count * depth, count * depth / cache_line}};
                } else {
                    pack(pass.from, first, count, k * numbers, (k + p.depth) * numbers, rows, width);
                }
                const Index stretch = whole ? strip : split_columns;
                for (Index from = split_begin; from < split_end; from += stretch) {
                    const Index until = smaller(split_end, from + stretch);
                    for (Index panel = from; panel < until; panel += tile_columns) {
                        p.b_depth = panel_width(panel), p.b = weight + panel * depth + k * p.b_depth;
                        p.c = products + panel - from;
                        k > 0 ? product<elements, true>(p, count, p.b_depth, slice)
                              : product<elements, false>(p, count, p.b_depth, slice);
                        p.later = {};  // fetched beside the first panel
                    }
                    if (whole) write_strips(from, until);
                }
            }
            if (!whole) write_strips(split_begin, split_end);
        }
#pragma omp barrier
        finish_slice(to, sums, finish, thread, team);
    }
    kept.keep();
}

// Whether windows are few enough, and the weight lies as it must, for gather_few.
bool are_few(const Pass& pass) {
    const Index pixels = pass.images * pass.to.height * pass.to.width;
    return pixels <= few_windows * pass.groups && (pass.kernel.lies_by_windows() || pass.kernel.lies_by_channels());
}

// The same of few windows: each thread takes a part of the columns through products and output.
template <class Finish>
void gather_few(Pass pass, int threads, Finish finish) {
    const Destination& to = pass.to;
    const Kernel& kernel = pass.kernel;
    const Index depth = kernel.window.depth(), width = whole_vectors(depth) + lanes;
    const PixelBlocks blocks(pass.images * to.height * to.width, pass.groups, few_windows);
    const Index strips = ceiling(to.channels, dot_strip), splits = smaller(strips, ceiling(2 * threads, blocks.count));
    const Index split_columns = ceiling(strips, splits) * dot_strip;

    const std::size_t sum_bytes = PartSums<PixelBlocks>::bytes(blocks, to.channels);
    const std::size_t coefficient_bytes = floats(pass.groups * pass.from.coefficient_floats());
    const std::size_t row_bytes = floats((blocks.rows + 1) * width), room = row_bytes + floats(blocks.rows * dot_strip);
    Workspace workspace(Workspace::padded(sum_bytes) + coefficient_bytes);
    const ThreadWorkspaces scratch(room, threads);
    const PartSums<PixelBlocks> sums{blocks, to.channels, static_cast<double*>(workspace.take(sum_bytes))};
    pass.from.set_coefficients(static_cast<float*>(workspace.take(coefficient_bytes)), pass.groups);
    const PackWords pack = pack_words_of<Packing::floats>(pass.dtype, pass.from.source.pixels);
    const WriteRows write = pass.write();

#pragma omp parallel num_threads(threads)
    {
        const Index thread = omp_get_thread_num(), team = omp_get_num_threads();
        char* const own = scratch.of(thread);
        float* const rows = reinterpret_cast<float*>(own);
        float* const products = reinterpret_cast<float*>(own + row_bytes);
        Index packed = -1;  // the block whose rows these are
#pragma omp for schedule(static)
        for (Index item = 0; item < blocks.count * splits; ++item) {
            const Index block = item / splits, split = item % splits;
            const Index first = blocks.first(block), count = blocks.last(block) - first;
            if (block != packed) {
                pack(pass.from, first, count, 0, depth, rows, width);
                if (!kernel.lies_by_windows()) order_by_channels(kernel, rows, width, count, rows + count * width);
                for (Index row = 0; row < count; ++row) store_vector(rows + row * width + depth, Vector{});
                packed = block;
            }
            const Index end = smaller(to.channels, (split + 1) * split_columns);
            for (Index n = split * split_columns; n < end; n += dot_strip) {
                const Index until = smaller(end, n + dot_strip);
                multiply_in_place(rows, width, count, kernel.values + n * kernel.plain, depth, until - n, products,
                                  dot_strip);
                write(to, blocks.group(block), first, count, n, until, products, dot_strip, sums.of(block));
            }
        }
        finish_slice(to, sums, finish, thread, team);
    }
}

// to[i] += from[i] of `count` runs of a row, the windows' `pitch` apart, the map's `step`. Runs whose vectors overlap,
// be it in lanes that are masked out, do not follow each other: a load would wait for what has just been stored.
void add_runs(const float* from, Index pitch, Index count, Index run, float* to, Index step) {
    const Index apart = ceiling(whole_vectors(run), step);
    for (Index i = 0; i < run; i += lanes)
        for (Index start = 0; start < apart; ++start)
            for (Index x = start; x < count; x += apart) {
                const float* const values = from + x * pitch + i;
                float* const sums = to + x * step + i;
                store_lanes(sums, load_lanes(sums, run - i) + load_lanes(values, run - i), run - i);
            }
}

// Adds the windows of the plain pixels of rows [begin, end) to rows [top, bottom) of the other map. `windows` has a row
// of `pitch` numbers for each of those pixels.
void add_windows(const Window& w, Index plain_width, Index begin, Index end, const float* windows, Index pitch,
                 Index top, Index bottom, Index width, float* band) {
    const Index run = w.run(), runs_of_row = w.runs_of_row(), c = w.channels, step = w.x.stride * c;
    for (Index qy = begin; qy < end; ++qy, windows += plain_width * pitch)
        for (Index ty = 0; ty < w.y.count; ++ty) {
            const Index y = w.y.stride * qy + w.y.offset + w.y.step * ty;
            if (y < top || y >= bottom) continue;
            for (Index tx = 0; tx < runs_of_row; ++tx) {
                const float* const from = windows + (ty * runs_of_row + tx) * run;
                const Index left = w.x.offset + w.x.step * tx;
                float* const to = band + ((y - top) * width + left) * c;
                // Those that are inside the map.
                const Span inner = w.x.inside(left, run / c, width, plain_width);
                const auto add_one = [&](Index qx) {
                    const Index x = left + w.x.stride * qx;
                    const Index first = clamped(-x * c, 0, run), last = clamped((width - x) * c, first, run);
                    add_runs(from + qx * pitch + first, 0, 1, last - first, to + qx * step + first, step);
                };
                for (Index qx = 0; qx < inner.first; ++qx) add_one(qx);
                add_runs(from + inner.first * pitch, pitch, inner.last - inner.first, run, to + inner.first * step,
                         step);
                for (Index qx = inner.last; qx < plain_width; ++qx) add_one(qx);
            }
        }
}

// Each thread takes bands of the output: it multiplies the plain pixels whose windows reach into one, and adds up what
// they add to it, while it lies in the cache.
template <Elements elements, class Finish>
void scatter(Pass pass, int threads, Finish finish) {
    constexpr Index numbers = elements == Elements::floats ? 1 : 2;
    constexpr Packing packing = elements == Elements::floats ? Packing::floats : Packing::number_pairs;
    const Destination& to = pass.to;
    const Kernel& kernel = pass.kernel;
    const Window& window = kernel.window;
    const Windowed& plain = pass.from;
    const Index channels = kernel.plain_channels, depth = ceiling(channels, numbers);
    const Index width = (whole_vectors(channels) + lanes) / numbers, columns = whole_vectors(window.depth());
    const bool packed = lie_packed<elements>(plain, pass.dtype);
    const Index row_floats = to.width * to.channels;
    const Index enough = ceiling(to.height * pass.images, threads);  // rows, so that each thread has some
    const Index cached = larger(band_rows_least, band_bytes / (row_floats * static_cast<Index>(sizeof(float))));
    const Bands bands(pass.images, pass.groups, to.height, to.width, smaller(enough, cached));
    // Rows of plain pixels that are multiplied together.
    const Index together = larger(1, rows_least * 2 / plain.width), most = together * plain.width;

    const std::size_t weight_bytes = floats(depth * columns), sum_bytes = PartSums<Bands>::bytes(bands, to.channels);
    const std::size_t coefficient_bytes = floats(pass.groups * plain.coefficient_floats());
    const std::size_t number_bytes = floats(lanes * (columns + lanes));
    const std::size_t row_bytes = floats(packed ? 0 : most * width);
    const std::size_t product_bytes = larger(floats(most * columns), number_bytes);
    const std::size_t room = row_bytes + product_bytes + floats(bands.rows * row_floats + lanes);
    KeptWeight kept = pass.kept(false, elements, weight_bytes, threads);
    Workspace workspace(weight_bytes + Workspace::padded(sum_bytes) + coefficient_bytes);
    const ThreadWorkspaces scratch(room, threads);
    float* const weight = static_cast<float*>(kept.memory() ? kept.memory() : workspace.take(weight_bytes));
    const PartSums<Bands> sums{bands, to.channels, static_cast<double*>(workspace.take(sum_bytes))};
    pass.from.set_coefficients(static_cast<float*>(workspace.take(coefficient_bytes)), pass.groups);
    const PackWords pack = pack_words_of<packing>(pass.dtype, plain.source.pixels);
    const WriteRows write = pass.write();
    Shares shares(bands.count, threads);

#pragma omp parallel num_threads(threads)
    {
        const Index thread = omp_get_thread_num(), team = omp_get_num_threads();
        char* const own = scratch.of(thread);
        float* const rows = reinterpret_cast<float*>(own);
        float* const products = reinterpret_cast<float*>(own + row_bytes);
        float* const band_pixels = reinterpret_cast<float*>(own + row_bytes + product_bytes);
        const Index packed_channels = kept.is_made() ? 0 : channels;
#pragma omp for schedule(static)
        for (Index k = 0; k < packed_channels; k += lanes) pack_columns<elements>(kernel, k, depth, products, weight);
        for (Index band; (band = shares.take(thread)) >= 0;) {
            const Index top = bands.top(band), bottom = bands.bottom(band);
            __builtin_memset(band_pixels, 0, static_cast<std::size_t>((bottom - top) * row_floats) * sizeof(float));
            const Span meeting = window.y.meeting(top, bottom, plain.height);
            for (Index qy = meeting.first; qy < meeting.last; qy += together) {
                const Index until = smaller(qy + together, meeting.last), count = (until - qy) * plain.width;
                const Index first = (bands.image(band) * plain.height + qy) * plain.width;
                Product p{rows, width, 1, nullptr, 0, nullptr, columns, depth};
                if (packed) {
                    const Index pixel_bytes = depth * static_cast<Index>(sizeof(float));
                    p.a = reinterpret_cast<const float*>(static_cast<const char*>(plain.source.pixels.stored) +
                                                         first * pixel_bytes);
                    p.a_row = depth;
                } else {
                    pack(plain, first, count, 0, channels, rows, width);
                }
                for (Index panel = 0; panel < columns; panel += tile_columns) {
                    p.b_depth = smaller(tile_columns, columns - panel);
                    p.b = weight + panel * depth, p.c = products + panel;
                    product<elements, false>(p, count, p.b_depth, slice);
                }
                add_windows(window, plain.width, qy, until, products, columns, top, bottom, to.width, band_pixels);
            }
            for (Index begin = 0; begin < to.channels; begin += strip)
                write(to, bands.group(band), bands.first(band), (bottom - top) * to.width, begin,
                      smaller(begin + strip, to.channels), band_pixels + begin, to.channels, sums.of(band));
        }
#pragma omp barrier
        finish_slice(to, sums, finish, thread, team);
    }
    kept.keep();
}

// Which map is plain, and how it meets the other.
struct Relation {
    bool input_is_plain;
    Along y, x;
};

Along along(const KernelAxis& axis, bool mirrored) {
    if (mirrored)
        return {axis.size, 1, axis.padding - axis.dilation * (axis.size - 1), axis.dilation, axis.size - 1, -1};
    return {axis.size, axis.stride, -axis.padding, axis.dilation, 0, 1};
}

Relation relation_of(const ConvolutionShape& s, bool mirrored) {
    return {s.transposed != mirrored, along(s.rows, mirrored), along(s.columns, mirrored)};
}

// Multiplications, in quarters, by a relation that gathers what goes from one map to the other, or scatters it.
Index cost_of(bool gathers, Index taps, Index from_pixels, Index from_channels, Index to_pixels, Index to_channels) {
    return gathers ? 4 * to_pixels * taps * from_channels * whole_vectors(to_channels)
                   : scattering_costs * from_pixels * from_channels * whole_vectors(taps * to_channels);
}

// The relation of fewer multiplications, from the input to the output or back.
Relation cheaper_relation(const ConvolutionShape& s, bool forward) {
    const Relation natural = relation_of(s, false);
    if (s.rows.stride != 1 || s.columns.stride != 1) return natural;
    const Index taps = s.rows.size * s.columns.size, input = s.height * s.width, output = s.out_height * s.out_width;
    const auto cost = [&](const Relation& relation) {
        return forward ? cost_of(!relation.input_is_plain, taps, input, s.in_channels, output, s.out_channels)
                       : cost_of(relation.input_is_plain, taps, output, s.out_channels, input, s.in_channels);
    };
    const Relation mirrored = relation_of(s, true);
    return cost(mirrored) < cost(natural) ? mirrored : natural;
}

// The weight, or where its gradient goes. The kernel keeps a reference to the window.
Kernel kernel_of(const Relation& relation, const ConvolutionWeight& w, const Window& window, Index plain_channels) {
    const bool swaps = relation.input_is_plain;
    return {w.values, swaps ? w.in : w.out, swaps ? w.out : w.in, w.row, w.column, window, plain_channels};
}

// Calls finish as gather and scatter do.
template <class Finish>
void run(const ConvolutionShape& s, const Source& from, const Destination& to, const ConvolutionWeight& w,
         const Relation& relation, bool from_input, Output kind, Index weight_numbers, int threads, Finish finish) {
    const bool gathers = relation.input_is_plain != from_input;
    const Index looked_channels = relation.input_is_plain ? s.out_channels : s.in_channels;
    const Index plain_channels = relation.input_is_plain ? s.in_channels : s.out_channels;
    const Window window{relation.y, relation.x, looked_channels};
    const Kernel kernel = kernel_of(relation, w, window, plain_channels);
    const Windowed windows =
        gathers ? Windowed{from, s.batch, window, to.height, to.width}
                : Windowed{from, s.batch, {one_pixel, one_pixel, plain_channels}, from.height, from.width};
    const Pass pass{windows, to, kernel, s.batch, s.groups, s.dtype, kind, weight_numbers};
#if defined(__AVX512F__)
    // A pair of numbers is one of channels.
    if (s.integers && has_bfloat16_products() && windows.window.channels % 2 == 0)
        return gathers ? gather<Elements::bfloat16_pairs>(pass, threads, finish)
                       : scatter<Elements::bfloat16_pairs>(pass, threads, finish);
#endif
    if (gathers && are_few(pass)) return gather_few(pass, threads, finish);
    gathers ? gather<Elements::floats>(pass, threads, finish) : scatter<Elements::floats>(pass, threads, finish);
}

// How the weight's gradient is divided: parts of the pixels, each added up by itself, and splits of its rows and
// columns.
template <Elements elements>
struct GradientCut {
    static constexpr Index numbers = elements == Elements::floats ? 1 : 2;  // pixels in a word
    Index rows, columns;                                                    // of the gradient
    Index split_rows, row_splits, split_columns, column_splits;
    Index pixels, group_pixels, parts;
    Index depth;  // pixels that are packed at a time

    GradientCut(Index rows, Index columns, Index pixels, Index groups, int threads)
        : rows(rows), columns(whole_vectors(columns)), pixels(pixels), group_pixels(pixels / groups) {
        const Index most = gradient_bytes / static_cast<Index>(sizeof(float));
        // All of the columns and some of the rows, if there are rows enough.
        split_columns = this->columns;
        if (split_columns * smaller(rows, gradient_rows) > most)
            split_columns = larger(1, most / smaller(rows, gradient_rows) / strip) * strip;
        split_rows = larger(1, most / split_columns / gradient_rows) * gradient_rows;
        balance(rows, gradient_rows, split_rows, row_splits);
        balance(this->columns, strip, split_columns, column_splits);
        parts = clamped(ceiling(threads, row_splits * column_splits), 1, larger(1, pixels / depth_least));
        const Index width = right_pitch + smaller(split_rows, rows);
        depth = clamped(rows_bytes / (width * static_cast<Index>(sizeof(float)) / numbers) / depth_least * depth_least,
                        depth_least, depth_most);
    }
    Index part_begin(Index part) const { return pixels * part / parts; }
    Index words() const { return ceiling(depth, numbers); }
    Index left_words() const { return ceiling(smaller(split_rows, rows), gradient_rows) * words() * left_pitch; }

  private:
    // Splits of about the same length, in whole units.
    static void balance(Index length, Index unit, Index& split, Index& splits) {
        const Index units = ceiling(length, unit);
        splits = ceiling(units, ceiling(split, unit));
        split = ceiling(units, splits) * unit;
        splits = ceiling(length, split);
    }
};

struct GradientPass {
    Windowed plain, windows;
    PackWords pack_plain, pack_windows;
    bool packed;  // the plain map's pixels are words as they lie in memory
};

// dw += Pᵀ·W of a part's pixels, channels [row, row_end) of the plain map and columns [column, column_end).
template <Elements elements>
void add_up(const GradientCut<elements>& cut, const GradientPass& pass, Index part, Index row, Index row_end,
            Index column, Index column_end, float* left, float* right, float* gradient) {
    const Index origin = cut.part_begin(part), last = cut.part_begin(part + 1), numbers = pass.windows.window.depth();
    const Index channels = pass.plain.source.channels;
    for (Index first = origin, count; first < last; first += count) {
        const Index group_end = (first / cut.group_pixels + 1) * cut.group_pixels;
        count = smaller(cut.depth, smaller(last, group_end) - first);
        if (!pass.packed)
            for (Index r = row; r < row_end; r += gradient_rows)
                pass.pack_plain(pass.plain, first, count, r, smaller(row_end, r + gradient_rows),
                                left + (r - row) / gradient_rows * cut.words() * left_pitch, left_pitch);
        for (Index panel = column; panel < column_end; panel += strip) {
            const Index width = smaller(strip, column_end - panel);
            pass.pack_windows(pass.windows, first, count, panel, smaller(panel + width, numbers), right, right_pitch);
            for (Index r = row; r < row_end; r += gradient_rows) {
                const Index height = smaller(gradient_rows, row_end - r);
                Product p{left + (r - row) / gradient_rows * cut.words() * left_pitch,
                          1,
                          left_pitch,
                          right,
                          right_pitch,
                          gradient + (r - row) * cut.columns + panel,
                          cut.columns,
                          ceiling(count, cut.numbers)};
                if (pass.packed) {
                    const float* const pixels =
                        static_cast<const float*>(pass.plain.source.pixels.stored) + first * channels;
                    p.a = pixels + r;
                    p.a_depth = channels;
                    if (panel == column && row_end - row == channels)  // a share of the next pixels
                        p.later = {Stretch{pixels + count * (channels + r), count * height / cache_line}};
                }
                first > origin ? product<elements, true>(p, height, width, slice)
                               : product<elements, false>(p, height, width, slice);
            }
        }
    }
}

// Row `row` of the gradient: the parts' sums, in order, each number where the kernel has it.
void join_parts(const Kernel& kernel, float* grad_weight, Index row, const float* gradient, Index parts,
                Index part_floats) {
    const Index channels = kernel.window.channels;
    for (Index tap = 0; tap < kernel.taps(); ++tap, gradient += channels) {
        float* const to = grad_weight + row * kernel.plain + kernel.offset_of(tap);
        for (Index c = 0; c < channels; c += lanes) {
            const Index count = smaller(lanes, channels - c);
            Vector sum = load_lanes(gradient + c, count);
            for (Index part = 1; part < parts; ++part) sum += load_lanes(gradient + part * part_floats + c, count);
            if (kernel.looked == 1) {
                store_lanes(to + c, sum, count);
            } else {
                for (Index lane = 0; lane < count; ++lane) to[(c + lane) * kernel.looked] = sum[lane];
            }
        }
    }
}

#if defined(__AVX512F__)
// Whether products of pairs outweigh making those, which takes its time for every number of either factor. The harmonic
// mean of the gradient's rows and columns tells.
bool gradient_pays_in_pairs(const ConvolutionShape& s, const Relation& relation) {
    constexpr Index least = 56;
    const Index plain = relation.input_is_plain ? s.in_channels : s.out_channels;
    const Index looked = relation.input_is_plain ? s.out_channels : s.in_channels;
    const Index columns = s.rows.size * s.columns.size * looked;
    return 2 * plain * columns >= least * (plain + columns);
}
#endif

// Multiplications of the weight's gradient by a relation: its rows are channels of the plain map.
Index gradient_cost(const ConvolutionShape& s, const Relation& relation) {
    constexpr Index whole = tile_rows<tile_vectors>;
    const Index taps = s.rows.size * s.columns.size;
    const Index pixels = relation.input_is_plain ? s.height * s.width : s.out_height * s.out_width;
    const Index plain = relation.input_is_plain ? s.in_channels : s.out_channels;
    const Index looked = relation.input_is_plain ? s.out_channels : s.in_channels;
    return pixels * ceiling(plain, whole) * whole * whole_vectors(taps * looked);
}

template <Elements elements>
void weight_gradient(const ConvolutionBackwardWeight& args, const Relation& relation, int threads) {
    constexpr Packing packing = elements == Elements::floats ? Packing::floats : Packing::window_pairs;
    const ConvolutionShape& s = args.shape;
    const Source input = input_of(args), grad_output = grad_output_of(args);
    const Source& of_plain = relation.input_is_plain ? input : grad_output;
    const Source& of_windows = relation.input_is_plain ? grad_output : input;
    const Window window{relation.y, relation.x, of_windows.channels};
    const Windowed plain{of_plain, s.batch, {one_pixel, one_pixel, of_plain.channels}, of_plain.height, of_plain.width};
    GradientPass pass{plain,
                      {of_windows, s.batch, window, of_plain.height, of_plain.width},
                      pack_words_of<packing>(s.dtype, of_plain.pixels),
                      pack_words_of<packing>(s.dtype, of_windows.pixels),
                      elements == Elements::floats && lie_packed<Elements::floats>(plain, s.dtype)};
    const GradientCut<elements> cut(of_plain.channels, window.depth(), s.batch * of_plain.height * of_plain.width,
                                    s.groups, threads);
    const Kernel kernel = kernel_of(relation, args.layout, window, of_plain.channels);

    const Index part_floats = cut.rows * cut.columns;
    const std::size_t gradient_bytes_of_all = floats(cut.parts * part_floats);
    const std::size_t plain_bytes = floats(s.groups * pass.plain.coefficient_floats());
    const std::size_t window_bytes = floats(s.groups * pass.windows.coefficient_floats());
    const std::size_t left_bytes = floats(pass.packed ? 0 : cut.left_words());
    const std::size_t room = left_bytes + floats(cut.words() * right_pitch);
    Workspace workspace(gradient_bytes_of_all + plain_bytes + window_bytes);
    const ThreadWorkspaces scratch(room, threads);
    float* const gradient = static_cast<float*>(workspace.take(gradient_bytes_of_all));
    pass.plain.set_coefficients(static_cast<float*>(workspace.take(plain_bytes)), s.groups);
    pass.windows.set_coefficients(static_cast<float*>(workspace.take(window_bytes)), s.groups);
    Shares shares(cut.parts * cut.row_splits * cut.column_splits, threads);

#pragma omp parallel num_threads(threads)
    {
        const Index thread = omp_get_thread_num();
        char* const own = scratch.of(thread);
        float* const left = reinterpret_cast<float*>(own);
        float* const right = reinterpret_cast<float*>(own + left_bytes);
        for (Index item; (item = shares.take(thread)) >= 0;) {
            const Index part = item / (cut.row_splits * cut.column_splits);
            const Index row = item / cut.column_splits % cut.row_splits * cut.split_rows;
            const Index column = item % cut.column_splits * cut.split_columns;
            add_up(cut, pass, part, row, smaller(cut.rows, row + cut.split_rows), column,
                   smaller(cut.columns, column + cut.split_columns), left, right,
                   gradient + part * part_floats + row * cut.columns);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (Index row = 0; row < cut.rows; ++row)
            join_parts(kernel, args.grad_weight, row, gradient + row * cut.columns, cut.parts, part_floats);
    }
}

}  // namespace

void direct_forward(const ConvolutionForward& args, int threads) {
    run(args.shape, input_of(args), destination_of(args), args.weight, cheaper_relation(args.shape, true), true,
        output_of(args.statistics, args.activation), args.evaluates ? dense_numbers(args.shape, args.weight) : 0,
        threads, finish_of(args));
}

void direct_backward_input(const ConvolutionBackwardInput& args, int threads) {
    run(args.shape, grad_output_of(args), destination_of(args), args.weight, cheaper_relation(args.shape, false), false,
        output_of(args), 0, threads, finish_of(args));
}

void direct_backward_weight(const ConvolutionBackwardWeight& args, int threads) {
    const ConvolutionShape& s = args.shape;
    Relation relation = relation_of(s, false);
    if (s.rows.stride == 1 && s.columns.stride == 1) {
        const Relation mirrored = relation_of(s, true);
        if (gradient_cost(s, mirrored) < gradient_cost(s, relation)) relation = mirrored;
    }
#if defined(__AVX512F__)
    if (s.integers && has_bfloat16_products() && gradient_pays_in_pairs(s, relation))
        return weight_gradient<Elements::bfloat16_pairs>(args, relation, threads);
#endif
    weight_gradient<Elements::floats>(args, relation, threads);
}

}  // namespace ganvas::cpu::GANVAS_ISA
