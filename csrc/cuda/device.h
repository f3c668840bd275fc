// Where a kernel runs, and whether it can run there. No CUDA header, so that bindings.cpp needs none.
#pragma once

#include <string>

namespace ganvas::cuda {

struct Queue {
    int device;
    void* stream;  // cudaStream_t
};

// Why this build's kernels cannot run on `device`: a driver older than the CUDA runtime they were built with, an
// architecture they were not compiled for. Empty if they can. Makes `device` the current one.
std::string refusal(int device);

}  // namespace ganvas::cuda
