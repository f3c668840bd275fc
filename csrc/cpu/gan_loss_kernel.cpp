// Compiled once per instruction set: one branch-free loop per loss term, which the compiler turns into vector code.
#include "gan_loss.h"
#include "storage.h"

namespace ganvas::cpu::GANVAS_ISA {
namespace {

using Index = std::int64_t;

// e^x for x <= 0, relative error < 2e-7 (Cephes' expf: x = n·ln 2 + r, a polynomial in r, 2^n through the exponent
// bits).
inline float exp_of_nonpositive(float x) {
    x = x < -87.0f ? -87.0f : x;             // e^-87 is 1e-38; false for NaN, which goes through
    constexpr float rounding = 12582912.0f;  // 1.5·2^23: adding it leaves the nearest integer in the low bits
    const float shifted = x * 1.44269504f + rounding;
    const float n = shifted - rounding;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    std::uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

// log(1 + e) for 0 <= e <= 1 as 2·artanh(e/(2 + e)), whose series converges fast there: no cancellation for small e.
inline float log1p_of_unit(float e) {
    const float s = e / (2.0f + e), q = s * s;
    float p = 1.0f / 15.0f;
    p = p * q + 1.0f / 13.0f;
    p = p * q + 1.0f / 11.0f;
    p = p * q + 1.0f / 9.0f;
    p = p * q + 1.0f / 7.0f;
    p = p * q + 1.0f / 5.0f;
    p = p * q + 1.0f / 3.0f;
    p = p * q + 1.0f;
    return 2.0f * s * p;
}

struct Math {
    // softplus(x) = max(x, 0) + log(1 + e^−|x|), and its derivative, the sigmoid.
    static ValueAndGrad softplus(float x) {
        const float e = exp_of_nonpositive(x > 0.0f ? -x : x);
        const float inverse = 1.0f / (1.0f + e);
        return {(x > 0.0f ? x : x == x ? 0.0f : x) + log1p_of_unit(e), x > 0.0f ? inverse : e * inverse};
    }
};

// Sums in lanes, so that the loop vectorises without reordering what the source says.
constexpr Index lanes = 32;

template <LossTerm term, class T>
LogitSums chunk(const LossTermArgs& args, Index begin, Index count) {
    const T* __restrict logits = static_cast<const T*>(args.logits) + begin;
    const T* __restrict other = term == LossTerm::pair ? static_cast<const T*>(args.other) + begin : nullptr;
    T* __restrict grad = static_cast<T*>(args.grad) + begin;
    T* __restrict grad_other = term == LossTerm::pair ? static_cast<T*>(args.grad_other) + begin : nullptr;
    const float parameter = args.term.parameter, grad_scale = args.grad_scale;
    float loss[lanes] = {}, logit[lanes] = {}, positive[lanes] = {}, negative[lanes] = {};

    const auto step = [&](Index i, Index lane) {
        const float x = load(logits[i]);
        const float argument = term == LossTerm::pair ? x - load(other[i]) : x;
        const ValueAndGrad t = evaluate<term, Math>(argument, parameter);
        loss[lane] += t.value;
        logit[lane] += x;
        positive[lane] += x > 0.0f ? 1.0f : 0.0f;
        negative[lane] += x < 0.0f ? 1.0f : 0.0f;
        store(&grad[i], t.grad * grad_scale);
        if (term == LossTerm::pair) store(&grad_other[i], -t.grad * grad_scale);
    };
    Index i = 0;
    for (; i + lanes <= count; i += lanes)
        for (Index lane = 0; lane < lanes; ++lane) step(i + lane, lane);
    for (Index lane = 0; i < count; ++i, ++lane) step(i, lane);

    LogitSums sums{};
    for (Index lane = 0; lane < lanes; ++lane) {
        sums.loss += static_cast<double>(loss[lane]);
        sums.logit += static_cast<double>(logit[lane]);
        sums.positive += static_cast<double>(positive[lane]);
        sums.negative += static_cast<double>(negative[lane]);
    }
    return sums;
}

template <class T>
LogitSums chunk_of(const LossTermArgs& args, Index begin, Index count) {
    switch (args.term.term) {
        case LossTerm::bce_real:
            return chunk<LossTerm::bce_real, T>(args, begin, count);
        case LossTerm::softplus_minus:
            return chunk<LossTerm::softplus_minus, T>(args, begin, count);
        case LossTerm::softplus_plus:
            return chunk<LossTerm::softplus_plus, T>(args, begin, count);
        case LossTerm::square_to_label:
            return chunk<LossTerm::square_to_label, T>(args, begin, count);
        case LossTerm::hinge_real:
            return chunk<LossTerm::hinge_real, T>(args, begin, count);
        case LossTerm::hinge_fake:
            return chunk<LossTerm::hinge_fake, T>(args, begin, count);
        case LossTerm::minus:
            return chunk<LossTerm::minus, T>(args, begin, count);
        case LossTerm::plus:
            return chunk<LossTerm::plus, T>(args, begin, count);
        case LossTerm::pair:
            return chunk<LossTerm::pair, T>(args, begin, count);
    }
    return {};
}

}  // namespace

void loss_term(const LossTermArgs& args, LogitSums* chunk_sums, int threads) {
    const Index chunks = (args.count + logits_per_chunk - 1) / logits_per_chunk;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (Index i = 0; i < chunks; ++i) {
        const Index begin = i * logits_per_chunk;
        const Index count = args.count - begin < logits_per_chunk ? args.count - begin : logits_per_chunk;
        chunk_sums[i] =
            args.dtype == Dtype::float32 ? chunk_of<float>(args, begin, count) : chunk_of<bfloat16>(args, begin, count);
    }
}

}  // namespace ganvas::cpu::GANVAS_ISA
