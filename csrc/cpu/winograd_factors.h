// The factors of the products, as floats or as 16-bit integers with scales. Of integers on the left each row, a tile,
// has a scale of its own in every frequency, on the right each column; the largest value becomes the largest integer,
// so that rounding is relative to a tile's or a column's own size. They take half the time where the processor adds up
// products of pairs in one instruction, and serve tensors whose own rounding is coarser. Included by kernel sources
// only.
#pragma once

#include "winograd_weight.h"
#include "workspace.h"

namespace ganvas::cpu::GANVAS_ISA {

// integer_slice·2·left_limit·right_limit < 2³¹: no sum overflows, whatever the factors.
constexpr float left_limit = 8191.0f, right_limit = 4095.0f;
constexpr Index integer_slice = 32;      // words, terms of a sum that are added up as integers
constexpr float least_largest = 1e-33f;  // so that no scale's reciprocal overflows

// The nearest integers, in the lower halves. |x| < 2²².
inline VectorBits nearest(Vector x) {
    const Vector shifted = x + 12582912.0f;  // 3·2²²: a unit in the last place is 1
    VectorBits bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return bits;
}

// |x| as bits, whose order is that of the numbers, with NaN above all.
inline VectorBits magnitude(Vector x) {
    VectorBits bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x7FFFFFFFu;
}

inline VectorBits larger_lanes(VectorBits a, VectorBits b) {
    return a > b ? a : b;
}

// The largest lane of each vector, as lanes of one.
inline VectorBits largest_lanes(VectorBits (&of)[lanes]) {
    Vector rows[lanes];
    std::memcpy(rows, of, sizeof rows);
    transpose(rows);
    std::memcpy(of, rows, sizeof rows);
#pragma GCC unroll 4
    for (int half = lanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) of[i] = larger_lanes(of[i], of[i + half]);
    return of[0];
}

// What an integer stands for, so that `most` of them make the largest magnitude. A NaN stays one.
inline Vector scale_of(VectorBits magnitudes, float most) {
    Vector largest;
    std::memcpy(&largest, &magnitudes, sizeof largest);
    return (largest < least_largest ? broadcast(least_largest) : largest) / most;
}

// The left factors of some tiles.
template <bool integers>
struct Left {
    static constexpr Index numbers = integers ? 2 : 1;  // in a word
    Index frequencies, depth, tiles;
    Transformed words;
    Transformed segment;      // of integers: the floats of one segment
    float* scales = nullptr;  // of integers: what one stands for, [tile][f]
    Index scale_stride;

    Left(Index frequencies, Index tiles, Index depth)
        : frequencies(frequencies),
          depth(depth),
          tiles(tiles),
          words(frequencies, tiles, depth, numbers),
          segment(frequencies, segment_limit, depth),
          scale_stride(whole_vectors(frequencies)) {}

    std::size_t bytes() const {
        const Index scale_count = integers ? tiles * scale_stride : 0;
        return Workspace::padded(words.bytes()) +
               Workspace::padded(static_cast<std::size_t>(scale_count) * sizeof(float));
    }
    std::size_t segment_bytes() const { return integers ? Workspace::padded(segment.bytes()) : 0; }
    void place(char* at, char* at_segment) {
        words.values = reinterpret_cast<float*>(at);
        scales = reinterpret_cast<float*>(at + Workspace::padded(words.bytes()));
        segment.values = reinterpret_cast<float*>(at_segment);
    }

    void take(TransformSegment transform, const Source& source, Pixel origin, const Segment& s, Index first) const {
        transform(source, origin, s, integers ? segment : words, integers ? 0 : first, 0, source.channels);
        if (integers)
            for (Index t = 0; t < s.tiles; ++t)
                for (Index f = 0; f < frequencies; f += lanes) round(t, f, first + t);
    }

  private:
    // A vector of frequencies, from `first` on, of tile `from`.
    void round(Index from, Index first, Index to) const {
        const Index count = smaller(lanes, frequencies - first), width = whole_vectors(depth);
        VectorBits magnitudes[lanes] = {};
        for (Index k = 0; k < width; k += chunk_width) {
            const float* numbers_of = segment.at(from, k) + first * segment.frequency;
            for (Index f = 0; f < count; ++f, numbers_of += segment.frequency)
                for (Index i = 0; i < smaller(chunk_width, width - k); i += lanes)
                    magnitudes[f] = larger_lanes(magnitudes[f], magnitude(load_vector(numbers_of + i)));
        }
        const Vector scale = scale_of(largest_lanes(magnitudes), left_limit), factors = 1.0f / scale;
        store_vector(scales + to * scale_stride + first, scale);
        for (Index k = 0; k < width; k += chunk_width) {
            const float* numbers_of = segment.at(from, k) + first * segment.frequency;
            float* destination = words.at(to, k / 2) + first * words.frequency;
            for (Index f = 0; f < count; ++f, numbers_of += segment.frequency, destination += words.frequency) {
                const Vector factor = broadcast(factors[f]);
                for (Index i = 0; i < smaller(chunk_width, width - k); i += lanes) {
                    const VectorBits bits = nearest(load_vector(numbers_of + i) * factor);
                    const VectorHalves halves = __builtin_convertvector(bits, VectorHalves);
                    std::memcpy(destination + i / 2, &halves, sizeof halves);
                }
            }
        }
    }
};

// What an integer in each of the columns [panel, panel + width) stands for: scales[f*columns + column].
template <int taps, int step>
void right_scales(const Taps& w, const float* values, Index depth, Index panel, Index width, float* scales,
                  Index columns) {
    constexpr int frequencies = points_of<taps> * points_of<taps>;
    for (Index n = panel; n < panel + width; n += lanes) {
        VectorBits magnitudes[frequencies] = {};
        for_each_block<taps, step>(w, values, 0, depth, n, lanes,
                                   [&](const TapBlock(&block)[taps* taps], Index, Index, Index rows) {
                                       for (Index k = 0; k < rows; ++k) {
                                           Frequencies<taps> u;
                                           transform_taps<taps>(block, k, u);
                                           for (int f = 0; f < frequencies; ++f)
                                               magnitudes[f] = larger_lanes(magnitudes[f], magnitude(u[f]));
                                       }
                                   });
        for (int f = 0; f < frequencies; ++f)
            store_vector(scales + f * columns + n, scale_of(magnitudes[f], right_limit));
    }
}

// U for k in [begin, end) and columns [panel, panel + width), as rows of words: numbers k and k + 1 in each. Where
// end - begin is odd, the last k + 1 is zero.
template <int taps, int step>
void round_weight(const Taps& w, const float* values, Index begin, Index end, Index panel, Index width, float* u,
                  Index frequency, const float* scales, Index columns) {
    constexpr int frequencies = points_of<taps> * points_of<taps>;
    for_each_block<taps, step>(
        w, values, begin, end, panel, width, [&](const TapBlock(&block)[taps* taps], Index first, Index n, Index rows) {
            Vector factors[frequencies];
            for (int f = 0; f < frequencies; ++f) factors[f] = 1.0f / load_vector(scales + f * columns + n);
            for (Index k = 0; k < rows; k += 2) {
                Frequencies<taps> even, odd = {};
                transform_taps<taps>(block, k, even);
                if (k + 1 < rows) transform_taps<taps>(block, k + 1, odd);
                float* destination = u + (first + k - begin) / 2 * width + (n - panel);
                for (int f = 0; f < frequencies; ++f) {
                    const VectorBits word =
                        (nearest(even[f] * factors[f]) & 0xFFFFu) | (nearest(odd[f] * factors[f]) << 16);
                    std::memcpy(destination + f * frequency, &word, sizeof word);
                }
            }
        });
}

// The right factors, of every output phase: the transformed weight, in panels of tile_columns columns.
template <int taps, int step, bool integers>
struct Right {
    static constexpr Index numbers = integers ? 2 : 1;  // in a word
    static constexpr Index frequencies = points_of<taps> * points_of<taps>;
    const Taps& weight;
    Index columns, phases;
    Index depth, words;       // numbers and words of a column
    Index frequency;          // words of one
    float* values = nullptr;  // [phase][f][panel][word][column of the panel]
    float* scales = nullptr;  // of integers: what one stands for, [phase][f][column]

    Right(const Taps& weight, Index columns, Index phases)
        : weight(weight),
          columns(columns),
          phases(phases),
          depth(depth_of<step>(weight)),
          words(ceiling(depth, numbers)),
          frequency(words * columns + stagger) {}

    std::size_t bytes() const {
        return Workspace::padded(static_cast<std::size_t>(phases * frequencies * frequency) * sizeof(float));
    }
    std::size_t scale_bytes() const {
        const Index count = integers ? phases * frequencies * columns : 0;
        return Workspace::padded(static_cast<std::size_t>(count) * sizeof(float));
    }
    void place(char* at) {
        values = reinterpret_cast<float*>(at);
        scales = reinterpret_cast<float*>(at + bytes());
    }
    Index width(Index panel) const { return smaller(tile_columns, columns - panel); }
    float* at(Index phase, Index f, Index panel, Index word) const {
        return values + (phase * frequencies + f) * frequency + panel * words + word * width(panel);
    }
    float* scales_at(Index phase, Index f, Index column) const {
        return scales + (phase * frequencies + f) * columns + column;
    }

    // Finds the scales of a panel. Integers only, before anything is filled.
    void measure(Index phase, const float* taps_of_phase, Index panel) const {
        right_scales<taps, step>(weight, taps_of_phase, depth, panel, width(panel), scales_at(phase, 0, 0), columns);
    }
    // Words [begin, end) of a panel's columns, as rows; `begin` is a multiple of `lanes`.
    void fill(Index phase, const float* taps_of_phase, Index panel, Index begin, Index end, float* rows,
              Index row_frequency) const {
        const Index first = begin * numbers, last = smaller(depth, end * numbers);
        if constexpr (integers)
            round_weight<taps, step>(weight, taps_of_phase, first, last, panel, width(panel), rows, row_frequency,
                                     scales_at(phase, 0, 0), columns);
        else
            transform_weight<taps, step>(weight, taps_of_phase, first, last, panel, width(panel), rows, row_frequency);
    }
};

}  // namespace ganvas::cpu::GANVAS_ISA
