// Which instruction set the kernels use: the best that this processor and this build have, or less if the caller asks.
#pragma once

namespace ganvas::cpu {

// From the least to the most. `amx` has the kernels of avx512, and those of tiles (amx_kernel.cpp) beside them.
enum class Isa { portable, avx2, avx512, amx };

// Decided once per process. The environment variable GANVAS_CPU_ISA=portable|avx2|avx512|amx caps it; any other
// value throws.
Isa selected_isa();

const char* isa_name(Isa isa);

// Whether one instruction adds products of 16-bit pairs to 32-bit sums in registers of 512 bits (AVX512-VNNI).
bool has_int16_products();

// Whether one adds products of bfloat16 pairs to float32 sums (AVX512-BF16).
bool has_bfloat16_products();

// Whether one adds products of 16×16 tiles of them (AMX), and the system lets this process use those.
bool has_bfloat16_tiles();

// Whether the processor does instructions of 512 bits in two halves (Zen 4): those that do more at once pay sooner.
bool splits_wide_vectors();

// Whether the processor rounds to bfloat16 in one instruction (AVX512-BF16 too). Of interest to AVX-512 kernels only; a
// constant, for their inner loops.
extern const bool processor_rounds_to_bfloat16;

}  // namespace ganvas::cpu

// Kernel sources are compiled once per instruction set, each time into a namespace of its own (GANVAS_ISA names it).
// They must not instantiate templates of the standard library: the linker keeps one copy of those, maybe the AVX-512
// one.
#if defined(__x86_64__)
#define GANVAS_FOR_EACH_ISA(DECLARE) DECLARE(portable) DECLARE(avx2) DECLARE(avx512)
#define GANVAS_DISPATCH(CALL)      \
    switch (selected_isa()) {      \
        case Isa::amx:             \
        case Isa::avx512:          \
            return avx512::CALL;   \
        case Isa::avx2:            \
            return avx2::CALL;     \
        default:                   \
            return portable::CALL; \
    }
#else
#define GANVAS_FOR_EACH_ISA(DECLARE) DECLARE(portable)
#define GANVAS_DISPATCH(CALL) return portable::CALL;
#endif
