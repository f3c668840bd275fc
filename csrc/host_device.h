// Functions that both the host and a GPU run, in headers that a C++ compiler reads too.
#pragma once

#if defined(__CUDACC__)
#define GANVAS_HOST_DEVICE __host__ __device__
#else
#define GANVAS_HOST_DEVICE
#endif
