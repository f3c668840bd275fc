// The factors of the products, as floats or as 16-bit integers with scales. Of integers on the left each row, a tile,
// has a scale of its own in every frequency, on the right each column, so that rounding is relative to a tile's or a
// column's own size. They take half the time where the processor adds up products of pairs in one instruction, and
// serve tensors whose own rounding is coarser. Included by kernel sources only.
#pragma once

#include <cmath>
#include <functional>
#include <limits>

#include "winograd_input.h"
#include "winograd_weight.h"
#include "workspace.h"

namespace ganvas::cpu::GANVAS_ISA {

constexpr Index integer_slice = 64;  // words, terms of a sum that are added up as integers
// |Σ l·r| ≤ ‖l‖·‖r‖, so no sum of a slice overflows, whatever the factors. Rounding adds up to ½ to each number.
constexpr float left_norm = 65536.0f, right_norm = 32700.0f, integer_limit = 32767.0f;
constexpr float rounding_norm = 6.0f;  // ½√n of n numbers
static_assert(4 * rounding_norm * rounding_norm >= 2 * integer_slice);
static_assert((left_norm + rounding_norm) * (right_norm + rounding_norm) < 0.999f * 0x1p31f);
static_assert(right_norm + 0.5f < integer_limit);  // so are single ones of the right
constexpr float least_scale = std::numeric_limits<float>::min();

// What a product reads of a frequency's rows from word w on, where it is fetched ahead.
inline Stretch stretch_of(const Transformed& from, Index f, Span rows, Index w) {
    return {from.at(rows.first, w) + f * from.frequency, (rows.last - rows.first) * from.width / cache_line};
}

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

// The lanes of each vector combined, as lanes of one.
template <class V, class Combine>
inline V combine_lanes(V (&of)[lanes], Combine combine) {
    Vector rows[lanes];
    std::memcpy(rows, of, sizeof rows);
    transpose(rows);
    std::memcpy(of, rows, sizeof rows);
#pragma GCC unroll 4
    for (int half = lanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) of[i] = combine(of[i], of[i + half]);
    return of[0];
}

// So that no scale's reciprocal overflows.
inline Vector normal_scale(Vector scale) {
    return scale < least_scale ? broadcast(least_scale) : scale;
}

// What an integer stands for, so that `most` of them make the largest magnitude. A NaN stays one.
inline Vector scale_of(VectorBits largest, float most) {
    return normal_scale(__builtin_bit_cast(Vector, largest) / most);
}

// The same, so that `most` make the norm of `count` numbers; where their squares may have left the range of floats, a
// bound of it.
inline Vector scale_of(VectorBits largest, Vector squares, float count, float most) {
    const Vector bound = __builtin_bit_cast(Vector, largest);
    float norms[lanes];
    store_vector(norms, squares);
    for (float& norm : norms) norm = std::sqrt(norm);
    return normal_scale(bound > 1e-15f && bound < 1e15f ? load_vector(norms) / most
                                                        : bound * (std::sqrt(count) / most));
}

// How many times larger than the largest number of its row, half transformed, each of a tile's may be: the sums of the
// magnitudes in the rows of Bᵀ. And how many times larger than the root of all their squares: the rows' norms.
template <int taps>
constexpr float input_gains[points_of<taps>] = {2.5f, 2.5f, 3.0f, 3.0f, 2.5f};
template <>
constexpr float input_gains<3>[points_of<3>] = {
    4.5f, 3.0f + 3.0f * half_root, 3.0f + 3.0f * half_root, 1.5f + 1.5f * root, 1.5f + 1.5f * root, 4.5f};
template <int taps>
constexpr float input_norms[points_of<taps>] = {1.4578f, 1.4578f, 1.5812f, 1.5812f, 1.6202f};
template <>
constexpr float input_norms<3>[points_of<3>] = {2.8723f, 2.7387f, 2.7387f, 1.9365f, 1.9365f, 2.8723f};

// The second transform, along the rows of a segment's tiles, of columns `step` apart, to integers, factors[f] of which
// are one in a tile, points² factors after another's.
template <int taps, int step>
[[gnu::noinline]] void round_rows(const Vector (*columns)[points_of<taps>], Index tiles, Span row_points,
                                  const float* factors, float* destination, Index tile_stride, Index frequency) {
    constexpr int points = points_of<taps>;
    for (Index t = 0; t < tiles; ++t, columns += step * tile, factors += points * points, destination += tile_stride) {
        float* to = destination + row_points.first * points * frequency;
#pragma GCC unroll 1
        for (Index y = row_points.first; y < row_points.last; ++y, to += points * frequency) {
            Vector d[points], v[points];
#pragma GCC unroll 6
            for (int x = 0; x < points; ++x) d[x] = columns[x * step][y];
            transform_input(d, v);
            float* halves[2] = {to, to + 3 * frequency};
#pragma GCC unroll 6
            for (int x = 0; x < points; ++x) {
                const VectorBits bits = nearest(v[x] * broadcast(factors[y * points + x]));
                const VectorHalves integers = __builtin_convertvector(bits, VectorHalves);
                std::memcpy(halves[x / 3] + x % 3 * frequency, &integers, sizeof integers);
            }
        }
    }
}

template <int taps>
constexpr Index segment_rows = whole_vectors((segment_limit + 1) * points_of<taps>);

// Of tiles that lie side by side: scales[t*scale_stride + f] is what an integer stands for, factors[t*points² + f] its
// reciprocal. largest[t*points + y] and squares[t*points + y] are of row y of `tile` columns, which tile t and the one
// before share; in two of those there are `count` numbers.
template <int taps>
[[gnu::noinline]] void scale_tiles(VectorBits (&largest)[segment_rows<taps>], Vector (&squares)[segment_rows<taps>],
                                   Index tiles, float count, float* scales, Index scale_stride, float* factors) {
    constexpr int points = points_of<taps>;
    constexpr Index room = segment_rows<taps>;
    std::uint32_t magnitudes[room + lanes] = {};
    float sums[room + lanes] = {};
    for (Index i = 0; i < (tiles + 1) * points; i += lanes) {
        const VectorBits of_rows = combine_lanes(*reinterpret_cast<VectorBits(*)[lanes]>(largest + i), larger_lanes);
        std::memcpy(magnitudes + i, &of_rows, sizeof of_rows);
        store_vector(sums + i, combine_lanes(*reinterpret_cast<Vector(*)[lanes]>(squares + i), std::plus<Vector>{}));
    }
    float units[2][room], factors_of_one[2][room];  // where the gain is one, from the largest number and from the norm
    for (Index i = 0; i < tiles * points; i += lanes) {
        VectorBits here, next;
        std::memcpy(&here, magnitudes + i, sizeof here);
        std::memcpy(&next, magnitudes + i + points, sizeof next);
        const VectorBits both = larger_lanes(here, next);
        const Vector unit[2] = {
            scale_of(both, integer_limit),
            scale_of(both, load_vector(sums + i) + load_vector(sums + i + points), count, left_norm)};
        for (int by = 0; by < 2; ++by) {
            store_vector(units[by] + i, unit[by]);
            store_vector(factors_of_one[by] + i, 1.0f / unit[by]);
        }
    }
    Vector gains[2]{}, inverse_gains[2]{};
    for (int x = 0; x < points; ++x) {
        gains[0][x] = input_gains<taps>[x], inverse_gains[0][x] = 1.0f / input_gains<taps>[x];
        gains[1][x] = input_norms<taps>[x], inverse_gains[1][x] = 1.0f / input_norms<taps>[x];
    }
    for (Index i = 0; i < tiles * points; ++i) {  // whole vectors: each row's end is overwritten by the next
        const Vector scale[2] = {units[0][i] * gains[0], units[1][i] * gains[1]};
        const Vector factor[2] = {factors_of_one[0][i] * inverse_gains[0], factors_of_one[1][i] * inverse_gains[1]};
        store_vector(scales + i / points * scale_stride + i % points * points,
                     scale[0] > scale[1] ? scale[0] : scale[1]);
        store_vector(factors + i * points, factor[0] < factor[1] ? factor[0] : factor[1]);
    }
}

// V of all channels of a segment's tiles as integers; scales[t*scale_stride + f] is what one stands for. `scratch` has
// room for the columns of all channels.
template <class T, int taps, int step, Activation kind>
void round_segment(const Source& source, Pixel origin, const Segment& segment, const Transformed& to, Index first,
                   float* scales, Index scale_stride, float* scratch) {
    constexpr int points = points_of<taps>;
    const SegmentColumns<T, InputSide<taps>, step, kind> of(source, origin, segment);
    Vector(*const columns)[points] = reinterpret_cast<Vector(*)[points]>(scratch);
    // The largest magnitude and the squares of each row of `tile` columns: a tile's own, and those that it shares with
    // the next.
    const Index rows = whole_vectors((segment.tiles + 1) * points);
    VectorBits largest[segment_rows<taps>];
    Vector squares[segment_rows<taps>];
    for (Index i = 0; i < rows; ++i) largest[i] = VectorBits{}, squares[i] = Vector{};
    for (Index c = 0; c < source.channels; c += lanes)
        for (int row_phase = 0; row_phase < step; ++row_phase) {
            Vector(*const own)[points] = columns + (c / lanes * step + row_phase) * of.width;
            of.transform(c, row_phase, own);
            for (Index t = 0; t <= segment.tiles; ++t) {
                const Index begin = t * tile * step, end = smaller(begin + tile * step, of.width);
                for (int y = 0; y < points; ++y) {
                    VectorBits most = largest[t * points + y];
                    Vector sum = squares[t * points + y];
                    for (Index x = begin; x < end; ++x) {
                        most = larger_lanes(most, magnitude(own[x][y]));
                        sum += own[x][y] * own[x][y];
                    }
                    largest[t * points + y] = most;
                    squares[t * points + y] = sum;
                }
            }
        }
    const float count = static_cast<float>(2 * tile * step * step * source.channels);
    float factors[segment_limit * points * points + lanes];
    scale_tiles<taps>(largest, squares, segment.tiles, count, scales, scale_stride, factors);
    for (Index c = 0; c < source.channels; c += lanes)
        for (int phase = 0; phase < step * step; ++phase)
            round_rows<taps, step>(columns + (c / lanes * step + phase / step) * of.width + phase % step, segment.tiles,
                                   segment.row_points, factors, to.at(first, (c * step * step + phase * lanes) / 2),
                                   to.width, to.frequency);
}

using RoundSegment = void (*)(const Source&, Pixel origin, const Segment&, const Transformed&, Index first,
                              float* scales, Index scale_stride, float* scratch);

template <class T, int taps, int step>
RoundSegment round_of(Activation kind) {
    return for_activation(kind, []<Activation of>() -> RoundSegment { return round_segment<T, taps, step, of>; });
}

// The left factors of some tiles: floats, or integers.
template <int taps, int step, bool integers>
struct Left;

template <int taps, int step>
struct Left<taps, step, false> {
    static constexpr Index frequencies = points_of<taps> * points_of<taps>;
    Transformed words;
    TransformSegment transform;
    static constexpr const float* scales = nullptr;
    static constexpr Index scale_stride = 0;

    Left(Index tiles, Index depth, Dtype dtype, Activation kind)
        : words(frequencies, tiles, depth), transform(transform_of<InputSide<taps>, step>(dtype, kind)) {}
    std::size_t bytes() const { return Workspace::padded(words.bytes()); }
    std::size_t scratch_bytes() const { return 0; }
    void place(char* at, char*) { words.values = reinterpret_cast<float*>(at); }
    void take(const Source& source, Pixel origin, const Segment& s, Index first) const {
        transform(source, origin, s, words, first, 0, source.channels);
    }
};

constexpr Index columns_bytes = 48 << 10;  // of pixels that wait, half transformed, until their scales are known

template <int taps, int step>
struct Left<taps, step, true> {
    static constexpr Index points = points_of<taps>, frequencies = points * points;
    static constexpr Index scale_stride = whole_vectors(frequencies) + lanes;
    Transformed words;
    RoundSegment transform;
    float* scales = nullptr;  // what an integer stands for, [tile][f]
    float* scratch = nullptr;
    Index scale_count;
    Index column_bytes, stretch;  // of all channels; tiles of a segment that are taken together

    Left(Index tiles, Index depth, Dtype dtype, Activation kind)
        : words(frequencies, tiles, depth, 2),
          transform(dtype == Dtype::float32 ? round_of<float, taps, step>(kind) : round_of<bfloat16, taps, step>(kind)),
          scale_count(tiles * scale_stride),
          column_bytes(whole_vectors(depth) * points * static_cast<Index>(sizeof(float))),
          stretch(clamped((columns_bytes / column_bytes - (taps - 1)) / tile, 1, segment_limit)) {}
    std::size_t bytes() const {
        return Workspace::padded(words.bytes()) +
               Workspace::padded(static_cast<std::size_t>(scale_count) * sizeof(float));
    }
    std::size_t scratch_bytes() const {
        return Workspace::padded(static_cast<std::size_t>((stretch * tile + taps - 1) * column_bytes));
    }
    void place(char* at, char* at_scratch) {
        words.values = reinterpret_cast<float*>(at);
        scales = reinterpret_cast<float*>(at + Workspace::padded(words.bytes()));
        scratch = reinterpret_cast<float*>(at_scratch);
    }
    void take(const Source& source, Pixel origin, const Segment& s, Index first) const {
        for (Index t = 0; t < s.tiles; t += stretch) {
            Segment part = s;
            part.column += t;
            part.tiles = smaller(stretch, s.tiles - t);
            transform(source, origin, part, words, first + t, scales + (first + t) * scale_stride, scale_stride,
                      scratch);
        }
    }
};

// What an integer in each of the columns [panel, panel + width) stands for: scales[f*columns + column].
template <int taps, int step>
void right_scales(const Taps& w, const float* values, Index depth, Index panel, Index width, float* scales,
                  Index columns) {
    constexpr int frequencies = points_of<taps> * points_of<taps>;
    constexpr Index slice = 2 * integer_slice;
    for (Index n = panel; n < panel + width; n += lanes) {
        VectorBits largest[frequencies] = {};
        Vector squares[frequencies] = {}, most_squares[frequencies] = {};
        for_each_block<taps, step>(
            w, values, 0, depth, n, lanes, [&](const TapBlock(&block)[taps* taps], Index first, Index, Index rows) {
                for (Index k = 0; k < rows; ++k) {
                    Frequencies<taps> u;
                    transform_taps<taps>(block, k, u);
                    for (int f = 0; f < frequencies; ++f) {
                        largest[f] = larger_lanes(largest[f], magnitude(u[f]));
                        squares[f] += u[f] * u[f];
                    }
                }
                if ((first + rows) % slice != 0 && first + rows < depth) return;
                for (int f = 0; f < frequencies; ++f) {
                    most_squares[f] = most_squares[f] > squares[f] ? most_squares[f] : squares[f];
                    squares[f] = Vector{};
                }
            });
        for (int f = 0; f < frequencies; ++f)
            store_vector(scales + f * columns + n, scale_of(largest[f], most_squares[f], slice, right_norm));
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
        if constexpr (integers)
            right_scales<taps, step>(weight, taps_of_phase, depth, panel, width(panel), scales_at(phase, 0, 0),
                                     columns);
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
