// Convolutions of any kernel, stride, padding and dilation as products of tiles (amx.h) of bfloat16 numbers, where
// has_bfloat16_tiles().
//
// A map is copied once, its activation applied, with zeros around it: then the pixels that a tap of the kernel meets
// are those of the output, a constant number of places further on, and each tap's factor is read where it lies. Rows
// follow each other with no more between them than the zeros that the end of one and the beginning of the next have in
// common; so do images. Places are counted in one line, and what comes out between two rows is left aside.
//
// Where a map has few channels, pixels lie closer than a tile's row is long: a row then is of several pixels, and meets
// as many taps at once.
//
// With a stride s, every s-th pixel makes a plane of its own. A convolution reads up to s×s planes of its input; the
// gradient that it gives back has s×s phases, each of which meets some of the taps and reads one plane. Transposed
// convolutions are the same with maps exchanged.
//
//   backward_weight   dw[tap][m][n] = Σ_q P[q][m]·L[q + tap][n], with P the map of one plane, turned so that pixels lie
//                     side by side, and L the other in pairs of pixels, of which one begins at each place
#include <omp.h>

#include "amx.h"
#include "convolution_output.h"
#include "convolutions.h"
#include "parallel.h"
#include "weight_taps.h"
#include "workspace.h"

namespace ganvas::cpu::avx512 {
namespace {

constexpr Index chunk = 128;            // places that are multiplied together
constexpr Index block = 2 * tile_side;  // channels or places of two tiles
constexpr Index pair_bytes = 2 * tile_words * static_cast<Index>(sizeof(float));
constexpr Index right_bytes = 36 << 10;           // of a weight's tiles that stay in the nearest cache
constexpr Index part_bytes = 384 << 10;           // of the copies that a thread makes at a time
constexpr Index gradient_part_bytes = 768 << 10;  // the same for the weight's gradient
constexpr Index gradient_bytes = 1 << 20;         // of a weight's gradient that a thread adds up by itself
constexpr Index piece_tiles_least = 8;            // of one side of a piece of a weight's gradient
constexpr Index turn_tiles = 8;                   // of pixels that the taps of a row are multiplied with in turn
constexpr Index together_bytes = 256;             // lines so far apart, and multiples, fall on few sets of a cache

using Number = std::uint16_t;  // of bfloat16

constexpr Index multiple(Index count, Index of) {
    return ceiling(count, of) * of;
}

// How pixels of a map that is read meet those of another along one axis.
struct Axis {
    bool gathers;    // the other map's pixels read windows; else they are what windows are added up to
    Index from, to;  // lengths
    Index size, stride, padding, dilation;
    Index step, phases;         // from pixel to pixel of a plane; of the map that is written
    Index planes = 1;           // that taps meet
    Index length = 0;           // of the longest
    Index lead = 0, reach = 0;  // zeros before a plane's first pixel, and the furthest shift
    Index pitch = 0;            // places from one row, or image, to the next

    Axis(const KernelAxis& kernel, bool gathers, Index from, Index to)
        : gathers(gathers),
          from(from),
          to(to),
          size(kernel.size),
          stride(kernel.stride),
          padding(kernel.padding),
          dilation(kernel.dilation),
          step(gathers ? stride : 1),
          phases(gathers ? 1 : stride) {
        while (planes < smaller(size, step) && first(planes) != first(0)) ++planes;
        for (Index plane = 0; plane < planes; ++plane) length = larger(length, plane_length(plane));
        Index end = length;
        for (Index phase = 0; phase < phases; ++phase)
            for (Index tap = 0; tap < size; ++tap) {
                if (!meets(phase, tap)) continue;
                lead = larger(lead, -shift(phase, tap));
                reach = larger(reach, shift(phase, tap));
                end = larger(end, phase_length(phase) + shift(phase, tap));
            }
        pitch = larger(phase_length(0), larger(length + lead, end));
    }
    // The first pixel of a plane, and how many it has.
    Index first(Index plane) const { return gathers ? modulo(offset(0, plane)) : 0; }
    Index plane_length(Index plane) const { return ceiling(larger(0, from - first(plane)), step); }
    Index phase_length(Index phase) const { return ceiling(larger(0, to - phase), phases); }
    bool meets(Index phase, Index tap) const { return gathers || modulo(offset(phase, tap)) == 0; }
    // Pixel m of the phase meets pixel m + shift of the plane.
    Index plane(Index tap) const { return tap % planes; }
    Index shift(Index phase, Index tap) const {
        const Index o = offset(phase, tap);
        return (o - modulo(o)) / stride;
    }
    // Taps that a phase meets in a plane, nearest pixels first.
    template <class Visit>
    void each_tap(Index phase, Index of_plane, Visit visit) const {
        for (Index i = 0; i < size; ++i) {
            const Index tap = gathers ? i : size - 1 - i;
            if (meets(phase, tap) && plane(tap) == of_plane) visit(tap);
        }
    }
    // How many taps, no more than `most`, read neighbouring pixels wherever a phase meets one.
    Index neighbours(Index most) const {
        for (Index phase = 0; phase < phases; ++phase)
            for (Index of_plane = 0; of_plane < planes; ++of_plane) {
                Index count = 0, last = 0;
                each_tap(phase, of_plane, [&](Index tap) {
                    if (count > 0 && shift(phase, tap) != last + 1) most = 1;
                    last = shift(phase, tap), ++count;
                });
                if (count > 0) most = smaller(most, count);
            }
        return most;
    }

  private:
    Index offset(Index phase, Index tap) const {
        return gathers ? dilation * tap - padding : phase + padding - dilation * tap;
    }
    Index modulo(Index value) const { return (value % stride + stride) % stride; }
};

// A pair of taps, along either axis, that pixels of a phase meet.
struct Tap {
    Index plane, place;  // that is read beside a pixel's own place
    Index offset;        // of its numbers in the weight; none where they are those of another
    static constexpr Index none = -1;
};

// Two maps, the way from one to the other, and how they are cut into parts: some images of one group, or some rows of
// one image.
struct Meeting {
    Axis y, x;
    Index images, group_images;
    Index part_images, part_rows;  // rows of a phase
    Index per_image, per_group, count;

    // A part's copies take no more than `most_bytes`, `place_bytes` for each pixel; parts are at least `enough`, where
    // that is possible.
    Meeting(const Axis& y, const Axis& x, Index images, Index groups, Index place_bytes, Index most_bytes, Index enough)
        : y(y), x(x), images(images), group_images(images / groups) {
        const Index height = y.phase_length(0), row_bytes = planes() * x.pitch * place_bytes;
        const Index rows = larger(1, most_bytes / row_bytes - y.lead - y.reach);
        part_images = clamped(rows / y.pitch, 1, smaller(group_images, larger(1, images / enough)));
        part_rows = smaller(rows, height);
        if (part_images == 1 && images < enough) part_rows = smaller(part_rows, ceiling(height * images, enough));
        per_image = part_images > 1 ? 1 : ceiling(height, part_rows);
        part_rows = ceiling(height, per_image);
        per_group = ceiling(group_images, part_images) * per_image;
        count = groups * per_group;
    }
    Index planes() const { return y.planes * x.planes; }
    Index group(Index part) const { return part / per_group; }
    Index image(Index part) const { return group(part) * group_images + part % per_group / per_image * part_images; }
    Index images_of(Index part) const { return smaller(part_images, (group(part) + 1) * group_images - image(part)); }
    Index top(Index part) const { return part % per_image * part_rows; }
    Index bottom(Index part, Index phase) const { return smaller(top(part) + part_rows, y.phase_length(phase)); }
    // Pixels of the map that is written, of all phases.
    Index first(Index part) const { return (image(part) * y.to + top(part) * y.phases) * x.to; }
    Index last(Index part) const {
        const Index end = smaller((top(part) + part_rows) * y.phases, y.to);
        return ((image(part) + images_of(part) - 1) * y.to + end) * x.to;
    }

    // Pixels of the map that is read, but for what parts have in common.
    Index read_first(Index part) const { return read(image(part), top(part)); }
    Index read_last(Index part) const { return read(image(part) + images_of(part) - 1, top(part) + part_rows); }

    // Rows of a plane that are copied, and places up to the last that is read.
    Index rows(Index part) const { return rows(images_of(part), bottom(part, 0) - top(part)); }
    Index rows(Index part_images, Index part_rows) const {
        return (part_images - 1) * y.pitch + part_rows + y.lead + y.reach;
    }
    Index places(Index rows) const { return rows * x.pitch + x.lead + x.reach + block; }
    Index most_places() const { return places(rows(part_images, part_rows)); }
    // Places of a phase, from its first pixel to its last.
    Index length(Index part, Index phase_y, Index phase_x) const {
        const Index rows = bottom(part, phase_y) - top(part);
        if (rows <= 0 || x.phase_length(phase_x) <= 0) return 0;
        return ((images_of(part) - 1) * y.pitch + rows - 1) * x.pitch + x.phase_length(phase_x);
    }
    // Calls visit(image, row, column, place, count) for pixels of a phase at places [begin, end), row by row.
    template <class Visit>
    void each_run(Index part, Index phase_y, Index phase_x, Index begin, Index end, Visit visit) const {
        const Index height = bottom(part, phase_y) - top(part), width = x.phase_length(phase_x);
        Index line = begin / x.pitch, column = begin % x.pitch;
        for (Index place = begin; place < end; ++line, column = 0) {
            const Index until = smaller(end, place + x.pitch - column), count = smaller(until - place, width - column);
            const Index nth = images_of(part) == 1 ? 0 : line / y.pitch, row = line - nth * y.pitch;
            if (count > 0 && row < height) visit(image(part) + nth, top(part) + row, column, place, count);
            place = until;
        }
    }
    Index tap_count() const { return y.size * x.size; }
    // The taps that a phase meets, `together` neighbours of a row in turn: how many there are of those. The last ones
    // of a row overlap the ones before.
    Index taps_of(Index phase_y, Index phase_x, Index kernel_row, Index kernel_column, Index together,
                  Tap* taps) const {
        Index count = 0;
        for (Index ty = 0; ty < y.size; ++ty)
            for (Index plane_x = 0; y.meets(phase_y, ty) && plane_x < x.planes; ++plane_x) {
                Tap* const row = taps + count * together;
                Index met = 0;
                x.each_tap(phase_x, plane_x, [&](Index tx) {
                    row[met++] = {y.plane(ty) * x.planes + plane_x,
                                  (y.lead + y.shift(phase_y, ty)) * x.pitch + x.lead + x.shift(phase_x, tx),
                                  ty * kernel_row + tx * kernel_column};
                });
                const Index groups = ceiling(met, together), end = groups * together, again = end - met;
                for (Index i = end - 1; again > 0 && i >= end - together; --i) row[i] = row[i - again];
                for (Index i = 0; i < again; ++i) row[end - together + i].offset = Tap::none;
                count += groups;
            }
        return count;
    }
    // Room for those of all phases.
    Index tap_room() const { return 2 * tap_count(); }

  private:
    Index read(Index image, Index row) const { return (image * y.from + smaller(row * y.step, y.from)) * x.from; }
};

inline void store_pixel(Number* to, Vector low, Vector high) {
    VectorBits pair;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pair) : "v"(low), "v"(high));
    std::memcpy(to, &pair, sizeof pair);
}

// `count` pixels, their activation applied, from `channels` channels on; zeros past those, up to whole tiles, or to the
// next pixel.
template <class T, Activation kind>
void copy_pixels(const T* from, Index from_step, Index count, Index channels, const float* scale, const float* shift,
                 Leaky leaky, Number* to, Index to_step) {
    if (std::is_same_v<T, bfloat16> && kind == Activation::identity && from_step == channels && to_step == channels) {
        __builtin_memcpy(to, from, static_cast<std::size_t>(count * channels) * sizeof(Number));
        return;
    }
    if (to_step < tile_depth) {  // what is stored past a pixel, the next one stores over
        const Vector scales = kind == Activation::identity ? Vector{} : load_lanes(scale, channels);
        const Vector shifts = kind == Activation::identity ? Vector{} : load_lanes(shift, channels);
        for (Index i = 0; i < count; ++i, from += from_step, to += to_step) {
            const VectorHalves halves =
                nearest_bfloat16(activate<kind>(load_lanes(from, channels), scales, shifts, leaky));
            std::memcpy(to, &halves, sizeof halves);
        }
        return;
    }
    for (Index c = 0; c < channels; c += tile_depth) {
        const Index low = smaller(lanes, channels - c), high = clamped(channels - c - lanes, 0, lanes);
        Vector scales[2]{}, shifts[2]{};
        if (kind != Activation::identity) {
            scales[0] = load_lanes(scale + c, low), shifts[0] = load_lanes(shift + c, low);
            if (high) scales[1] = load_lanes(scale + c + lanes, high), shifts[1] = load_lanes(shift + c + lanes, high);
        }
        const T* pixel = from + c;
        Number* copy = to + c;
        if (std::is_same_v<T, bfloat16> && kind == Activation::identity && high == lanes) {
            for (Index i = 0; i < count; ++i, pixel += from_step, copy += to_step)
                std::memcpy(copy, pixel, tile_depth * sizeof(Number));
            continue;
        }
        const auto copy_each = [&](auto load_low, auto load_high) {
            for (Index i = 0; i < count; ++i, pixel += from_step, copy += to_step)
                store_pixel(copy, activate<kind>(load_low(pixel), scales[0], shifts[0], leaky),
                            activate<kind>(load_high(pixel + lanes), scales[1], shifts[1], leaky));
        };
        if (high == lanes)
            copy_each([](const T* at) { return load_vector(at); }, [](const T* at) { return load_vector(at); });
        else
            copy_each([=](const T* at) { return load_lanes(at, low); },
                      [=](const T* at) { return high ? load_lanes(at, high) : Vector{}; });
    }
}

inline void zero_numbers(Number* to, Index count) {
    __builtin_memset(to, 0, static_cast<std::size_t>(count) * sizeof(Number));
}

// Pixels of a map that are read.
struct Reader {
    Source source;
    void (*copy)(const Reader&, Index image, const void* first, Index step, Index count, Index channel, Index channels,
                 Number* to, Index to_step);
    Index element_bytes;

    Reader(const Source& source, Dtype dtype) : source(source), element_bytes(ganvas::element_bytes(dtype)) {
        copy = for_activation(activation_of(source.pixels), [&]<Activation kind>() {
            return dtype == Dtype::float32 ? copy_of<float, kind> : copy_of<bfloat16, kind>;
        });
    }
    // `count` pixels of a row, every step-th from column x on; of channels [channel, channel + channels).
    void operator()(Index image, Index y, Index x, Index step, Index count, Index channel, Index channels, Number* to,
                    Index to_step) const {
        const Index first = ((image * source.height + y) * source.width + x) * source.channels + channel;
        copy(*this, image, static_cast<const char*>(source.pixels.stored) + first * element_bytes,
             step * source.channels, count, channel, channels, to, to_step);
    }

  private:
    template <class T, Activation kind>
    static void copy_of(const Reader& reader, Index image, const void* first, Index step, Index count, Index channel,
                        Index channels, Number* to, Index to_step) {
        const PendingActivation& pixels = reader.source.pixels;
        const Index at = reader.source.per_channel(image) + channel;
        copy_pixels<T, kind>(static_cast<const T*>(first), step, count, channels,
                             pixels.scale ? pixels.scale + at : nullptr, pixels.shift ? pixels.shift + at : nullptr,
                             Leaky(pixels.negative_slope), to, to_step);
    }
};

// The next part's pixels, which are fetched a few lines at a time while products of this one are taken: they come from
// far, and copying would wait for them.
class Ahead {
  public:
    // Of pixels [first, last) are those that this part reads; products take `steps`.
    Ahead(const Reader& read, Index first, Index last, Index steps) {
        const Index pixel_bytes = read.source.channels * read.element_bytes;
        line_ = static_cast<const char*>(read.source.pixels.stored) + last * pixel_bytes;
        lines_each_ = ceiling((last - first) * pixel_bytes, line_bytes * larger(1, steps));
    }
    void fetch() {
        for (Index i = 0; i < lines_each_; ++i, line_ += line_bytes) prefetch<2>(line_);
    }

  private:
    static constexpr Index line_bytes = 64;
    const char* line_;
    Index lines_each_;
};

// Copies each of a part's rows of a plane, x.pitch pixels of `step` numbers, to what next_row() returns, and calls
// copied() after it; of channels [channel, channel + channels).
template <class NextRow, class Copied>
void copy_plane(const Meeting& m, const Reader& read, Index part, Index plane, Index channel, Index channels,
                Index step, NextRow next_row, Copied copied) {
    const Index plane_y = plane / m.x.planes, plane_x = plane % m.x.planes;
    const Index height = m.y.plane_length(plane_y), width = m.x.plane_length(plane_x);
    const Index count = m.images_of(part), first = m.image(part);
    for (Index row = 0; row < m.rows(part); ++row) {
        const Index nth = count == 1 ? 0 : smaller(row / m.y.pitch, count - 1);
        const Index y = m.top(part) + row - nth * m.y.pitch - m.y.lead;
        Number* const to = next_row();
        const Index inside = y >= 0 && y < height ? width : 0;
        if (inside)
            read(first + nth, y * m.y.step + m.y.first(plane_y), m.x.first(plane_x), m.x.step, inside, channel,
                 channels, to, step);
        zero_numbers(to + inside * step, (m.x.pitch - inside) * step);
        copied();
    }
}

// A pass from one map to another. The weight's taps[k][n] are numbers of channel k of the map that is read.
struct Pass {
    const Meeting& meeting;
    Reader read;
    Destination to;
    Taps weight;
    const float* values;
    Index step;      // numbers from place to place
    Index together;  // taps in a tile
    Index k_tiles;   // of the channels that are read

    Index place_bytes() const { return step * static_cast<Index>(sizeof(Number)); }
    Index plane_bytes() const { return meeting.most_places() * place_bytes(); }
    Index pairs() const { return ceiling(to.channels, block); }
    Index depth() const { return smaller(tile_depth, together * step); }  // numbers in a tile's row
    // Tiles of channels that are multiplied together.
    Index group(Index taps) const { return clamped(right_bytes / (larger(1, taps) * pair_bytes), 1, k_tiles); }
};

// The taps of every phase, pass.together for a tile, and where the weight's tiles for a phase begin:
// [pair][group][tap][k][2].
struct Phases {
    Tap* taps;
    Index* first;  // of each phase, and the end, in tiles
    float* weight;

    Index count(Index phase) const { return first[phase + 1] - first[phase]; }
    float* tiles(const Pass& pass, Index phase, Index pair) const {
        return weight + (pass.pairs() * first[phase] + pair * count(phase)) * pass.k_tiles * 2 * tile_words;
    }
};

// A tile of some taps: numbers of channels [k, k + tile_depth), or of all taps in turn, two to a word, for columns
// [n, n + tile_side).
void pack_tile(const Pass& pass, const Tap* taps, Index k, Index n, float* words) {
    const Taps& w = pass.weight;
    const Index columns = smaller(tile_side, w.columns - n);
    if (columns <= 0) return;  // of a pair of tiles that is none
    const Index step = smaller(lanes, pass.step);
    Vector rows[tile_depth] = {};
    for (Index row = 0; row < pass.depth(); row += step) {
        const Index channel = pass.together > 1 ? 0 : k + row;
        const Tap& tap = taps[pass.together > 1 ? row / step : 0];
        if (tap.offset == Tap::none || channel >= w.channels) continue;
        TapBlock numbers[1] = {};
        load_taps<1>(w, pass.values + tap.offset + channel * w.k + n * w.n, smaller(step, w.channels - channel),
                     columns, numbers);
        for (Index i = 0; i < step; ++i) rows[row + i] = numbers[0][i];
    }
    store_rows<Elements::bfloat16_pairs>(reinterpret_cast<const float*>(rows), lanes, pass.depth(), lanes, words,
                                         lanes);
}

// Every tile of one tap for a pair of columns.
void pack_pair(const Pass& pass, const Phases& phases, Index phase, Index pair, Index tap) {
    const Index taps = phases.count(phase), group = pass.group(taps);
    const Tap* const those = phases.taps + (phases.first[phase] + tap) * pass.together;
    for (Index k = 0; k < pass.k_tiles; ++k) {
        const Index before = k / group * group, depth = smaller(group, pass.k_tiles - before);
        float* const words =
            phases.tiles(pass, phase, pair) + (before * taps + tap * depth + k - before) * 2 * tile_words;
        for (Index i = 0; i < 2; ++i)
            pack_tile(pass, those, k * tile_depth, pair * block + i * tile_side, words + i * tile_words);
    }
}

// `count` places of a phase times the taps that it meets, for a pair of columns, or one: [chunk][block].
template <int columns>
void multiply(const Pass& pass, const Phases& phases, Index phase, Index pair, const char* copies, Index place,
              Index count, float* products, Ahead& ahead) {
    constexpr Index row_bytes = block * static_cast<Index>(sizeof(float));
    const Tap* const taps = phases.taps + phases.first[phase] * pass.together;
    const Index tap_count = phases.count(phase), group = pass.group(tap_count);
    const Index place_bytes = pass.place_bytes(), plane_bytes = pass.plane_bytes();
    const char* weight = reinterpret_cast<const char*>(phases.tiles(pass, phase, pair));
    for (Index k = 0; k < pass.k_tiles; k += group) {
        const Index depth = smaller(group, pass.k_tiles - k);
        for (Index row = 0; row < count; row += block) {
            float* const to = products + row * block;
            const auto at = [&](int i, int j) { return to + (i * block + j) * tile_side; };
            each_sum<2, columns>(
                [&]<int sums>(int i, int j) { k > 0 ? load_tile<sums>(at(i, j), row_bytes) : zero_tile<sums>(); });
            const char* right = weight;
            for (Index i = 0; i < tap_count; ++i, right += depth * pair_bytes) {
                const Tap& tap = taps[i * pass.together];
                add_tile_products<2, columns>(
                    copies + tap.plane * plane_bytes + (tap.place + place + row) * place_bytes + k * 64, place_bytes,
                    tile_side * place_bytes, 64, right, 64, pair_bytes / 2, pair_bytes, depth, [&] { ahead.fetch(); });
            }
            each_sum<2, columns>([&]<int sums>(int i, int j) { store_tile<sums>(at(i, j), row_bytes); });
        }
        weight += tap_count * depth * pair_bytes;
    }
}

// What is kept of the pixels of a part, of channels [begin, end).
struct PairSums {
    Index begin, end;
    Channels channels[block / lanes];
    bool begun = false;

    Index vectors() const { return ceiling(end - begin, lanes); }
};

// Stores the pixels among the places [place, place + count) of a phase.
template <class T, Output kind>
void write_places(const Pass& pass, Index part, Index phase, Index place, Index count, const float* products,
                  PairSums& sums) {
    const Meeting& m = pass.meeting;
    const Destination& to = pass.to;
    const Leaky leaky = leaky_of<kind>(to);
    const Index phase_y = phase / m.x.phases, phase_x = phase % m.x.phases, step = m.x.phases * to.channels;
    m.each_run(
        part, phase_y, phase_x, place, place + count, [&](Index image, Index row, Index column, Index at, Index run) {
            const float* const values = products + (at - place) * block;
            if (!sums.begun)
                begin_channels<kind>(to, m.group(part), sums.begin, sums.end, values, block, run, leaky, sums.channels);
            sums.begun = true;
            const Index position =
                ((image * to.height + row * m.y.phases + phase_y) * to.width + column * m.x.phases + phase_x) *
                    to.channels +
                sums.begin;
            write_runs<T, kind>(to, position, step, run, sums.vectors(), values, block, leaky, sums.channels);
        });
}

// Takes a pair of columns of a part through products and output.
template <class T, Output kind>
void write_pair(const Pass& pass, const Phases& phases, Index part, Index pair, const char* copies, float* products,
                Ahead& ahead, double* sums_of_part) {
    const Meeting& m = pass.meeting;
    PairSums sums{pair * block, smaller((pair + 1) * block, pass.to.channels), {}};
    for (Index phase = 0; phase < m.y.phases * m.x.phases; ++phase) {
        const Index length = m.length(part, phase / m.x.phases, phase % m.x.phases);
        for (Index place = 0; place < length; place += chunk) {
            const Index count = smaller(chunk, length - place);
            (sums.vectors() == 2 ? multiply<2> : multiply<1>)(pass, phases, phase, pair, copies, place, count, products,
                                                              ahead);
            write_places<T, kind>(pass, part, phase, place, count, products, sums);
        }
    }
    keep_sums<kind>(sums.channels, sums.vectors(), sums.begin, m.last(part) - m.first(part), pass.to.channels,
                    sums_of_part);
}

using WritePair = void (*)(const Pass&, const Phases&, Index part, Index pair, const char* copies, float* products,
                           Ahead& ahead, double* sums);

// Each thread takes a part, and where parts are few some of the columns, through copy, products and output. The weight
// is made first and shared. Then finish(sums, group, begin, end) is called for slices of the channels.
template <class Finish>
void run(const Pass& pass, Dtype dtype, Output kind, int threads, Finish finish) {
    const Meeting& m = pass.meeting;
    const Destination& to = pass.to;
    const Index pairs = pass.pairs(), phase_count = m.y.phases * m.x.phases;
    const Index splits = smaller(pairs, ceiling(threads, m.count)), split = ceiling(pairs, splits);
    const std::size_t copy_bytes = Workspace::padded(static_cast<std::size_t>(m.planes() * pass.plane_bytes()));
    const std::size_t tap_bytes = Workspace::padded(static_cast<std::size_t>(m.tap_room()) * sizeof(Tap));
    const std::size_t first_bytes = Workspace::padded(static_cast<std::size_t>(phase_count + 1) * sizeof(Index));
    const std::size_t weight_bytes = floats(m.tap_count() * pairs * pass.k_tiles * 2 * tile_words);
    const std::size_t sum_bytes = PartSums<Meeting>::bytes(m, to.channels);
    Workspace workspace(tap_bytes + first_bytes + weight_bytes + Workspace::padded(sum_bytes));
    const ThreadWorkspaces scratch(copy_bytes + floats(chunk * block), threads);
    const Phases phases{static_cast<Tap*>(workspace.take(tap_bytes)), static_cast<Index*>(workspace.take(first_bytes)),
                        static_cast<float*>(workspace.take(weight_bytes))};
    const PartSums<Meeting> sums{m, to.channels, static_cast<double*>(workspace.take(sum_bytes))};
    const WritePair write =
        for_output(dtype, kind, []<class T, Output of>() -> WritePair { return write_pair<T, of>; });
    phases.first[0] = 0;
    for (Index phase = 0; phase < phase_count; ++phase)
        phases.first[phase + 1] =
            phases.first[phase] + m.taps_of(phase / m.x.phases, phase % m.x.phases, pass.weight.row, pass.weight.column,
                                            pass.together, phases.taps + phases.first[phase] * pass.together);
    Shares shares(m.count * splits, threads);

#pragma omp parallel num_threads(threads)
    {
        const Index thread = omp_get_thread_num(), team = omp_get_num_threads();
        char* const copies = scratch.of(thread);
        float* const products = reinterpret_cast<float*>(copies + copy_bytes);
        const Tiles tiles(pass.depth());
        for (Index phase = 0; phase < phase_count; ++phase) {
            const Index count = phases.count(phase);
#pragma omp for schedule(static) nowait
            for (Index item = 0; item < pairs * count; ++item)
                pack_pair(pass, phases, phase, item / count, item % count);
        }
#pragma omp barrier
        for (Index item; (item = shares.take(thread)) >= 0;) {
            const Index part = item / splits, first = item % splits * split, last = smaller(first + split, pairs);
            for (Index plane = 0; plane < m.planes() && first < last; ++plane) {
                Number* row = reinterpret_cast<Number*>(copies + plane * pass.plane_bytes());
                zero_numbers(row, m.x.lead * pass.step);
                row += m.x.lead * pass.step;
                copy_plane(
                    m, pass.read, part, plane, 0, pass.read.source.channels, pass.step, [&] { return row; },
                    [&] { row += m.x.pitch * pass.step; });
            }
            Index steps = 0;
            for (Index phase = 0; phase < phase_count; ++phase)
                steps += ceiling(m.length(part, phase / m.x.phases, phase % m.x.phases), block) * phases.count(phase) *
                         pass.k_tiles * (last - first);
            Ahead ahead(pass.read, m.read_first(part), m.read_last(part), steps);
            for (Index pair = first; pair < last; ++pair)
                write(pass, phases, part, pair, copies, products, ahead, sums.of(part));
        }
#pragma omp barrier
        finish_slice(to, sums, finish, thread, team);
    }
}

template <class Finish>
void run(const ConvolutionShape& s, const Source& from, const Destination& to, bool gathers, const Taps& weight,
         const float* values, Output kind, int threads, Finish finish) {
    const Axis y(s.rows, gathers, from.height, to.height), x(s.columns, gathers, from.width, to.width);
    Index step = multiple(from.channels, tile_depth), place = step, together = 1;
    if (from.channels <= tile_depth / 2) {
        place = 2;
        while (place < from.channels) place *= 2;
        together = x.neighbours(tile_depth / place);
    } else if (step * static_cast<Index>(sizeof(Number)) % together_bytes == 0) {
        place += tile_depth;
    }
    const Meeting meeting(y, x, s.batch, s.groups, place * static_cast<Index>(sizeof(Number)), part_bytes, 2 * threads);
    run({meeting, Reader(from, s.dtype), to, weight, values, place, together, step / tile_depth}, s.dtype, kind,
        threads, finish);
}

// How the weight's gradient is cut, in tiles: rows are channels of the plain map, columns those of the other. What is
// added up together stays in the cache, and of either map the channels that it takes are copied.
struct GradientCut {
    Index row_tiles, column_tiles;
    Index rows, columns;  // of a piece
    Index row_splits, column_splits;

    GradientCut(Index row_tiles, Index column_tiles, Index taps) : row_tiles(row_tiles), column_tiles(column_tiles) {
        const Index pieces = ceiling(row_tiles * column_tiles * taps * tile_words * 4, gradient_bytes);
        cut(column_tiles, pieces, columns, column_splits);
        cut(row_tiles, ceiling(pieces, column_splits), rows, row_splits);
    }
    Index pieces() const { return row_splits * column_splits; }
    Index tile(Index tap, Index row) const { return (tap * row_tiles + row) * column_tiles * tile_words; }

  private:
    static void cut(Index tiles, Index splits, Index& piece, Index& count) {
        piece = multiple(ceiling(tiles, clamped(splits, 1, ceiling(tiles, piece_tiles_least))), 2);
        count = ceiling(tiles, piece);
    }
};

struct GradientPass {
    const Meeting& meeting;
    const GradientCut& cut;
    Reader plain, looked;

    // A column's pairs of pixels at even places lie together, and those at odd places: a tile's rows follow each other.
    Index half_words() const { return ceiling(meeting.most_places() + 1, 2) * tile_side; }
    Index column_words() const { return meeting.planes() * 2 * half_words(); }
    Index word_count() const { return smaller(cut.columns, cut.column_tiles) * column_words(); }
    // Of place p of a plane.
    Index pair(Index plane, Index p) const { return (2 * plane + p % 2) * half_words() + p / 2 * tile_side; }
};

// Pixels of rows [first, last) of tiles of the plain map's channels, at `length` places, turned: [row][k], tiles.
void turn_plain(const GradientPass& pass, Index part, Index length, Index first, Index last, Number* pixels,
                float* turned) {
    const Meeting& m = pass.meeting;
    const Index depth = ceiling(length, tile_depth), channel = first * tile_side;
    const Index channels = smaller(last * tile_side, pass.plain.source.channels) - channel;
    const Index step = multiple(channels, tile_depth);
    for (Index k = 0; k < depth; ++k) {
        zero_numbers(pixels, tile_depth * step);
        m.each_run(part, 0, 0, k * tile_depth, smaller(length, (k + 1) * tile_depth),
                   [&](Index image, Index row, Index column, Index place, Index count) {
                       pass.plain(image, row, column, 1, count, channel, channels,
                                  pixels + (place - k * tile_depth) * step, step);
                   });
        for (Index row = first; row < last; ++row) {
            Vector pairs[lanes];
            const Number* pixel = pixels + (row - first) * tile_side;
            for (Vector& pair : pairs) {
                const VectorBits bits = load_halves(pixel) | load_halves(pixel + step) << 16;
                std::memcpy(&pair, &bits, sizeof pair);
                pixel += 2 * step;
            }
            transpose(pairs);
            float* to = turned + ((row - first) * depth + k) * tile_words;
            for (const Vector& pair : pairs) store_vector(to, pair), to += lanes;
        }
    }
}

// Pairs of `count` pixels of a tile's channels, each beside the next one, in turn to one array and the other.
void pair_pixels(const Number* pixel, Index step, Index count, float* words, float* others) {
    VectorBits before = load_halves(pixel);
    for (Index i = 0; i < count; ++i) {
        pixel += step;
        const VectorBits after = load_halves(pixel), bits = before | (after << 16);
        std::memcpy(words, &bits, sizeof bits);
        before = after;
        float* const next = others;
        others = words + tile_side, words = next;
    }
}

// Columns [first, last) of tiles of the looked-at map's planes in pairs of pixels, that of place p at place p + 1.
// `pixels` has room for a row, and one pixel more.
void pair_looked(const GradientPass& pass, Index part, Index first, Index last, Number* pixels, float* words) {
    const Meeting& m = pass.meeting;
    const Index channel = first * tile_side;
    const Index channels = smaller(last * tile_side, pass.looked.source.channels) - channel;
    const Index step = multiple(channels, tile_depth), pitch = m.x.pitch;
    const Index places = m.places(m.rows(part)) + 1;
    for (Index plane = 0; plane < m.planes(); ++plane) {
        Index place = 0;
        // Before a row's own pixels lies the last one of the row before: the first pair is of both.
        const auto pair = [&](Index count) {
            for (Index tile = 0; tile < last - first; ++tile) {
                float* const to = words + tile * pass.column_words();
                pair_pixels(pixels + tile * tile_side, step, count, to + pass.pair(plane, place),
                            to + pass.pair(plane, place + 1));
            }
            __builtin_memcpy(pixels, pixels + count * step, static_cast<std::size_t>(step) * sizeof(Number));
            place += count;
        };
        const auto pair_zeros = [&](Index count) {
            zero_numbers(pixels + step, count * step);
            pair(count);
        };
        zero_numbers(pixels, step);
        if (m.x.lead > 0) pair_zeros(m.x.lead);
        copy_plane(
            m, pass.looked, part, plane, channel, channels, step, [&] { return pixels + step; }, [&] { pair(pitch); });
        while (place < places) pair_zeros(smaller(pitch, places - place));
    }
}

// Adds to rows and columns of tiles what they are for a part; `begins`: the sums are the first.
void add_gradient(const GradientPass& pass, Index part, Span all_rows, Span all_columns, bool begins, const Tap* taps,
                  const float* words, const float* turned, float* gradient) {
    constexpr Index tile_bytes = pair_bytes / 2;
    const Meeting& m = pass.meeting;
    const Index depth = ceiling(m.length(part, 0, 0), tile_depth), next_row = pass.cut.column_tiles * tile_words;
    // Taps of one row of the kernel read the same lines: they take turns at a few pixels.
    const Index turn = m.x.size > 1 ? turn_tiles : depth;
    const Index steps = ceiling(all_rows.last - all_rows.first, 2) * ceiling(all_columns.last - all_columns.first, 2) *
                        m.tap_count() * depth;
    Ahead looked(pass.looked, m.read_first(part), m.read_last(part), steps);
    Ahead plain(pass.plain, m.first(part), m.last(part), steps);
    const auto add = [&]<int rows, int columns>(Index row, Index column) {
        const char* const left = reinterpret_cast<const char*>(turned + (row - all_rows.first) * depth * tile_words);
        for (Index begin = 0; begin < m.tap_count(); begin += m.x.size)
            for (Index k = 0; k < depth; k += turn)
                for (Index tap = begin; tap < begin + m.x.size; ++tap) {
                    float* const sums = gradient + pass.cut.tile(tap, row) + column * tile_words;
                    const auto at = [&](int i, int j) { return sums + i * next_row + j * tile_words; };
                    each_sum<rows, columns>([&]<int tile>(int i, int j) {
                        k == 0 && begins ? zero_tile<tile>() : load_tile<tile>(at(i, j), 64);
                    });
                    const float* const right = words + (column - all_columns.first) * pass.column_words() +
                                               pass.pair(taps[tap].plane, taps[tap].place + 1 + k * tile_depth);
                    add_tile_products<rows, columns>(left + k * tile_bytes, 64, depth * tile_bytes, tile_bytes,
                                                     reinterpret_cast<const char*>(right), 64, pass.column_words() * 4,
                                                     tile_bytes, smaller(turn, depth - k), [&] {
                                                         looked.fetch();
                                                         plain.fetch();
                                                     });
                    each_sum<rows, columns>([&]<int tile>(int i, int j) { store_tile<tile>(at(i, j), 64); });
                }
    };
    for (Index column = all_columns.first; column < all_columns.last; column += 2)
        for (Index row = all_rows.first; row < all_rows.last; row += 2) {
            const bool two_rows = row + 1 < all_rows.last, two_columns = column + 1 < all_columns.last;
            if (two_rows && two_columns) add.template operator()<2, 2>(row, column);
            if (two_rows && !two_columns) add.template operator()<2, 1>(row, column);
            if (!two_rows && two_columns) add.template operator()<1, 2>(row, column);
            if (!two_rows && !two_columns) add.template operator()<1, 1>(row, column);
        }
}

// A tile of a tap's gradient: the shares' sums, in order, each number where the weight has it.
void join_shares(const Taps& w, float* tap, Index row, Index column, const float* gradient, Index shares,
                 Index share_words) {
    TapBlock sums[1];
    for (Index i = 0; i < lanes; ++i, gradient += lanes) {
        sums[0][i] = load_vector(gradient);
        for (Index share = 1; share < shares; ++share) sums[0][i] += load_vector(gradient + share * share_words);
    }
    store_taps<1>(w, tap + row * w.k + column * w.n, smaller(lanes, w.channels - row),
                  smaller(lanes, w.columns - column), sums);
}

// Shares of the parts, so that with the pieces of the gradient threads have the same to do.
Index shares_of(Index pieces, Index parts, Index threads) {
    Index shares = 1;
    while (pieces * shares % threads != 0 && pieces * shares < 4 * threads && shares < smaller(parts, threads))
        ++shares;
    return shares;
}

void weight_gradient(const GradientPass& pass, const Taps& w, float* grad_weight, int threads) {
    const Meeting& m = pass.meeting;
    const GradientCut& cut = pass.cut;
    const Index gradient_words = cut.tile(m.tap_count(), 0), shares = shares_of(cut.pieces(), m.count, threads);

    const Index most_depth = ceiling(m.most_places(), tile_depth);
    const std::size_t word_bytes = floats(pass.word_count());
    const std::size_t turned_bytes = floats(cut.rows * most_depth * tile_words);
    const std::size_t pixel_bytes =
        floats(larger(tile_depth * cut.rows, (m.x.pitch + 1) * cut.columns) * tile_side / 2);
    const std::size_t all_bytes = floats(shares * gradient_words);
    const std::size_t tap_bytes = Workspace::padded(static_cast<std::size_t>(m.tap_count()) * sizeof(Tap));
    Workspace workspace(all_bytes + tap_bytes);
    const ThreadWorkspaces scratch(word_bytes + turned_bytes + pixel_bytes, threads);
    float* const gradient = static_cast<float*>(workspace.take(all_bytes));
    Tap* const taps = static_cast<Tap*>(workspace.take(tap_bytes));
    m.taps_of(0, 0, w.row, w.column, 1, taps);

#pragma omp parallel num_threads(threads)
    {
        char* const mine = scratch.of(omp_get_thread_num());
        float* const words = reinterpret_cast<float*>(mine);
        float* const turned = reinterpret_cast<float*>(mine + word_bytes);
        Number* const pixels = reinterpret_cast<Number*>(mine + word_bytes + turned_bytes);
        const Tiles tiles(tile_depth);
#pragma omp for schedule(static)
        for (Index item = 0; item < shares * cut.pieces(); ++item) {
            const Index share = item / cut.pieces(), piece = item % cut.pieces();
            const Index row = piece / cut.column_splits * cut.rows, column = piece % cut.column_splits * cut.columns;
            const Span rows{row, smaller(row + cut.rows, cut.row_tiles)};
            const Span columns{column, smaller(column + cut.columns, cut.column_tiles)};
            const Index begin = m.count * share / shares, end = m.count * (share + 1) / shares;
            for (Index part = begin; part < end; ++part) {
                pair_looked(pass, part, columns.first, columns.last, pixels, words);
                turn_plain(pass, part, m.length(part, 0, 0), rows.first, rows.last, pixels, turned);
                add_gradient(pass, part, rows, columns, part == begin, taps, words, turned,
                             gradient + share * gradient_words);
            }
        }
        const Index grid = cut.row_tiles * cut.column_tiles;
#pragma omp for schedule(static)
        for (Index item = 0; item < m.tap_count() * grid; ++item)
            join_shares(w, grad_weight + taps[item / grid].offset, item % grid / cut.column_tiles * tile_side,
                        item % cut.column_tiles * tile_side, gradient + item * tile_words, shares, gradient_words);
    }
}

}  // namespace

void amx_forward(const ConvolutionForward& args, int threads) {
    const ConvolutionShape& s = args.shape;
    const ConvolutionWeight& w = args.weight;
    run(s, input_of(args), destination_of(args), !s.transposed,
        {s.in_channels, s.out_channels, w.in, w.out, w.row, w.column}, w.values,
        output_of(args.statistics, args.activation), threads, finish_of(args));
}

void amx_backward_input(const ConvolutionBackwardInput& args, int threads) {
    const ConvolutionShape& s = args.shape;
    const ConvolutionWeight& w = args.weight;
    run(s, grad_output_of(args), destination_of(args), s.transposed,
        {s.out_channels, s.in_channels, w.out, w.in, w.row, w.column}, w.values, output_of(args), threads,
        finish_of(args));
}

void amx_backward_weight(const ConvolutionBackwardWeight& args, int threads) {
    const ConvolutionShape& s = args.shape;
    const ConvolutionWeight& w = args.layout;
    const Source input = input_of(args), grad_output = grad_output_of(args);
    const Source& plain = s.transposed ? input : grad_output;
    const Source& looked = s.transposed ? grad_output : input;
    const GradientCut cut(ceiling(plain.channels, tile_side), ceiling(looked.channels, tile_side),
                          s.rows.size * s.columns.size);
    const Meeting meeting(Axis(s.rows, true, looked.height, plain.height),
                          Axis(s.columns, true, looked.width, plain.width), s.batch, s.groups,
                          (4 * cut.columns + 2 * cut.rows) * tile_side, gradient_part_bytes, threads);
    weight_gradient(
        {meeting, cut, Reader(plain, s.dtype), Reader(looked, s.dtype)},
        {plain.channels, looked.channels, s.transposed ? w.in : w.out, s.transposed ? w.out : w.in, w.row, w.column},
        args.grad_weight, threads);
}

}  // namespace ganvas::cpu::avx512
