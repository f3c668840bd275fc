#include "gan_loss_terms.h"

namespace ganvas {

GanLossTerms terms_of(GanLoss kind, float label_smoothing) {
    constexpr LogitTerm softplus_minus{LossTerm::softplus_minus, 0.0f}, softplus_plus{LossTerm::softplus_plus, 0.0f};
    constexpr LogitTerm minus{LossTerm::minus, 0.0f}, plus{LossTerm::plus, 0.0f}, pair{LossTerm::pair, 0.0f};
    const auto square_to = [](float label) { return LogitTerm{LossTerm::square_to_label, label}; };
    switch (kind) {
        case GanLoss::bce:
            return {{LossTerm::bce_real, label_smoothing}, softplus_plus, softplus_minus};
        case GanLoss::non_saturating:
            return {softplus_minus, softplus_plus, softplus_minus};
        case GanLoss::lsgan:
            return {square_to(1.0f - label_smoothing), square_to(0.0f), square_to(1.0f)};
        case GanLoss::hinge:
            return {{LossTerm::hinge_real, 0.0f}, {LossTerm::hinge_fake, 0.0f}, minus};
        case GanLoss::wgan:
            return {minus, plus, minus};
        case GanLoss::relativistic:
            return {pair, pair, pair};
    }
    return {};
}

}  // namespace ganvas
