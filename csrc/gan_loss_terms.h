// Which functions of a logit make up which adversarial loss: one table and one set of formulas for the kernels of every
// device. The losses and their sources: python/ganvas/ops/backends/reference/gan_loss.py.
#pragma once

#include "host_device.h"

namespace ganvas {

enum class GanLoss { bce, non_saturating, lsgan, hinge, wgan, relativistic };

enum class LossTerm {
    bce_real,         // softplus(-x) + smoothing*x
    softplus_minus,   // softplus(-x)
    softplus_plus,    // softplus(x)
    square_to_label,  // (x - label)^2 / 2
    hinge_real,       // max(0, 1 - x)
    hinge_fake,       // max(0, 1 + x)
    minus,            // -x
    plus,             // x
    pair,             // softplus(-(x - other)): x is the difference of two logits
};

struct LogitTerm {
    LossTerm term;
    float parameter;  // smoothing or label, where the term has one
};

struct GanLossTerms {
    LogitTerm real, fake;  // the discriminator's, each averaged over its logits; `pair` takes both sets at once
    LogitTerm generator;   // over the fake logits
};

GanLossTerms terms_of(GanLoss kind, float label_smoothing);

struct ValueAndGrad {
    float value, grad;
};

// The term and its derivative at x. Math::softplus(x) gives log(1 + e^x) and its derivative. Math must live in a
// namespace of the including source's own: sources compiled once per instruction set must not share an instantiation.
template <LossTerm term, class Math>
GANVAS_HOST_DEVICE inline ValueAndGrad evaluate(float x, float parameter) {
    switch (term) {
        case LossTerm::bce_real: {
            const ValueAndGrad t = Math::softplus(-x);
            return {t.value + parameter * x, parameter - t.grad};
        }
        case LossTerm::softplus_minus:
        case LossTerm::pair: {
            const ValueAndGrad t = Math::softplus(-x);
            return {t.value, -t.grad};
        }
        case LossTerm::softplus_plus:
            return Math::softplus(x);
        case LossTerm::square_to_label:
            return {0.5f * (x - parameter) * (x - parameter), x - parameter};
        // NaN is not <= 0 and goes through, in value and gradient, as in torch.
        case LossTerm::hinge_real:
            return {1.0f - x <= 0.0f ? 0.0f : 1.0f - x, 1.0f - x <= 0.0f ? 0.0f : -1.0f};
        case LossTerm::hinge_fake:
            return {1.0f + x <= 0.0f ? 0.0f : 1.0f + x, 1.0f + x <= 0.0f ? 0.0f : 1.0f};
        case LossTerm::minus:
            return {-x, -1.0f};
        case LossTerm::plus:
            return {x, 1.0f};
    }
    return {};
}

}  // namespace ganvas
