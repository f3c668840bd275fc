// The part that is compiled once: the choice of instruction set.
#include "conversion.h"

#include "parallel.h"

namespace ganvas::cpu {
namespace {

void convert(const Conversion& of, Dtype to, int threads) {
    GANVAS_DISPATCH(convert(of, to, threads))
}

}  // namespace

void convert(const std::vector<Conversion>& conversions, Dtype to, int threads) {
    for (const Conversion& of : conversions) {
        const std::int64_t bytes = of.count * (element_bytes(Dtype::float32) + element_bytes(Dtype::bfloat16));
        convert(of, to, team_size(bytes, threads));
    }
}

}  // namespace ganvas::cpu
