// The native functions of the norm's kernels (csrc/bindings.cpp) for the processor, with the same arguments: each
// returns an error's text, empty if there was none.
#include "cuda/batch_norm_leaky_relu.h"

#include "cuda/statistics.h"
#include "imagined_gpu.h"

using namespace ganvas;
using on_host::message_of;

extern "C" {

std::int64_t batch_norm_workspace_cuda(int dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups,
                                       int device) {
    return 4 * cuda::batch_norm_workspace_floats({static_cast<Dtype>(dtype), rows, channels, groups, 0.0f, 1.0f, false},
                                                 device);
}

const char* batch_norm_leaky_relu_forward_cuda(int dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups,
                                               float eps, float negative_slope, int activation_first, int training,
                                               const void* input, const float* weight, const float* bias, float* mean,
                                               float* var, float* running_mean, float* running_var, float momentum,
                                               const void* residual, void* output, float* workspace, std::int64_t,
                                               int device, void* stream) {
    return message_of([=] {
        cuda::batch_norm_leaky_relu_forward(
            {{static_cast<Dtype>(dtype), rows, channels, groups, eps, negative_slope, activation_first != 0},
             input,
             weight,
             bias,
             training != 0,
             mean,
             var,
             running_mean,
             running_var,
             momentum,
             residual,
             output,
             workspace},
            {device, stream});
    });
}

std::int64_t batch_statistics_workspace_cuda(int dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups,
                                             int device) {
    return 4 * cuda::batch_statistics_workspace_floats(
                   {static_cast<Dtype>(dtype), rows, channels, groups, 0.0f, 1.0f, false}, device);
}

const char* batch_statistics_cuda(int dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups, float eps,
                                  float negative_slope, int activation_first, const void* input, const float* weight,
                                  const float* bias, float* running_mean, float* running_var, float momentum,
                                  float* mean, float* var, float* scale, float* shift, float* workspace, std::int64_t,
                                  int device, void* stream) {
    return message_of([=] {
        cuda::batch_statistics(
            {{static_cast<Dtype>(dtype), rows, channels, groups, eps, negative_slope, activation_first != 0},
             input,
             weight,
             bias,
             running_mean,
             running_var,
             momentum,
             mean,
             var,
             scale,
             shift,
             workspace},
            {device, stream});
    });
}

const char* batch_norm_leaky_relu_backward_cuda(
    int dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups, float eps, float negative_slope,
    int activation_first, int training, const void* grad_output, const void* output, const void* input,
    const float* weight, const float* bias, const float* mean, const float* var, void* grad_input, float* grad_weight,
    float* grad_bias, void* grad_residual, float* workspace, std::int64_t, int device, void* stream) {
    return message_of([=] {
        cuda::batch_norm_leaky_relu_backward(
            {{static_cast<Dtype>(dtype), rows, channels, groups, eps, negative_slope, activation_first != 0},
             grad_output,
             input,
             weight,
             bias,
             mean,
             var,
             training != 0,
             grad_input,
             grad_weight,
             grad_bias,
             output,
             grad_residual,
             workspace},
            {device, stream});
    });
}

const char* settle_pending_gradient_cuda(int dtype, std::int64_t rows, std::int64_t channels, std::int64_t groups,
                                         float eps, float negative_slope, int activation_first, int training,
                                         void* grad, const void* stored, const float* weight, const float* mean,
                                         const float* var, const float* sums, float* grad_weight, float* grad_bias,
                                         int device, void* stream) {
    return message_of([=] {
        cuda::settle_pending_gradient(
            {{static_cast<Dtype>(dtype), rows, channels, groups, eps, negative_slope, activation_first != 0},
             training != 0,
             grad,
             stored,
             weight,
             mean,
             var,
             sums,
             grad_weight,
             grad_bias},
            {device, stream});
    });
}

std::int64_t finish_statistics_workspace_cuda(std::int64_t groups, std::int64_t tiles, std::int64_t channels) {
    return 4 * cuda::finish_workspace_floats(groups, tiles, channels);
}

const char* finish_statistics_cuda(std::int64_t groups, std::int64_t tiles, std::int64_t channels, const float* counts,
                                   const float* means, const float* deviations, const float* weight, const float* bias,
                                   float eps, float* running_mean, float* running_var, float momentum, float* mean,
                                   float* var, float* scale, float* shift, float* workspace, std::int64_t, int device,
                                   void* stream) {
    return message_of([=] {
        cuda::finish_statistics({groups, tiles, channels, counts, means, deviations, weight, bias, eps, running_mean,
                                 running_var, momentum, mean, var, scale, shift, workspace},
                                {device, stream});
    });
}
}
