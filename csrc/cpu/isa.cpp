#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ganvas::cpu {
namespace {

Isa best_of_processor() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::portable;
}

Isa decide() {
    const Isa best = best_of_processor();
    const char* asked = std::getenv("GANVAS_CPU_ISA");
    if (asked == nullptr || *asked == '\0') return best;
    for (Isa cap : {Isa::portable, Isa::avx2, Isa::avx512})
        if (std::string(asked) == isa_name(cap)) return cap < best ? cap : best;
    throw std::invalid_argument("GANVAS_CPU_ISA must be portable, avx2 or avx512; got '" + std::string(asked) + "'");
}

}  // namespace

Isa selected_isa() {
    static const Isa isa = decide();
    return isa;
}

bool has_int16_products() {
#if defined(__x86_64__)
    static const bool has = selected_isa() == Isa::avx512 && __builtin_cpu_supports("avx512vnni");
    return has;
#else
    return false;
#endif
}

bool has_bfloat16_products() {
#if defined(__x86_64__)
    static const bool has = selected_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
    return has;
#else
    return false;
#endif
}

const bool processor_rounds_to_bfloat16 = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return false;
#endif
}();

const char* isa_name(Isa isa) {
    return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

}  // namespace ganvas::cpu
