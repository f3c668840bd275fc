// A convolution from pixels to pixels, whichever its direction. Of each tile and channel the input transform makes
// points² numbers, one per frequency; then every frequency is a matrix product of its own,
//
//   M[f][tile][n] = Σ_k V[f][tile][k]·U[f][k][n],
//
// and the output transform makes pixels of M. The pending activation is applied as the input is loaded, statistics are
// taken as the output is stored. Included by kernel sources only.
#pragma once

#include <omp.h>

#include "kept_weights.h"
#include "winograd_factors.h"
#include "winograd_output.h"
#include "workspace.h"

namespace ganvas::cpu::GANVAS_ISA {

constexpr Index channel_slice = 64;             // terms of a sum that are added up in one chain
constexpr Index block_columns = 64;             // output channels of a block
constexpr Index block_input_bytes = 384 << 10;  // of the transformed input of a block, or sixteenths of a core's cache
constexpr Index block_input_share = 9;
constexpr Index block_tiles_least[] = {16, 24};  // the second where what does not fit lies in a far cache
constexpr Index block_tiles_most = 48;
// Output channels: below, rounding the input costs more than it saves. The second for split vectors.
constexpr Index integer_columns_least[] = {32, 24};
constexpr Index own_weight_bytes = 640 << 10;  // of a transformed weight that each thread makes for itself: it costs
                                               // less than to fetch what another core has written
// Of a wave's products: the more, the less often the weight is transformed. More than this gains nothing.
constexpr Index wave_output_bytes = 1700 << 10;
template <int taps>
constexpr Index wave_tiles = wave_output_bytes / (points_of<taps> * points_of<taps> * tile_columns * 4);
// Of a transformed weight: from here on waves are faster for few tiles. These are so many, and half as many as there
// are output channels at most; where the shared cache is far, those of one wave, and the second number at most. They
// are also faster for any tiles where the weight takes half of the shared cache.
constexpr Index wave_weight_bytes = 8 << 20;
constexpr Index wave_tiles_most = 96, one_wave_tiles_most = 256;
constexpr Index kept_tiles_most = 256;  // in evaluation: of more, the transformed weight is made in no time

// What one output phase is made of: where the first tap of its first output reads, and the taps.
struct Phase {
    Pixel origin;
    Pixel pixel;  // of the destination
    const float* weight;
};

// How a convolution goes from one map to another, whichever of them is its input.
struct Walk {
    Taps taps;
    Index phase_count;
    Phase phases[4];  // of the destination

    Index step() const { return phase_count == 1 ? 1 : 2; }
};

struct Pass {
    Source source;
    Destination destination;
    Walk walk;
    Index groups;
    Dtype dtype;
    bool integers;  // products may be of them
    Output kind;
    ConvolutionWeight weight{};  // of `weight_numbers` numbers, of which
    Index weight_numbers = 0;    // the form may be kept

    // The transformed weight, if it is kept: of few tiles, of which to transform it takes its share.
    KeptWeight kept(Index taps, bool of_integers, Index tiles, std::size_t bytes, int threads) const {
        const Index numbers = tiles <= kept_tiles_most ? weight_numbers : 0;
        WeightForm form{{winograd_form, taps, walk.step(), of_integers, walk.taps.channels, walk.taps.columns,
                         weight.in, weight.out, weight.row, weight.column, walk.phase_count}};
        for (Index phase = 0; numbers > 0 && phase < walk.phase_count; ++phase)
            form.values[11 + phase] = walk.phases[phase].weight - weight.values;
        return {weight.values, numbers, form, bytes, threads};
    }
};

// The sums that write_block keeps of each part: one output phase of one block.
struct Parts {
    const Pass& pass;
    const Tiles& tiles;
    const Blocks& blocks;
    double* sums;  // [G, per_group, 2, channels]

    static std::size_t bytes(const Pass& pass, const Blocks& blocks) {
        return static_cast<std::size_t>(blocks.count * pass.walk.phase_count * 2 * pass.destination.channels) *
               sizeof(double);
    }
    Index channels() const { return pass.destination.channels; }
    Index groups() const { return pass.groups; }
    Index per_group() const { return blocks.per_group * pass.walk.phase_count; }
    double* of(Index block, Index phase) const {
        return sums + (block * pass.walk.phase_count + phase) * 2 * pass.destination.channels;
    }
    double* of_group(Index group) const { return of(group * blocks.per_group, 0); }
    double pixels(Index part) const {
        const Index block = part / pass.walk.phase_count;
        const Map map = phase_map(pass.destination, pass.walk.phases[part % pass.walk.phase_count].pixel);
        Index result = 0;
        for (Index s = blocks.first(block); s < blocks.last(block); ++s) {
            const Segment segment = tiles.segment(s);
            const Index columns = smaller(segment.tiles * tile, larger(0, map.width - segment.column * tile));
            result += inside(map.height, segment.row) * columns;
        }
        return static_cast<double>(result);
    }
};

// M[f] = V[f]·U[f], or M[f] += if k > 0, for tiles `rows`, `depth` words of each from k on, and `width` columns.
// `later` is fetched meanwhile.
template <int taps, int step, bool integers>
inline void multiply(const Left<taps, step, integers>& v, const Transformed& m, Index f, Span rows, Index k,
                     Index depth, const float* u, const Stretches& later, const float* scales, Index width,
                     Index column) {
    const Index count = rows.last - rows.first;
    const Product p{v.words.at(rows.first, k) + f * v.words.frequency,
                    v.words.width,
                    1,
                    u,
                    width,
                    m.at(rows.first, column) + f * m.frequency,
                    m.width,
                    depth,
                    v.scales + rows.first * v.scale_stride + f,
                    scales,
                    v.scale_stride,
                    later};
    constexpr Index slice = integers ? integer_slice : channel_slice;
    k > 0 ? product<elements_of<integers>, true>(p, count, width, slice)
          : product<elements_of<integers>, false>(p, count, width, slice);
}

// Each thread takes a block of tiles through transform, products and inverse transform while it lies in its cache. The
// transformed weight is made first; a large one is shared.
template <int taps, int step, bool integers, class Finish>
void run_blocks(const Pass& pass, const Tiles& tiles, const Blocks& blocks, int threads, Finish finish) {
    constexpr Index frequencies = points_of<taps> * points_of<taps>;
    const Destination& to = pass.destination;
    const Index depth = depth_of<step>(pass.walk.taps), columns = whole_vectors(to.channels);
    // Parts of the output's channels, where blocks are too few to go round.
    const Index panels = ceiling(columns, tile_columns), phased_blocks = blocks.count * pass.walk.phase_count;
    const Index splits = smaller(panels, ceiling(2 * threads, phased_blocks));
    const Index split_columns = ceiling(panels, splits) * tile_columns;

    Left<taps, step, integers> v(blocks.room, depth, pass.dtype, activation_of(pass.source.pixels));
    Transformed m(frequencies, blocks.room, smaller(block_columns, split_columns));
    Right<taps, step, integers> u(pass.walk.taps, columns, pass.walk.phase_count);
    const std::size_t sum_bytes = Parts::bytes(pass, blocks);
    const std::size_t u_bytes = u.bytes() + u.scale_bytes();
    KeptWeight kept = pass.kept(taps, integers, tiles.count, u_bytes, threads);
    const bool shares_weight = kept.memory() || u_bytes > own_weight_bytes;
    const bool fetches = shared_cache_is_far();
    const std::size_t room = v.bytes() + v.scratch_bytes() + Workspace::padded(m.bytes());
    Workspace workspace((shares_weight && !kept.memory() ? u_bytes : 0) + Workspace::padded(sum_bytes));
    const ThreadWorkspaces scratch(room + (shares_weight ? 0 : u_bytes), threads);
    if (shares_weight) u.place(static_cast<char*>(kept.memory() ? kept.memory() : workspace.take(u_bytes)));
    const Parts parts{pass, tiles, blocks, static_cast<double*>(workspace.take(sum_bytes))};
    Shares shares(phased_blocks * splits, threads);
    const WriteBlock write = write_of<taps>(pass.dtype, pass.kind);

#pragma omp parallel num_threads(threads) firstprivate(v, m, u)
    {
        const Index thread = omp_get_thread_num(), team = omp_get_num_threads();
        char* const own = scratch.of(thread);
        v.place(own, own + v.bytes());
        m.values = reinterpret_cast<float*>(own + v.bytes() + v.scratch_bytes());
        const Index pieces = ceiling(u.words, lanes);
        const auto measure = [&](Index item) {
            u.measure(item / panels, pass.walk.phases[item / panels].weight, item % panels * tile_columns);
        };
        const auto fill = [&](Index item) {
            const Index phase = item / (pieces * panels), panel = item / pieces % panels * tile_columns;
            const Index k = item % pieces * lanes;
            u.fill(phase, pass.walk.phases[phase].weight, panel, k, smaller(u.words, k + lanes),
                   u.at(phase, 0, panel, k), u.frequency);
        };
        const Index scale_items = integers ? pass.walk.phase_count * panels : 0;
        const Index weight_items = pass.walk.phase_count * panels * pieces;
        if (kept.is_made()) {
            // There is nothing to do.
        } else if (shares_weight) {
#pragma omp for schedule(static)
            for (Index item = 0; item < scale_items; ++item) measure(item);
#pragma omp for schedule(static)
            for (Index item = 0; item < weight_items; ++item) fill(item);
        } else {
            u.place(own + room);
            for (Index item = 0; item < scale_items; ++item) measure(item);
            for (Index item = 0; item < weight_items; ++item) fill(item);
        }
        for (Index item; (item = shares.take(thread)) >= 0;) {
            const Index split = item % splits, part = item / splits;
            const Index block = part / pass.walk.phase_count, number = part % pass.walk.phase_count;
            const Phase& phase = pass.walk.phases[number];
            const Index first = blocks.first(block), last = blocks.last(block);
            const Order order(tiles, first, last);
            for (Index s = first; s < last; ++s) v.take(pass.source, phase.origin, tiles.segment(s), order.of(s));
            const Index split_end = smaller(columns, (split + 1) * split_columns);
            for (Index from = split * split_columns; from < split_end; from += m.width) {
                const Index until = smaller(split_end, from + m.width);
                for (Index f = 0; f < frequencies; ++f) {
                    const Span rows = needing<taps>(order, f);
                    for (Index panel = from; panel < until; panel += tile_columns)
                        for (Index k = 0; k < u.words; k += v.words.width) {
                            const Index words = smaller(v.words.width, u.words - k);
                            Stretches later{};
                            if (fetches && f + 1 < frequencies)
                                later = {Stretch{u.at(number, f + 1, panel, k), words * u.width(panel) / cache_line},
                                         stretch_of(v.words, f + 1, needing<taps>(order, f + 1), k)};
                            multiply(v, m, f, rows, k, words, u.at(number, f, panel, k), later,
                                     u.scales_at(number, f, panel), u.width(panel), panel - from);
                        }
                }
                write(to, phase.pixel, order, first, last, from, smaller(until, to.channels), m,
                      parts.of(block, number));
            }
        }
#pragma omp barrier
        finish_slice(to, parts, finish, thread, team);
    }
    kept.keep();
}

// Few tiles and many channels: the weight is larger than everything else. All threads transform the tiles of some
// blocks; then each takes columns of the weight, transforms them piece by piece, and uses each piece for all the tiles
// while it lies in the cache.
template <int taps, int step, bool integers, class Finish>
void run_waves(const Pass& pass, const Tiles& tiles, const Blocks& blocks, int threads, Finish finish) {
    constexpr Index frequencies = points_of<taps> * points_of<taps>;
    const Destination& to = pass.destination;
    const Index depth = depth_of<step>(pass.walk.taps), columns = whole_vectors(to.channels);
    const Index waves = ceiling(blocks.count, larger(1, wave_tiles<taps> / blocks.room));
    const Index wave = ceiling(blocks.count, waves), room = wave * blocks.room;

    Left<taps, step, integers> v(room, depth, pass.dtype, activation_of(pass.source.pixels));
    Transformed m(frequencies, room, tile_columns);
    Right<taps, step, integers> u(pass.walk.taps, columns,
                                  pass.walk.phase_count);  // of which only a piece is in memory
    const Index u_frequency = v.words.width * tile_columns + stagger;
    const std::size_t u_bytes = static_cast<std::size_t>(frequencies * u_frequency) * sizeof(float);
    const std::size_t v_bytes = v.bytes() * static_cast<std::size_t>(pass.walk.phase_count);
    const std::size_t sum_bytes = Parts::bytes(pass, blocks);
    const std::size_t own_bytes = v.scratch_bytes() + Workspace::padded(m.bytes()) + Workspace::padded(u_bytes);
    Workspace workspace(v_bytes + u.scale_bytes() + Workspace::padded(sum_bytes));
    const ThreadWorkspaces scratch(own_bytes, threads);
    char* const inputs = static_cast<char*>(workspace.take(v_bytes));
    u.scales = static_cast<float*>(workspace.take(u.scale_bytes()));
    const Parts parts{pass, tiles, blocks, static_cast<double*>(workspace.take(sum_bytes))};
    const WriteBlock write = write_of<taps>(pass.dtype, pass.kind);
    const Index panels = ceiling(columns, tile_columns);

#pragma omp parallel num_threads(threads) firstprivate(m)
    {
        const Index thread = omp_get_thread_num(), team = omp_get_num_threads();
        char* const own = scratch.of(thread);
        m.values = reinterpret_cast<float*>(own + v.scratch_bytes());
        float* const piece = reinterpret_cast<float*>(own + v.scratch_bytes() + Workspace::padded(m.bytes()));
        const auto input_of = [&](Index phase) {
            Left<taps, step, integers> result = v;
            result.place(inputs + static_cast<std::size_t>(phase) * v.bytes(), own);
            return result;
        };
        if constexpr (integers) {
#pragma omp for schedule(static)
            for (Index item = 0; item < pass.walk.phase_count * panels; ++item)
                u.measure(item / panels, pass.walk.phases[item / panels].weight, item % panels * tile_columns);
        }
        for (Index block = 0; block < blocks.count; block += wave) {
            const Index block_end = smaller(blocks.count, block + wave);
            const Index first = blocks.first(block), last = blocks.last(block_end - 1);
            const Order order(tiles, first, last);
#pragma omp for schedule(static)
            for (Index item = 0; item < (last - first) * pass.walk.phase_count; ++item) {
                const Index s = first + item / pass.walk.phase_count, phase = item % pass.walk.phase_count;
                input_of(phase).take(pass.source, pass.walk.phases[phase].origin, tiles.segment(s), order.of(s));
            }
#pragma omp for schedule(dynamic, 1)
            for (Index item = 0; item < pass.walk.phase_count * panels; ++item) {
                const Index number = item / panels, panel = item % panels * tile_columns;
                const Phase& phase = pass.walk.phases[number];
                const Left<taps, step, integers> left = input_of(number);
                for (Index k = 0; k < u.words; k += left.words.width) {
                    const Index end = smaller(u.words, k + left.words.width);
                    u.fill(number, phase.weight, panel, k, end, piece, u_frequency);
                    for (Index f = 0; f < frequencies; ++f) {
                        const Span rows = needing<taps>(order, f);
                        const Span later{smaller(rows.last, rows.first + tile_rows<tile_vectors>), rows.last};
                        multiply(left, m, f, rows, k, end - k, piece + f * u_frequency,
                                 {stretch_of(left.words, f, later, k)}, u.scales_at(number, f, panel), u.width(panel),
                                 0);
                    }
                }
                for (Index b = block; b < block_end; ++b)
                    write(to, phase.pixel, order, blocks.first(b), blocks.last(b), panel,
                          smaller(panel + u.width(panel), to.channels), m, parts.of(b, number));
            }
        }
        finish_slice(to, parts, finish, thread, team);
    }
}

template <int taps, int step, bool integers, class Finish>
void run(const Pass& pass, Index images, int threads, Finish finish) {
    constexpr Index frequencies = points_of<taps> * points_of<taps>;
    const Destination& to = pass.destination;
    const Tiles tiles(images, ceiling(to.height, to.step), ceiling(to.width, to.step), points_of<taps>);
    const Index depth = depth_of<step>(pass.walk.taps), columns = whole_vectors(to.channels);
    const Index weight_bytes = frequencies * depth * columns * 4 * pass.walk.phase_count;
    const bool far = shared_cache_is_far();
    const Index panels = ceiling(columns, tile_columns) * pass.walk.phase_count;
    const Index few_tiles = far && panels >= 2 * threads ? smaller(one_wave_tiles_most, wave_tiles<taps>)
                                                         : smaller(wave_tiles_most, columns / 2);
    if (2 * weight_bytes >= cache_bytes() || (weight_bytes >= wave_weight_bytes && tiles.count <= few_tiles))
        return run_waves<taps, step, integers>(pass, tiles, Blocks(tiles, pass.groups, block_tiles_most), threads,
                                               finish);
    // Small maps: enough blocks that each thread gets some, before the tiles become too few for the products.
    const Index input_bytes = larger(block_input_bytes, core_cache_bytes() / 16 * block_input_share);
    const Index least = block_tiles_least[far];
    const Index cached = clamped(input_bytes / (frequencies * 4 * depth), least, block_tiles_most);
    const Index target =
        larger(block_tiles_least[0], smaller(cached, ceiling(tiles.count * pass.walk.phase_count, 2 * threads)));
    run_blocks<taps, step, integers>(pass, tiles, Blocks(tiles, pass.groups, target), threads, finish);
}

// Runs a pass of `images`, then calls finish(parts, group, begin, end) for slices of the channels.
template <int taps, int step, class Finish>
void run(const Pass& pass, Index images, int threads, Finish finish) {
    if constexpr (lanes == 16)
        if (pass.integers && pass.destination.channels >= integer_columns_least[splits_wide_vectors()] &&
            has_int16_products())
            return run<taps, step, true>(pass, images, threads, finish);
    run<taps, step, false>(pass, images, threads, finish);
}

template <int taps, int step>
void forward(const ConvolutionForward& args, const Walk& walk, int threads) {
    const ConvolutionShape& s = args.shape;
    Pass pass{input_of(args), destination_of(args, walk.step()),          walk, s.groups, s.dtype,
              s.integers,     output_of(args.statistics, args.activation)};
    if (args.evaluates) pass.weight = args.weight, pass.weight_numbers = dense_numbers(s, args.weight);
    run<taps, step>(pass, s.batch, threads, finish_of(args));
}

template <int taps, int step>
void backward_input(const ConvolutionBackwardInput& args, const Walk& walk, int threads) {
    const ConvolutionShape& s = args.shape;
    const Pass pass{grad_output_of(args), destination_of(args, walk.step()), walk, s.groups, s.dtype, s.integers,
                    output_of(args)};
    run<taps, step>(pass, s.batch, threads, finish_of(args));
}

}  // namespace ganvas::cpu::GANVAS_ISA
