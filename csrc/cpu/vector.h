// Vectors as wide as the target's registers, written once for every instruction set. Included by kernel sources only.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"
#include "statistics.h"
#include "storage.h"

namespace ganvas::cpu::GANVAS_ISA {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float Vector __attribute__((vector_size(lanes * 4)));
typedef std::uint32_t VectorBits __attribute__((vector_size(lanes * 4)));
typedef std::int32_t VectorInts __attribute__((vector_size(lanes * 4)));
typedef std::uint16_t VectorHalves __attribute__((vector_size(lanes * 2)));
typedef std::uint8_t VectorBytes __attribute__((vector_size(lanes)));

// `count` numbers fill vectors of so many.
constexpr Index whole_vectors(Index count) {
    return ceiling(count, lanes) * lanes;
}

inline Vector broadcast(float value) {
    return value - Vector{};
}

inline Vector load_vector(const float* source) {
    Vector result;
    std::memcpy(&result, source, sizeof result);
    return result;
}

// Numbers of 16 or 8 bits, one in each word's lowest bits. By intrinsics: __builtin_convertvector takes five and thirty
// instructions where there is one (GCC 12), and the ones without a mask warn of what they leave undefined.
inline VectorBits widened(VectorHalves halves) {
#if defined(__AVX512F__)
    return reinterpret_cast<VectorBits>(_mm512_maskz_cvtepu16_epi32(0xFFFF, reinterpret_cast<__m256i>(halves)));
#elif defined(__AVX2__)
    return reinterpret_cast<VectorBits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(halves)));
#else
    return __builtin_convertvector(halves, VectorBits);
#endif
}

inline VectorBits widened(VectorBytes bytes) {
#if defined(__AVX512F__)
    return reinterpret_cast<VectorBits>(_mm512_maskz_cvtepu8_epi32(0xFFFF, reinterpret_cast<__m128i>(bytes)));
#elif defined(__AVX2__)
    __m128i wide{};
    std::memcpy(&wide, &bytes, sizeof bytes);
    return reinterpret_cast<VectorBits>(_mm256_cvtepu8_epi32(wide));
#else
    return __builtin_convertvector(bytes, VectorBits);
#endif
}

inline VectorBits load_halves(const void* source) {
    VectorHalves halves;
    std::memcpy(&halves, source, sizeof halves);
    return widened(halves);
}

inline Vector load_vector(const bfloat16* source) {
    const VectorBits bits = load_halves(source) << 16;
    Vector result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void store_vector(float* destination, Vector value) {
    std::memcpy(destination, &value, sizeof value);
}

#if defined(__AVX512F__)
// The nearest bfloat16. Only where processor_rounds_to_bfloat16.
inline VectorHalves nearest_bfloat16(Vector value) {
    VectorHalves halves;
    asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(value));
    return halves;
}
#endif

// Rounds as store(bfloat16*) does, but that the instruction takes numbers below the least normal one as zeros.
inline void store_vector(bfloat16* destination, Vector value) {
#if defined(__AVX512F__)
    if (processor_rounds_to_bfloat16) {
        const VectorHalves halves = nearest_bfloat16(value);
        std::memcpy(destination, &halves, sizeof halves);
        return;
    }
#endif
    VectorBits bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    bits = value != value ? VectorBits{} + 0x7FC0u : bits;
    const VectorHalves halves = __builtin_convertvector(bits, VectorHalves);
    std::memcpy(destination, &halves, sizeof halves);
}

// Vectors of float are whole cache lines, which can be written past the cache.
constexpr bool vector_is_line = lanes * sizeof(float) == 64;

// To a line's first byte. Other threads may read it after a stream_fence().
inline void stream_vector(float* destination, Vector value) {
#if defined(__AVX512F__)
    _mm512_stream_ps(destination, reinterpret_cast<__m512>(value));
#else
    store_vector(destination, value);
#endif
}

// Vectors of bfloat16 are half lines, which two of them can fill.
inline bool two_vectors_are_line() {
    return lanes * sizeof(bfloat16) == 32 && processor_rounds_to_bfloat16;
}

// To a line's first byte or its middle. The lower half waits in `lower` for the upper one. Only where
// two_vectors_are_line().
inline void stream_half(bfloat16* destination, Vector value, VectorHalves& lower) {
#if defined(__AVX512F__)
    const VectorHalves halves = nearest_bfloat16(value);
    if (reinterpret_cast<std::uintptr_t>(destination) % 64 == 0) {
        lower = halves;
    } else {
        const VectorHalves both[2] = {lower, halves};
        __m512i line;
        std::memcpy(&line, both, sizeof line);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(destination - lanes), line);
    }
#else
    static_cast<void>(lower);
    store_vector(destination, value);
#endif
}

#if defined(__AVX512F__)
// sum + a·b of the pairs of 16-bit integers in each word. Only where has_int16_products().
inline void add_int16_products(VectorInts& sum, VectorInts a, VectorInts b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

// sum + a·b of the pairs of bfloat16 numbers in each word. Only where has_bfloat16_products().
inline void add_bfloat16_products(Vector& sum, VectorInts a, VectorInts b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
#endif

// A hint: the address need not exist. To the first level of the cache, or (2) to the second.
template <int locality = 3, class T>
inline void prefetch(const T* address) {
    __builtin_prefetch(address, 0, locality);
}

// The first `count` lanes; zero in the others, whose memory is not touched.
template <class T>
inline Vector load_lanes(const T* source, Index count) {
    if (count >= lanes) return load_vector(source);
    Vector result{};
    for (Index lane = 0; lane < count; ++lane) result[lane] = load(source[lane]);
    return result;
}

template <class T>
inline void store_lanes(T* destination, Vector value, Index count) {
    if (count >= lanes) return store_vector(destination, value);
    for (Index lane = 0; lane < count; ++lane) store(destination + lane, value[lane]);
}

#if defined(__AVX512F__)
inline __mmask16 first_lanes(Index count) {
    return static_cast<__mmask16>((1u << count) - 1u);
}
inline Vector load_lanes(const float* source, Index count) {
    if (count >= lanes) return load_vector(source);
    return reinterpret_cast<Vector>(_mm512_maskz_loadu_ps(first_lanes(count), source));
}
inline Vector load_lanes(const bfloat16* source, Index count) {
    if (count >= lanes) return load_vector(source);
    bfloat16 values[lanes];
    const __m256i halves = _mm256_maskz_loadu_epi16(first_lanes(count), source);
    std::memcpy(values, &halves, sizeof halves);
    return load_vector(values);
}
inline void store_lanes(float* destination, Vector value, Index count) {
    if (count >= lanes) return store_vector(destination, value);
    _mm512_mask_storeu_ps(destination, first_lanes(count), reinterpret_cast<__m512>(value));
}
inline void store_lanes(bfloat16* destination, Vector value, Index count) {
    if (count >= lanes) return store_vector(destination, value);
    bfloat16 values[lanes];
    store_vector(values, value);
    __m256i halves;
    std::memcpy(&halves, values, sizeof halves);
    _mm256_mask_storeu_epi16(destination, first_lanes(count), halves);
}
#endif

// rows[i][j] and rows[j][i] change places: blocks of 1×1, then of 2×2, 4×4, ... off the diagonal.
[[gnu::always_inline]] inline void transpose(Vector (&rows)[lanes]) {
#pragma GCC unroll 4
    for (int size = 1; size < lanes; size *= 2) {
        VectorBits upper{}, lower{};
#pragma GCC unroll 16
        for (int lane = 0; lane < lanes; ++lane) {
            upper[lane] = static_cast<std::uint32_t>(lane & size ? lanes + lane - size : lane);
            lower[lane] = static_cast<std::uint32_t>(lane & size ? lanes + lane : lane + size);
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
            if (i & size) continue;
            const Vector above = rows[i], below = rows[i + size];
            rows[i] = __builtin_shuffle(above, below, upper);
            rows[i + size] = __builtin_shuffle(above, below, lower);
        }
    }
}

inline bool has_nan(Vector values) {
#if defined(__AVX512F__)
    const auto own = reinterpret_cast<__m512>(values);
    return _mm512_cmp_ps_mask(own, own, _CMP_UNORD_Q) != 0;
#elif defined(__AVX__)
    const auto own = reinterpret_cast<__m256>(values);
    return _mm256_movemask_ps(_mm256_cmp_ps(own, own, _CMP_UNORD_Q)) != 0;
#else
    bool found = false;
    for (int lane = 0; lane < lanes; ++lane) found |= values[lane] != values[lane];
    return found;
#endif
}

inline Vector leaky_relu(Vector x, Leaky leaky) {
    const Vector bounded = x < leaky.lowest ? broadcast(leaky.lowest) : x;
    return x > 0.0f ? x : bounded * leaky.slope;
}

// What a pending activation stands for (PendingActivation in convolution.h).
template <bool activation_first>
[[gnu::always_inline]] inline Vector pending_activation(Vector y, Vector scale, Vector shift, Leaky leaky) {
    return activation_first ? scale * leaky_relu(y, leaky) + shift : leaky_relu(scale * y + shift, leaky);
}

inline Vector leaky_relu_grad(Vector incoming, Vector x, Leaky leaky) {
    return x > 0.0f ? incoming : incoming * leaky.slope;
}

}  // namespace ganvas::cpu::GANVAS_ISA
