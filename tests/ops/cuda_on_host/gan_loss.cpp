// The native functions of the GAN losses (csrc/bindings.cpp) for the processor, with the same arguments: each returns
// an error's text, empty if there was none.
#include "cuda/gan_loss.h"

#include "gan_loss_terms.cpp"
#include "imagined_gpu.h"

using namespace ganvas;
using on_host::message_of;

extern "C" {

const char* discriminator_loss_cuda(int dtype, int kind, float label_smoothing, const void* real,
                                    std::int64_t real_count, const void* fake, std::int64_t fake_count, void* grad_real,
                                    void* grad_fake, void* loss, float* metrics, void* workspace, int device,
                                    void* stream) {
    return message_of([=] {
        cuda::discriminator_loss({static_cast<Dtype>(dtype), static_cast<GanLoss>(kind), label_smoothing, real, fake,
                                  real_count, fake_count, grad_real, grad_fake, loss, metrics, workspace},
                                 {device, stream});
    });
}

const char* generator_loss_cuda(int dtype, int kind, const void* fake, const void* real, std::int64_t count,
                                void* grad_fake, void* grad_real, void* loss, void* workspace, int device,
                                void* stream) {
    return message_of([=] {
        cuda::generator_loss({static_cast<Dtype>(dtype), static_cast<GanLoss>(kind), fake, real, count, grad_fake,
                              grad_real, loss, workspace},
                             {device, stream});
    });
}

std::int64_t workspace_bytes() {
    return cuda::gan_loss_workspace_bytes;
}
}
