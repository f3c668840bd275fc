// CUDA errors as exceptions that name what failed.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace ganvas::cuda {

inline void check(const char* what, cudaError_t error) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(what) + ": CUDA error " + cudaGetErrorName(error) + ": " +
                             cudaGetErrorString(error));
}

}  // namespace ganvas::cuda
