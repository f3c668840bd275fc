// Element types as they lie in memory; arithmetic is float32. Included by kernel sources only, hence the namespace.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ganvas::cpu::GANVAS_ISA {

struct bfloat16 {
    std::uint16_t bits;
};

inline float load(float value) {
    return value;
}

inline float load(bfloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void store(float* destination, float value) {
    *destination = value;
}

// Rounds to nearest, ties to even; every NaN becomes 0x7FC0, as in torch.
inline void store(bfloat16* destination, float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    destination->bits = static_cast<std::uint16_t>(value != value ? 0x7FC0u : rounded);
}

// Copies past the cache: a store of a line that is not cached would first read it from memory, a third of the traffic.
inline void stream(void* destination, const void* source, std::int64_t bytes) {
    char* to = static_cast<char*>(destination);
    const char* from = static_cast<const char*>(source);
#if defined(__AVX512F__)
    constexpr std::int64_t line = 64;
#elif defined(__AVX__)
    constexpr std::int64_t line = 32;
#else
    constexpr std::int64_t line = 16;
#endif
#if defined(__x86_64__)
    const std::int64_t misaligned = -reinterpret_cast<std::intptr_t>(to) & (line - 1);
    const std::int64_t head = misaligned < bytes ? misaligned : bytes;
    std::memcpy(to, from, static_cast<std::size_t>(head));
    std::int64_t i = head;
    for (; i + line <= bytes; i += line) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX__)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
    }
    std::memcpy(to + i, from + i, static_cast<std::size_t>(bytes - i));
#else
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
#endif
}

// Streamed stores are weakly ordered: what other threads read next must wait for them.
inline void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace ganvas::cpu::GANVAS_ISA
