// The one-dimensional transforms of F(4, 3) and F(4, 2): four outputs of a kernel of three or two taps. A 2-D transform
// is one along each axis. Included by kernel sources only.
//
// F(4, 3) has the interpolation points 0, ±√½, ±√2 and ∞, half the rounding error of the usual 0, ±1, ±2 and ∞. F(4, 2)
// has ±1, ±½ and ∞, three quarters of the error of 0, ±1, 2 and ∞; 0, −1, ½, 2 and ∞ are as good, but have no symmetry.
#pragma once

#include "vector.h"

namespace ganvas::cpu::GANVAS_ISA {

constexpr int tile = 4;  // outputs of a tile along one axis
template <int taps>
constexpr int points_of = tile + taps - 1;  // inputs of a tile along one axis, and products

constexpr float half_root = 0.70710678118654752f;  // √½
constexpr float root = 1.41421356237309505f;       // √2

// Bᵀ: inputs to the products' left factors.
[[gnu::always_inline]] inline void transform_input(const Vector (&d)[6], Vector (&v)[6]) {
    const Vector even_half = d[4] - 2.0f * d[2], odd_half = half_root * (d[3] - 2.0f * d[1]);
    const Vector even_two = d[4] - 0.5f * d[2], odd_two = root * (d[3] - 0.5f * d[1]);
    v[0] = d[0] - 2.5f * d[2] + d[4];
    v[1] = even_half + odd_half;
    v[2] = even_half - odd_half;
    v[3] = even_two + odd_two;
    v[4] = even_two - odd_two;
    v[5] = d[1] - 2.5f * d[3] + d[5];
}

[[gnu::always_inline]] inline void transform_input(const Vector (&d)[5], Vector (&v)[5]) {
    const Vector odd_one = d[3] - 0.25f * d[1], even_one = d[2] - 0.25f * d[0];
    const Vector odd_half = d[3] - d[1], even_half = d[2] - d[0];
    v[0] = odd_one + even_one;
    v[1] = odd_one - even_one;
    v[2] = odd_half + 0.5f * even_half;
    v[3] = odd_half - 0.5f * even_half;
    v[4] = (d[4] - d[2]) - 0.25f * even_half;
}

// G: taps to the products' right factors.
[[gnu::always_inline]] inline void transform_taps(const Vector (&w)[3], Vector (&u)[6]) {
    const Vector even_half = (-1.0f / 1.5f) * (w[0] + 0.5f * w[2]), odd_half = (-half_root / 1.5f) * w[1];
    const Vector even_two = (1.0f / 6.0f) * (w[0] + 2.0f * w[2]), odd_two = (root / 6.0f) * w[1];
    u[0] = w[0];
    u[1] = even_half + odd_half;
    u[2] = even_half - odd_half;
    u[3] = even_two + odd_two;
    u[4] = even_two - odd_two;
    u[5] = w[2];
}

[[gnu::always_inline]] inline void transform_taps(const Vector (&w)[2], Vector (&u)[5]) {
    u[0] = (1.0f / 1.5f) * (w[1] + w[0]);
    u[1] = (1.0f / 1.5f) * (w[1] - w[0]);
    u[2] = (-2.0f / 1.5f) * (w[0] + 0.5f * w[1]);
    u[3] = (2.0f / 1.5f) * (w[0] - 0.5f * w[1]);
    u[4] = w[1];
}

// Aᵀ: products to outputs. No sums of two products: which is fused, the compiler would choose anew in each kernel.
[[gnu::always_inline]] inline void transform_output(const Vector (&m)[6], Vector (&y)[tile]) {
    const Vector even_half = m[1] + m[2], odd_half = m[1] - m[2];
    const Vector even_two = m[3] + m[4], odd_two = m[3] - m[4];
    y[0] = m[0] + even_half + even_two;
    y[1] = half_root * (odd_half + 2.0f * odd_two);
    y[2] = 0.5f * (even_half + 4.0f * even_two);
    y[3] = (0.5f * half_root) * (odd_half + 8.0f * odd_two) + m[5];
}

[[gnu::always_inline]] inline void transform_output(const Vector (&m)[5], Vector (&y)[tile]) {
    const Vector even_one = m[0] + m[1], odd_one = m[0] - m[1];
    const Vector even_half = m[2] + m[3], odd_half = m[2] - m[3];
    y[0] = even_one + even_half;
    y[1] = odd_one + 0.5f * odd_half;
    y[2] = even_one + 0.25f * even_half;
    y[3] = odd_one + 0.125f * odd_half + m[4];
}

// A: the gradients of outputs to those of products.
[[gnu::always_inline]] inline void transform_output_grad(const Vector (&y)[tile], Vector (&m)[6]) {
    const Vector even_half = y[0] + 0.5f * y[2], odd_half = half_root * (y[1] + 0.5f * y[3]);
    const Vector even_two = y[0] + 2.0f * y[2], odd_two = root * (y[1] + 2.0f * y[3]);
    m[0] = y[0];
    m[1] = even_half + odd_half;
    m[2] = even_half - odd_half;
    m[3] = even_two + odd_two;
    m[4] = even_two - odd_two;
    m[5] = y[3];
}

[[gnu::always_inline]] inline void transform_output_grad(const Vector (&y)[tile], Vector (&m)[5]) {
    const Vector even_one = y[0] + y[2], odd_one = y[1] + y[3];
    const Vector even_half = y[0] + 0.25f * y[2], odd_half = 0.5f * (y[1] + 0.25f * y[3]);
    m[0] = even_one + odd_one;
    m[1] = even_one - odd_one;
    m[2] = even_half + odd_half;
    m[3] = even_half - odd_half;
    m[4] = y[3];
}

// Gᵀ: the gradients of right factors to those of taps.
[[gnu::always_inline]] inline void transform_taps_grad(const Vector (&u)[6], Vector (&w)[3]) {
    const Vector even_half = (-1.0f / 1.5f) * (u[1] + u[2]), even_two = (1.0f / 6.0f) * (u[3] + u[4]);
    w[0] = u[0] + even_half + even_two;
    w[1] = (-half_root / 1.5f) * (u[1] - u[2]) + (root / 6.0f) * (u[3] - u[4]);
    w[2] = 0.5f * even_half + 2.0f * even_two + u[5];
}

[[gnu::always_inline]] inline void transform_taps_grad(const Vector (&u)[5], Vector (&w)[2]) {
    w[0] = (1.0f / 1.5f) * (u[0] - u[1]) + (2.0f / 1.5f) * (u[3] - u[2]);
    w[1] = (1.0f / 1.5f) * ((u[0] + u[1]) - (u[2] + u[3])) + u[4];
}

}  // namespace ganvas::cpu::GANVAS_ISA
