// The native functions of max-pooling (csrc/bindings.cpp) for the processor, with the same arguments: each returns an
// error's text, empty if there was none.
#include "cuda/max_pool.h"

#include "imagined_gpu.h"

using namespace ganvas;
using on_host::message_of;

namespace {

cuda::MaxPoolInput input_of(int dtype, const std::int64_t* shape, std::int64_t groups, const void* stored,
                            const float* weight, const float* bias, const float* mean, const float* var, float eps,
                            float negative_slope, int activation_first) {
    return {static_cast<Dtype>(dtype),
            shape[0],
            shape[2],
            shape[3],
            shape[1],
            groups,
            stored,
            weight,
            bias,
            mean,
            var,
            eps,
            negative_slope,
            activation_first != 0};
}

}  // namespace

extern "C" {

std::int64_t max_pool_workspace_cuda(int dtype, const std::int64_t* shape, std::int64_t groups, int device) {
    return 4 * cuda::max_pool_workspace_floats(
                   input_of(dtype, shape, groups, nullptr, nullptr, nullptr, nullptr, nullptr, 0.0f, 1.0f, 0), device);
}

const char* max_pool_forward_cuda(int dtype, const std::int64_t* shape, std::int64_t groups, const void* input,
                                  const float* weight, const float* bias, const float* mean, const float* var,
                                  float eps, float negative_slope, int activation_first, void* output,
                                  std::uint8_t* index, int device, void* stream) {
    return message_of([=] {
        cuda::max_pool_forward(
            {input_of(dtype, shape, groups, input, weight, bias, mean, var, eps, negative_slope, activation_first),
             output, index},
            {device, stream});
    });
}

const char* max_pool_backward_cuda(int dtype, const std::int64_t* shape, std::int64_t groups, const void* input,
                                   const float* weight, const float* bias, const float* mean, const float* var,
                                   float eps, float negative_slope, int activation_first, const void* grad_output,
                                   const std::uint8_t* index, int training, void* grad_input, float* grad_weight,
                                   float* grad_bias, float* workspace, std::int64_t, int device, void* stream) {
    return message_of([=] {
        cuda::max_pool_backward(
            {input_of(dtype, shape, groups, input, weight, bias, mean, var, eps, negative_slope, activation_first),
             grad_output, index, training != 0, grad_input, grad_weight, grad_bias, workspace},
            {device, stream});
    });
}
}
