// Element types as they lie in memory, 16 bytes at a time; arithmetic is float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "channels.h"

namespace ganvas::cuda {

__device__ inline float load(const float* source) {
    return *source;
}
__device__ inline float load(const __nv_bfloat16* source) {
    return __bfloat162float(*source);
}
__device__ inline float load(const __half* source) {
    return __half2float(*source);
}

__device__ inline void store(float* destination, float value) {
    *destination = value;
}
__device__ inline void store(__nv_bfloat16* destination, float value) {
    *destination = __float2bfloat16_rn(value);
}
__device__ inline void store(__half* destination, float value) {
    *destination = __float2half_rn(value);
}

__device__ inline float from_bits(unsigned bits, __nv_bfloat16) {
    return __uint_as_float(bits << 16);
}
__device__ inline float from_bits(unsigned bits, __half) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
__device__ inline unsigned to_bits(float value, __nv_bfloat16) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
__device__ inline unsigned to_bits(float value, __half) {
    return __half_as_ushort(__float2half_rn(value));
}

template <class T>
struct Vector {
    static constexpr int lanes = vector_bytes / static_cast<int>(sizeof(T));
    unsigned word[4];

    __device__ float operator[](int lane) const {
        if constexpr (sizeof(T) == 4)
            return __uint_as_float(word[lane]);
        else
            return from_bits(word[lane / 2] >> lane % 2 * 16 & 0xFFFFu, T{});
    }
    __device__ void set(const float (&values)[lanes]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(T) == 4)
                word[i] = __float_as_uint(values[i]);
            else
                word[i] = to_bits(values[2 * i], T{}) | to_bits(values[2 * i + 1], T{}) << 16;
        }
    }
};

template <class T>
__device__ Vector<T> load_vector(const T* source) {
    const uint4 words = *reinterpret_cast<const uint4*>(source);
    return {{words.x, words.y, words.z, words.w}};
}

template <class T>
__device__ void store_vector(T* destination, const Vector<T>& vector) {
    *reinterpret_cast<uint4*>(destination) = make_uint4(vector.word[0], vector.word[1], vector.word[2], vector.word[3]);
}

// The first `count` lanes, `access` bytes at a time; the others are 0.
template <class T>
__device__ Vector<T> load_part(const T* source, int count, int access) {
    if (access == vector_bytes) return load_vector(source);
    const int bytes = count * static_cast<int>(sizeof(T));
    Vector<T> vector{};
    if (access == 8) {
        const uint2* const from = reinterpret_cast<const uint2*>(source);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint2 words = i * 8 < bytes ? from[i] : make_uint2(0, 0);
            vector.word[2 * i] = words.x, vector.word[2 * i + 1] = words.y;
        }
    } else if (access == 4) {
        const unsigned* const from = reinterpret_cast<const unsigned*>(source);
#pragma unroll
        for (int i = 0; i < 4; ++i) vector.word[i] = i * 4 < bytes ? from[i] : 0;
    } else {
        const unsigned short* const from = reinterpret_cast<const unsigned short*>(source);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i * 2 < bytes) vector.word[i / 2] |= static_cast<unsigned>(from[i]) << i % 2 * 16;
    }
    return vector;
}

template <class T>
__device__ void store_part(T* destination, const Vector<T>& vector, int count, int access) {
    if (access == vector_bytes) return store_vector(destination, vector);
    const int bytes = count * static_cast<int>(sizeof(T));
    if (access == 8) {
        uint2* const to = reinterpret_cast<uint2*>(destination);
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (i * 8 < bytes) to[i] = make_uint2(vector.word[2 * i], vector.word[2 * i + 1]);
    } else if (access == 4) {
        unsigned* const to = reinterpret_cast<unsigned*>(destination);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i * 4 < bytes) to[i] = vector.word[i];
    } else {
        unsigned short* const to = reinterpret_cast<unsigned short*>(destination);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i * 2 < bytes) to[i] = static_cast<unsigned short>(vector.word[i / 2] >> i % 2 * 16);
    }
}

}  // namespace ganvas::cuda
