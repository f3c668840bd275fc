// The part that is compiled once: the choice of instruction set.
#include "convolutions.h"

#include "parallel.h"

namespace ganvas::cpu {
namespace {

std::int64_t element_bytes(Dtype dtype) {
    return dtype == Dtype::float32 ? 4 : 2;
}

std::int64_t input_bytes(const ConvolutionShape& s) {
    return s.batch * s.height * s.width * s.in_channels * element_bytes(s.dtype);
}

std::int64_t output_bytes(const ConvolutionShape& s) {
    return s.batch * s.out_height * s.out_width * s.out_channels * element_bytes(s.dtype);
}

// Arithmetic outweighs memory here: each byte is worth as many threads as about in_channels + out_channels would be.
int team(const ConvolutionShape& s, int threads) {
    return team_size((input_bytes(s) + output_bytes(s)) * 8, threads);
}

}  // namespace

#define DEFINE_KIND(name)                                                             \
    void name##_forward(const ConvolutionForward& args, int threads) {                \
        expect_first_touch(args.output, output_bytes(args.shape));                    \
        threads = team(args.shape, threads);                                          \
        GANVAS_DISPATCH(name##_forward(args, threads))                                \
    }                                                                                 \
    void name##_backward_input(const ConvolutionBackwardInput& args, int threads) {   \
        expect_first_touch(args.grad_input, input_bytes(args.shape));                 \
        threads = team(args.shape, threads);                                          \
        GANVAS_DISPATCH(name##_backward_input(args, threads))                         \
    }                                                                                 \
    void name##_backward_weight(const ConvolutionBackwardWeight& args, int threads) { \
        threads = team(args.shape, threads);                                          \
        GANVAS_DISPATCH(name##_backward_weight(args, threads))                        \
    }
DEFINE_KIND(conv1x1)
DEFINE_KIND(winograd)
DEFINE_KIND(winograd_stride2)
DEFINE_KIND(winograd_stride2_transposed)
#undef DEFINE_KIND

}  // namespace ganvas::cpu
