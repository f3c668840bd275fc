// The arithmetic that every kernel with batch statistics shares. Included by kernel sources only, hence the namespace.
#pragma once

#include <cstdint>

#include "convolution.h"

namespace ganvas::cpu::GANVAS_ISA {

using Index = std::int64_t;

inline Index smaller(Index a, Index b) {
    return a < b ? a : b;
}
inline Index larger(Index a, Index b) {
    return a > b ? a : b;
}
constexpr Index ceiling(Index a, Index b) {
    return (a + b - 1) / b;
}
inline Index clamped(Index value, Index least, Index most) {
    return larger(least, smaller(value, most));
}

struct Span {
    Index first, last;  // and not the last
};

// LeakyReLU. With slope 0 it is ReLU, also at -inf, where -inf*0 would be NaN.
struct Leaky {
    float slope, lowest;
    explicit Leaky(float slope) : slope(slope), lowest(slope == 0.0f ? -__FLT_MAX__ : -__builtin_inff()) {}
    float operator()(float x) const { return x > 0.0f ? x : (x < lowest ? lowest : x) * slope; }
    float grad(float incoming, float x) const { return x > 0.0f ? incoming : incoming * slope; }
};

// Joins the statistics of count_b values to those of `count` (Chan, Golub & LeVeque 1983, equation 2.1).
struct Join {
    double share, weight;
    Join(double count, double count_b) : share(count_b / (count + count_b)), weight(count * share) {}
    void operator()(double& mean, double& deviation, double mean_b, double deviation_b) const {
        const double delta = mean_b - mean;
        mean += delta * share;
        deviation += deviation_b + delta * delta * weight;
    }
};

inline float inverse_deviation(float var, float eps) {
    return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(var) + static_cast<double>(eps)));
}

// What BatchNorm's input gradient is made of, a value each per channel, in this order:
//   dL/dx = scale*(g − mean_grad − (x − mean)*projection)
struct GradientCoefficients {
    float *scale, *mean, *mean_grad, *projection;

    GradientCoefficients(float* first, Index group, Index channels)
        : scale(first + group * gradient_coefficients * channels),
          mean(scale + channels),
          mean_grad(mean + channels),
          projection(mean_grad + channels) {}

    // From Σg and Σg·(x − mean) over `pixels` values; `training`: mean and variance are those of these values. Returns
    // 1/√(var + eps), which the weight's gradient needs too.
    float set(Index c, float weight, float mean_of_x, float var, float eps, bool training, double sum,
              double sum_deviation, double pixels) const {
        const float inverse = inverse_deviation(var, eps);
        scale[c] = weight * inverse;
        mean[c] = mean_of_x;
        mean_grad[c] = training ? static_cast<float>(sum / pixels) : 0.0f;
        projection[c] = training ? static_cast<float>(sum_deviation / pixels) * inverse * inverse : 0.0f;
        return inverse;
    }
};

inline void move(float& running, double batch, float momentum) {
    running += momentum * (static_cast<float>(batch) - running);
}

}  // namespace ganvas::cpu::GANVAS_ISA
