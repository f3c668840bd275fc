// The gradient of a convolution's weight. With V the transformed tiles of the map that the kernel reads, and D = A dy
// Aᵀ those of the map that it makes, every frequency is a matrix product of its own,
//
//   dU[f][k][n] = Σ_tile V[f][tile][k]·D[f][tile][n],
//
// and dw = Gᵀ dU G. Included by kernel sources only.
#pragma once

#include <omp.h>

#include <vector>

#include "winograd_factors.h"

namespace ganvas::cpu::GANVAS_ISA {

constexpr Index tile_slice = 64;  // terms of a sum that are added up in one chain
// Of both transformed factors of a wave: of all threads together, or of one that takes tiles of its own. Those share
// nothing until their sums are joined, which is worth it while the sums are not too large, and the tiles not too few.
constexpr Index wave_bytes[] = {6 << 20, 18 << 20};  // the second where the shared cache is far
constexpr Index own_wave_bytes = 384 << 10;
constexpr Index wave_tiles_least = 64, thread_tiles_least = 16;  // the second for each of the threads that share one
constexpr Index single_wave_tiles = 256;  // no more than so many are one wave: the sums of one may never be written
constexpr Index own_gradient_bytes = 4 << 20, own_tiles_least = 128;
// Channels of each factor, their harmonic mean: below, rounding costs more than it saves. The second for split vectors.
constexpr Index integer_channels_least[] = {48, 24};
// Tiles whose integers have a scale in common, and the largest of those: no sum overflows.
constexpr Index run_tiles = 64;
constexpr float v_limit = 8191.0f, d_limit = 4095.0f;
static_assert(run_tiles * static_cast<std::int64_t>(v_limit) * static_cast<std::int64_t>(d_limit) < std::int64_t{1}
                                                                                                        << 31);

struct WeightGradient {
    Source source;       // that the kernel reads
    Pixel origin;        // of it, at the first tap of the first output
    Source destination;  // the map that the kernel makes
    Taps taps;
    float* values;
    Dtype dtype;
    bool integers;  // products may be of them
};

// Makes integers of `width` numbers of the tiles that need each frequency, in words of tiles t and t + 1; after the
// last of an odd number of tiles comes a zero. A number's largest magnitude among the tiles becomes `most`;
// scales[f*stride + number] is what one stands for.
template <int taps>
void round_tiles(const Transformed& from, const Order& order, Index width, float most, const Transformed& to, Index row,
                 Index number, float* scales, Index stride) {
    for (Index f = 0; f < points_of<taps> * points_of<taps>; ++f) {
        const Span rows = needing<taps>(order, f);
        const Index count = rows.last - rows.first;
        for (Index i = 0; i < width; i += lanes) {
            const float* values = from.at(rows.first, i) + f * from.frequency;
            VectorBits largest{};
            for (Index t = 0; t < count; ++t)
                largest = larger_lanes(largest, magnitude(load_vector(values + t * from.width)));
            const Vector scale = scale_of(largest, most), factor = 1.0f / scale;
            store_vector(scales + f * stride + i, scale);
            float* words = to.at(row, number + i) + f * to.frequency;
            for (Index t = 0; t < count; t += 2, words += to.width) {
                VectorBits word = nearest(load_vector(values + t * from.width) * factor) & 0xFFFFu;
                if (t + 1 < count) word |= nearest(load_vector(values + (t + 1) * from.width) * factor) << 16;
                std::memcpy(words, &word, sizeof word);
            }
        }
    }
}

// One factor of the products in a wave: floats, a row for each tile; or integers, a row for two tiles of a run.
template <bool integers>
struct Factor {
    Index frequencies, depth;
    Index run_rows;
    float limit;
    Transformed words;
    Transformed part;         // of integers: a vector of channels of a run, before they are rounded
    float* scales = nullptr;  // of integers: what one stands for, [run][f][number]
    std::size_t scale_count;

    Factor(Index frequencies, Index runs, Index room, Index depth, Index phases, float limit)
        : frequencies(frequencies),
          depth(depth),
          run_rows(integers ? ceiling(room, 2) : room),
          limit(limit),
          words(frequencies, runs * run_rows, depth),
          part(frequencies, room, lanes * phases),
          scale_count(static_cast<std::size_t>(integers ? runs * frequencies * whole_vectors(depth) : 0)) {}

    std::size_t bytes() const {
        return Workspace::padded(words.bytes()) + Workspace::padded(scale_count * sizeof(float));
    }
    void place(char* at) {
        words.values = reinterpret_cast<float*>(at);
        scales = reinterpret_cast<float*>(at + Workspace::padded(words.bytes()));
    }
    float* scales_of(Index run, Index f) const { return scales + (run * frequencies + f) * whole_vectors(depth); }
};

// The tiles that are transformed before they are multiplied: runs [first, last).
template <bool integers>
struct Wave {
    Factor<integers> v, d;
    Index first, last;
    // Of tiles that are multiplied together: a run's as integers, the wave's as floats.
    std::vector<Order> orders;

    void begin(const Tiles& tiles, const Blocks& runs, Index from, Index until) {
        first = from, last = until;
        orders.clear();
        for (Index run = first; run < last; run += together())
            orders.emplace_back(tiles, runs.first(run), runs.last(run + together() - 1));
    }
    Index together() const { return integers ? 1 : last - first; }
    const Order& order_of(Index run) const { return orders[static_cast<std::size_t>((run - first) / together())]; }
};

template <int taps, int step, bool integers>
void weight_gradient(const WeightGradient& args, Index images, int threads) {
    constexpr Index frequencies = points_of<taps> * points_of<taps>;
    const Tiles tiles(images, args.destination.height, args.destination.width, points_of<taps>);
    const Index depth = depth_of<step>(args.taps), columns = whole_vectors(args.taps.columns);
    const Blocks runs(tiles, 1, integers ? smaller(run_tiles, ceiling(tiles.count, threads)) : 1);
    const Index tile_bytes = frequencies * (integers ? 2 : 4) * (depth + columns);
    const bool apart =
        frequencies * depth * columns * 4 <= own_gradient_bytes && tiles.count >= threads * own_tiles_least;
    const Index parties = apart ? smaller(threads, runs.count) : 1;
    const bool far = shared_cache_is_far();
    const Index most_bytes = apart ? own_wave_bytes : wave_bytes[far];
    // Whole slices of a sum: each of its parts is stored and read again.
    Index target = larger(wave_tiles_least, most_bytes / tile_bytes / tile_slice * tile_slice);
    if (!apart) {
        const Index least = tiles.count <= single_wave_tiles ? single_wave_tiles : threads * thread_tiles_least;
        target = larger(target, smaller(least, single_wave_tiles));
    }
    // Waves of about the same length: runs of one.
    const Index waves = ceiling(ceiling(tiles.count, parties), target);
    const Index wave = ceiling(ceiling(runs.count, parties), waves);
    Factor<integers> v(frequencies, wave, runs.room, depth, step * step, v_limit);
    Factor<integers> d(frequencies, wave, runs.room, columns, 1, d_limit);
    // A piece of dU: channels of V's chunk by channels of D's, for every frequency. If there is but one wave and pieces
    // enough, a thread turns each into the weight's gradient as soon as it is made, and dU is never written.
    const Index u_frequency = v.words.width * d.words.width + stagger, pieces = v.words.chunks * d.words.chunks;
    const bool at_once = !apart && waves == 1 && pieces >= threads;
    const std::size_t u_bytes = Workspace::padded(static_cast<std::size_t>(frequencies * u_frequency) * sizeof(float));
    const std::size_t u_room = u_bytes * static_cast<std::size_t>(at_once ? 1 : pieces);
    const std::size_t factor_bytes = v.bytes() + d.bytes();
    const std::size_t part_bytes = integers ? Workspace::padded(v.part.bytes()) : 0;
    // What a party has, and what a thread has of its own: the same where parties are threads.
    Workspace workspace((apart ? 0 : factor_bytes) + (apart || at_once ? 0 : u_room));
    const ThreadWorkspaces scratch(part_bytes + (apart ? factor_bytes : 0) + (apart || at_once ? u_room : 0), threads);
    char* const shared_factors = apart ? nullptr : static_cast<char*>(workspace.take(factor_bytes));
    char* const shared_u = apart || at_once ? nullptr : static_cast<char*>(workspace.take(u_room));
    const TransformSegment transform =
        transform_of<InputSide<taps>, step>(args.dtype, activation_of(args.source.pixels));
    const TransformSegment transform_output =
        transform_of<OutputSide<taps>, 1>(args.dtype, activation_of(args.destination.pixels));

    const auto factors_of = [&](Index party) { return apart ? scratch.of(party) + part_bytes : shared_factors; };
    const auto piece_of = [&](Index owner, Index piece) {
        char* const u = shared_u ? shared_u : scratch.of(owner) + part_bytes + (apart ? factor_bytes : 0);
        return reinterpret_cast<float*>(u + u_bytes * static_cast<std::size_t>(piece));
    };
    // Takes a run of the wave through transform_run(segment, to, tile, begin, end).
    const auto take = [&](const Wave<integers>& of, const Factor<integers>& factor, Index run, Index channels,
                          Index phases, auto transform_run) {
        const Index from = runs.first(run), until = runs.last(run);
        const Order& order = of.order_of(run);
        if constexpr (integers) {
            Transformed part = factor.part;
            part.values = reinterpret_cast<float*>(scratch.of(omp_get_thread_num()));
            for (Index c = 0; c < channels; c += lanes) {
                const Index end = smaller(channels, c + lanes);
                for (Index s = from; s < until; ++s) transform_run(tiles.segment(s), part, order.of(s), c, end);
                round_tiles<taps>(part, order, whole_vectors(end - c) * phases, factor.limit, factor.words,
                                  (run - of.first) * factor.run_rows, c * phases,
                                  factor.scales_of(run - of.first, 0) + c * phases, whole_vectors(factor.depth));
            }
        } else {
            for (Index s = from; s < until; ++s)
                transform_run(tiles.segment(s), factor.words, order.of(s), 0, channels);
        }
    };
    const auto multiply = [&](const Wave<integers>& of, Index piece, Index f, bool accumulate, float* to) {
        const Factor<integers>&v = of.v, &d = of.d;
        const Index k = piece / d.words.chunks * v.words.width, n = piece % d.words.chunks * d.words.width;
        const Index rows = smaller(v.words.width, depth - k), width = smaller(d.words.width, columns - n);
        Product p{v.words.at(0, k) + f * v.words.frequency,
                  1,
                  v.words.width,
                  d.words.at(0, n) + f * d.words.frequency,
                  d.words.width,
                  to + f * u_frequency,
                  d.words.width,
                  0};
        // Rows that come next.
        const auto expect = [&](Product& part, Index frequency, Index v_row, Index d_row, Index count) {
            if (far)
                part.later = {stretch_of(v.words, frequency, {v_row, v_row + count}, k),
                              stretch_of(d.words, frequency, {d_row, d_row + count}, n)};
        };
        if constexpr (integers) {
            p.row_scale_stride = 1;
            for (Index run = of.first; run < of.last; ++run) {
                const Span terms = needing<taps>(of.order_of(run), f);
                p.depth = ceiling(terms.last - terms.first, 2);
                p.row_scale = v.scales_of(run - of.first, f) + k;
                p.column_scale = d.scales_of(run - of.first, f) + n;
                const Index next = run + 1 < of.last ? run + 1 - of.first : 0;
                expect(p, next > 0 ? f : f + 1, next * v.run_rows, next * d.run_rows, p.depth);
                accumulate || run > of.first ? product_slice<Elements::int16_pairs, true>(p, rows, width)
                                             : product_slice<Elements::int16_pairs, false>(p, rows, width);
                p.a += v.run_rows * v.words.width;
                p.b += d.run_rows * d.words.width;
            }
        } else {
            const Span terms = needing<taps>(of.order_of(of.first), f);
            p.a += terms.first * v.words.width;
            p.b += terms.first * d.words.width;
            p.depth = terms.last - terms.first;
            const auto before = [&](Product& slice, Index t) {
                const Index next = t + slice.depth < p.depth ? t + slice.depth : 0, row = terms.first + next;
                expect(slice, next > 0 ? f : f + 1, row, row, smaller(tile_slice, p.depth - next));
            };
            accumulate ? product<Elements::floats, true>(p, rows, width, tile_slice, before)
                       : product<Elements::floats, false>(p, rows, width, tile_slice, before);
        }
    };
    // Adds up what the parties have of some rows of a piece.
    const auto join = [&](Index piece, Index row) {
        const Index begin = row * d.words.width, end = begin + lanes * d.words.width;
        for (Index party = 1; party < parties; ++party)
            for (Index f = 0; f < frequencies; ++f) {
                float* const sums = piece_of(0, piece) + f * u_frequency;
                const float* const others = piece_of(party, piece) + f * u_frequency;
                for (Index i = begin; i < end; i += lanes)
                    store_vector(sums + i, load_vector(sums + i) + load_vector(others + i));
            }
    };
    const auto write = [&](Index piece, Index begin, Index end, const float* from) {
        const Index k = piece / d.words.chunks * v.words.width, n = piece % d.words.chunks * d.words.width;
        write_weight_gradient<taps, step>(args.taps, args.values, k + begin, smaller(k + end, depth), n,
                                          smaller(d.words.width, columns - n), from + begin * d.words.width,
                                          d.words.width, u_frequency);
    };

#pragma omp parallel num_threads(threads)
    {
        const Index thread = omp_get_thread_num(), team = omp_get_num_threads();
        Wave<integers> of{v, d, 0, 0, {}};
        // Calls of the numbers in [begin, end) by the threads of a party.
        const auto for_each = [&](Index begin, Index end, auto call) {
            if (apart) {
                for (Index i = begin; i < end; ++i) call(i);
            } else {
#pragma omp for schedule(static)
                for (Index i = begin; i < end; ++i) call(i);
            }
        };
        for (Index party = apart ? thread : 0; party < parties; party += apart ? team : 1) {
            of.v.place(factors_of(party));
            of.d.place(factors_of(party) + v.bytes());
            const Index begin = runs.count * party / parties, end = runs.count * (party + 1) / parties;
            for (Index first = begin; first < end; first += wave) {
                of.begin(tiles, runs, first, smaller(end, first + wave));
                for_each(of.first, of.last, [&](Index run) {
                    take(of, of.v, run, args.source.channels, step * step,
                         [&](const Segment& s, const Transformed& to, Index tile, Index from, Index until) {
                             transform(args.source, args.origin, s, to, tile, from, until);
                         });
                    take(of, of.d, run, args.destination.channels, 1,
                         [&](const Segment& s, const Transformed& to, Index tile, Index from, Index until) {
                             transform_output(args.destination, {0, 0}, s, to, tile, from, until);
                         });
                });
                if (at_once) {
                    for_each(0, pieces, [&](Index piece) {
                        for (Index f = 0; f < frequencies; ++f) multiply(of, piece, f, false, piece_of(thread, 0));
                        write(piece, 0, v.words.width, piece_of(thread, 0));
                    });
                } else {
                    for_each(0, pieces * frequencies, [&](Index item) {
                        const Index piece = item / frequencies;
                        multiply(of, piece, item % frequencies, first > begin, piece_of(party, piece));
                    });
                }
            }
        }
        if (!at_once) {
#pragma omp barrier
#pragma omp for schedule(static)
            for (Index row = 0; row < pieces * v.words.width; row += lanes) {
                const Index piece = row / v.words.width, from = row % v.words.width;
                join(piece, from);
                write(piece, from, from + lanes, piece_of(0, piece));
            }
        }
    }
}

template <int taps, int step>
void weight_gradient(const WeightGradient& args, Index images, int threads) {
    if constexpr (lanes == 16) {
        const Index depth = depth_of<step>(args.taps), columns = args.taps.columns;
        const bool many = 2 * depth * columns >= integer_channels_least[splits_wide_vectors()] * (depth + columns);
        if (args.integers && many && has_int16_products())
            return weight_gradient<taps, step, true>(args, images, threads);
    }
    weight_gradient<taps, step, false>(args, images, threads);
}

}  // namespace ganvas::cpu::GANVAS_ISA
