// The part that is compiled once: the sums over both sets of logits and what is made of them.
#include "gan_loss.h"

#include <memory>

#include "parallel.h"

namespace ganvas::cpu {
namespace {

void dispatch(const LossTermArgs& args, LogitSums* sums, int threads){GANVAS_DISPATCH(loss_term(args, sums, threads))}

LogitSums run(const LossTermArgs& args, int threads) {
    const std::int64_t chunks = (args.count + logits_per_chunk - 1) / logits_per_chunk;
    LogitSums total{};
    if (chunks <= 1) {
        dispatch(args, &total, 1);
        return total;
    }
    const auto sums = std::make_unique<LogitSums[]>(chunks);
    // An exponential and a logarithm a logit: as much work as moving 64 bytes.
    dispatch(args, sums.get(), team_size(args.count * 64, threads));
    for (std::int64_t i = 0; i < chunks; ++i) {
        total.loss += sums[i].loss;
        total.logit += sums[i].logit;
        total.positive += sums[i].positive;
        total.negative += sums[i].negative;
    }
    return total;
}

}  // namespace

void discriminator_loss(const DiscriminatorLoss& args, int threads) {
    const GanLossTerms terms = terms_of(args.kind, args.label_smoothing);
    const bool pairs = args.kind == GanLoss::relativistic;
    const double real_mean = 1.0 / static_cast<double>(args.real_count);
    const double fake_mean = 1.0 / static_cast<double>(args.fake_count);
    // The pair's term writes both gradients; for the fake logits only the metrics remain, and a zero scale leaves the
    // gradient to be written first, so the pair comes second.
    const LogitTerm fake_term = pairs ? LogitTerm{LossTerm::plus, 0.0f} : terms.fake;
    const LogitSums fake = run({args.dtype, fake_term, pairs ? 0.0f : static_cast<float>(fake_mean), args.fake, nullptr,
                                args.fake_count, args.grad_fake, nullptr},
                               threads);
    const LogitSums real =
        run({args.dtype, terms.real, static_cast<float>(real_mean), args.real, pairs ? args.fake : nullptr,
             args.real_count, args.grad_real, pairs ? args.grad_fake : nullptr},
            threads);
    *args.loss = static_cast<float>(real.loss * real_mean + (pairs ? 0.0 : fake.loss * fake_mean));
    args.metrics[0] = static_cast<float>(real.logit * real_mean);
    args.metrics[1] = static_cast<float>(fake.logit * fake_mean);
    args.metrics[2] = static_cast<float>(real.positive * real_mean);
    args.metrics[3] = static_cast<float>(fake.negative * fake_mean);
}

void generator_loss(const GeneratorLoss& args, int threads) {
    const double mean = 1.0 / static_cast<double>(args.count);
    const LogitSums sums = run({args.dtype, terms_of(args.kind, 0.0f).generator, static_cast<float>(mean), args.fake,
                                args.real, args.count, args.grad_fake, args.grad_real},
                               threads);
    *args.loss = static_cast<float>(sums.loss * mean);
}

}  // namespace ganvas::cpu
