// The gradient of a convolution's weight. With V the transformed tiles of the map that the kernel reads, and D = A dy
// Aᵀ those of the map that it makes, every frequency is a matrix product of its own,
//
//   dU[f][k][n] = Σ_tile V[f][tile][k]·D[f][tile][n],
//
// and dw = Gᵀ dU G. Included by kernel sources only.
#pragma once

#include <omp.h>

#include "winograd_weight.h"
#include "workspace.h"

namespace ganvas::cpu::GANVAS_ISA {

constexpr Index tile_slice = 64;       // terms of a sum that are added up in one chain
constexpr Index wave_bytes = 6 << 20;  // of both transformed factors
constexpr Index wave_tiles_least = 256;

struct WeightGradient {
    Source source;       // that the kernel reads
    Pixel origin;        // of it, at the first tap of the first output
    Source destination;  // the map that the kernel makes
    Taps taps;
    float* values;
    Dtype dtype;
};

template <int taps, int step>
void weight_gradient(const WeightGradient& args, Index images, int threads) {
    constexpr Index frequencies = points_of<taps> * points_of<taps>;
    const Tiles tiles(images, args.destination.height, args.destination.width);
    const Index depth = depth_of<step>(args.taps), columns = whole_vectors(args.taps.columns);
    const Index all = tiles.before(tiles.segments);
    const Index target = larger(wave_tiles_least, wave_bytes / (frequencies * 4 * (depth + columns)));
    // Waves of about the same length: segments of one.
    const Index waves = ceiling(all, target), wave = ceiling(tiles.segments, waves);
    Transformed v(frequencies, wave * tiles.segment_tiles, depth), d(frequencies, wave * tiles.segment_tiles, columns);
    // A piece of dU: channels of V's chunk by channels of D's, for every frequency. If there is but one wave and pieces
    // enough, a thread turns each into the weight's gradient as soon as it is made, and dU is never written.
    const Index u_frequency = v.width * d.width + stagger, pieces = v.chunks * d.chunks;
    const bool at_once = waves == 1 && pieces >= threads;
    const std::size_t u_bytes = static_cast<std::size_t>(frequencies * u_frequency) * sizeof(float);
    const std::size_t u_room = Workspace::padded(u_bytes) * static_cast<std::size_t>(at_once ? threads : pieces);
    Workspace workspace(Workspace::padded(v.bytes()) + Workspace::padded(d.bytes()) + u_room);
    v.values = static_cast<float*>(workspace.take(v.bytes()));
    d.values = static_cast<float*>(workspace.take(d.bytes()));
    char* const u = static_cast<char*>(workspace.take(u_room));
    const TransformSegment transform = transform_of<taps, step>(args.dtype, activation_of(args.source.pixels));
    const TransformOutputSegment transform_output =
        transform_output_of<taps>(args.dtype, activation_of(args.destination.pixels));

    const auto piece_of = [&](Index number) {
        return reinterpret_cast<float*>(u + Workspace::padded(u_bytes) * static_cast<std::size_t>(number));
    };
    const auto multiply = [&](Index piece, Index f, Index count, bool accumulate, float* to) {
        const Index k = piece / d.chunks * v.width, n = piece % d.chunks * d.width;
        const Index rows = smaller(v.width, depth - k), width = smaller(d.width, columns - n);
        const Product p{v.at(0, k) + f * v.frequency, 1,       v.width, d.at(0, n) + f * d.frequency, d.width,
                        to + f * u_frequency,         d.width, count};
        accumulate ? product<false, true>(p, rows, width, tile_slice)
                   : product<false, false>(p, rows, width, tile_slice);
    };
    const auto write = [&](Index piece, Index begin, Index end, const float* from) {
        const Index k = piece / d.chunks * v.width, n = piece % d.chunks * d.width;
        write_weight_gradient<taps, step>(args.taps, args.values, k + begin, smaller(k + end, depth), n,
                                          smaller(d.width, columns - n), from + begin * d.width, d.width, u_frequency);
    };

#pragma omp parallel num_threads(threads)
    {
        const Index thread = omp_get_thread_num();
        for (Index first = 0; first < tiles.segments; first += wave) {
            const Index last = smaller(tiles.segments, first + wave), origin = tiles.before(first);
            const Index count = tiles.before(last) - origin;
#pragma omp for schedule(static)
            for (Index s = first; s < last; ++s) {
                transform(args.source, args.origin, tiles.segment(s), v, tiles.before(s) - origin);
                transform_output(args.destination, tiles.segment(s), d, tiles.before(s) - origin);
            }
            if (at_once) {
#pragma omp for schedule(static)
                for (Index piece = 0; piece < pieces; ++piece) {
                    for (Index f = 0; f < frequencies; ++f) multiply(piece, f, count, false, piece_of(thread));
                    write(piece, 0, v.width, piece_of(thread));
                }
            } else {
#pragma omp for schedule(static)
                for (Index item = 0; item < pieces * frequencies; ++item)
                    multiply(item / frequencies, item % frequencies, count, first > 0, piece_of(item / frequencies));
            }
        }
        if (!at_once) {
#pragma omp for schedule(static)
            for (Index row = 0; row < pieces * v.width; row += lanes)
                write(row / v.width, row % v.width, row % v.width + lanes, piece_of(row / v.width));
        }
    }
}

}  // namespace ganvas::cpu::GANVAS_ISA
