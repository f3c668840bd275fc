// Compiled once per instruction set.
#include <omp.h>

#include "channel_sums.h"
#include "statistics.h"
#include "storage.h"

namespace ganvas::cpu::GANVAS_ISA {
namespace {

constexpr Index block_rows = 64;  // whose sums are added up in float32
constexpr Index part_width = 64;  // numbers of a row at a time

// sums[c] += Σ over rows, `width` numbers each.
template <class T>
void add_rows(const T* __restrict values, Index rows, Index width, double* __restrict sums) {
    for (Index first = 0; first < rows; first += block_rows)
        for (Index begin = 0; begin < width; begin += part_width) {
            const Index count = smaller(part_width, width - begin);
            float of_block[part_width] = {};
            for (Index row = first; row < smaller(first + block_rows, rows); ++row) {
                const T* __restrict p = values + row * width + begin;
                for (Index c = 0; c < count; ++c) of_block[c] += load(p[c]);
            }
            for (Index c = 0; c < count; ++c) sums[begin + c] += static_cast<double>(of_block[c]);
        }
}

template <class T>
void run(const ChannelSums& args, Index pack, int threads, double* sums) {
    const T* const values = static_cast<const T*>(args.values);
    const Index width = pack * args.channels, packs = args.rows / pack;
    for (Index i = 0; i < threads * width; ++i) sums[i] = 0;
    Index team = 1;
#pragma omp parallel num_threads(threads)
    {
        const Index thread = omp_get_thread_num(), count = omp_get_num_threads();
        const Index begin = packs * thread / count, end = packs * (thread + 1) / count;
        double* const own = sums + thread * width;
        add_rows(values + begin * width, end - begin, width, own);
        if (thread + 1 == count) {  // and the rows that fill no pack
            add_rows(values + packs * width, args.rows - packs * pack, args.channels, own);
            team = count;
        }
    }
    for (Index c = 0; c < args.channels; ++c) {
        double sum = 0;
        for (Index i = c; i < team * width; i += args.channels) sum += sums[i];
        args.sums[c] = static_cast<float>(sum);
    }
}

}  // namespace

void channel_sums(const ChannelSums& args, std::int64_t pack, int threads, double* sums) {
    args.dtype == Dtype::float32 ? run<float>(args, pack, threads, sums) : run<bfloat16>(args, pack, threads, sums);
}

}  // namespace ganvas::cpu::GANVAS_ISA
