#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ganvas::cpu {
namespace {

#if defined(__x86_64__)
// Tiles have to be asked for, once for all threads of a process: Linux makes room for them where it saves registers.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

// AMX-TILE and AMX-BF16, for which not every compiler has names.
bool has_tile_instructions() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 22 & 1) != 0 && (d >> 24 & 1) != 0;
}
#endif

Isa best_of_processor() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512bf16") && has_tile_instructions() && may_use_tiles() ? Isa::amx
                                                                                                  : Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::portable;
}

Isa decide() {
    const Isa best = best_of_processor();
    const char* asked = std::getenv("GANVAS_CPU_ISA");
    if (asked == nullptr || *asked == '\0') return best;
    for (Isa cap : {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx})
        if (std::string(asked) == isa_name(cap)) return cap < best ? cap : best;
    throw std::invalid_argument("GANVAS_CPU_ISA must be portable, avx2, avx512 or amx; got '" + std::string(asked) +
                                "'");
}

}  // namespace

Isa selected_isa() {
    static const Isa isa = decide();
    return isa;
}

bool has_int16_products() {
#if defined(__x86_64__)
    static const bool has = selected_isa() >= Isa::avx512 && __builtin_cpu_supports("avx512vnni");
    return has;
#else
    return false;
#endif
}

bool has_bfloat16_products() {
#if defined(__x86_64__)
    static const bool has = selected_isa() >= Isa::avx512 && __builtin_cpu_supports("avx512bf16");
    return has;
#else
    return false;
#endif
}

bool has_bfloat16_tiles() {
    return selected_isa() == Isa::amx;
}

bool splits_wide_vectors() {
#if defined(__x86_64__)
    static const bool splits = [] {
        unsigned a, b, c, d;
        constexpr unsigned performance = 0x8000001A, half = 1u << 2, whole = 1u << 3;  // of AMD: FP256 and FP512
        return __get_cpuid(performance, &a, &b, &c, &d) != 0 && (a & (half | whole)) == half;
    }();
    return splits;
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
    switch (isa) {
        case Isa::amx:
            return "amx";
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        default:
            return "portable";
    }
}

}  // namespace ganvas::cpu
