#include "device.h"

#include <cuda_runtime.h>

namespace ganvas::cuda {
namespace {

__global__ void probe() {}

}  // namespace

std::string refusal(int device) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaSetDevice(device);
    // Loads the module: the driver must find machine code for the device in it, or PTX that it can translate.
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe);
    if (error == cudaSuccess) return {};
    cudaGetLastError();  // or the next launch would report it again
    return std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error);
}

}  // namespace ganvas::cuda
