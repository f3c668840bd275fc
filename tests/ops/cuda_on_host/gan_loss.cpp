// csrc/cuda/gan_loss.cu for the processor, as C functions: each returns an error's text, empty if there was none.
#include "cuda/gan_loss.cu"
#include "gan_loss_terms.cpp"
#include "imagined_gpu.h"

extern "C" {

const char* discriminator_loss(int dtype, int kind, float label_smoothing, const void* real, std::int64_t real_count,
                               const void* fake, std::int64_t fake_count, void* grad_real, void* grad_fake, void* loss,
                               float* metrics, void* workspace) {
    return on_host::message_of([=] {
        ganvas::cuda::discriminator_loss(
            {static_cast<ganvas::Dtype>(dtype), static_cast<ganvas::GanLoss>(kind), label_smoothing, real, fake,
             real_count, fake_count, grad_real, grad_fake, loss, metrics, workspace},
            {0, nullptr});
    });
}

const char* generator_loss(int dtype, int kind, const void* fake, const void* real, std::int64_t count, void* grad_fake,
                           void* grad_real, void* loss, void* workspace) {
    return on_host::message_of([=] {
        ganvas::cuda::generator_loss({static_cast<ganvas::Dtype>(dtype), static_cast<ganvas::GanLoss>(kind), fake, real,
                                      count, grad_fake, grad_real, loss, workspace},
                                     {0, nullptr});
    });
}

std::int64_t workspace_bytes() {
    return ganvas::cuda::gan_loss_workspace_bytes;
}
}
