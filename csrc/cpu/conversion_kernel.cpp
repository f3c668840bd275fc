// Compiled once per instruction set.
#include "conversion.h"
#include "vector.h"

namespace ganvas::cpu::GANVAS_ISA {
namespace {

constexpr Index block = 64 * lanes;

template <class From, class To>
void convert_all(const Conversion& of, int threads) {
    const From* const from = static_cast<const From*>(of.from);
    To* const to = static_cast<To*>(of.to);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (Index first = 0; first < of.count; first += block)
        for (Index i = first; i < smaller(of.count, first + block); i += lanes)
            store_lanes(to + i, load_lanes(from + i, of.count - i), of.count - i);
}

}  // namespace

void convert(const Conversion& of, Dtype to, int threads) {
    to == Dtype::float32 ? convert_all<bfloat16, float>(of, threads) : convert_all<float, bfloat16>(of, threads);
}

}  // namespace ganvas::cpu::GANVAS_ISA
