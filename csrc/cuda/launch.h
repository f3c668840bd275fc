// How kernels are enqueued: on the caller's stream, without waiting for anything.
#pragma once

#include <cuda_runtime.h>

#include "channels.h"
#include "device.h"
#include "error.h"

namespace ganvas::cuda {

// The CUDA runtime keeps a device's attributes: neither the driver nor the device is asked.
inline int multiprocessors(const char* name, Queue queue) {
    int count = 0;
    check(name, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, queue.device));
    return count;
}

// Enqueues kernel(args); `name` is what errors speak of.
template <class Args>
void launch(const char* name, void (*kernel)(Args), Index blocks, int threads, const Args& args, Queue queue) {
    check(name, cudaSetDevice(queue.device));
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = static_cast<cudaStream_t>(queue.stream);
    check(name, cudaLaunchKernelEx(&config, kernel, args));
    check(name, cudaGetLastError());
}

}  // namespace ganvas::cuda
