// The part of CUDA that ganvas' kernels use, run by the processor, so that their logic is tested where no GPU is.
//
// A block is an OS thread; its CUDA threads take turns on it as coroutines, each running up to its next barrier. What
// this finds: wrong indices, sums, barriers, launch shapes. What it cannot find: races between threads that show in
// neither order of their turns, and anything that only the CUDA compiler or a GPU does.
#pragma once

#include <ucontext.h>

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // one per OS thread: one per block

struct dim3 {
    unsigned x, y = 1, z = 1;
    dim3(unsigned count = 1) : x(count) {}
};

struct alignas(8) uint2 {
    unsigned x, y;
};

namespace on_host {

// Vectors that kernels have copied out of memory and into it: one is made by make_uint4 otherwise.
inline std::atomic<long> vectors_read = 0, vectors_written = 0;

}  // namespace on_host

struct alignas(16) uint4 {
    unsigned x, y, z, w;

    uint4(unsigned x, unsigned y, unsigned z, unsigned w) : x(x), y(y), z(z), w(w) {}
    uint4(const uint4& other) : x(other.x), y(other.y), z(other.z), w(other.w) { ++on_host::vectors_read; }
    uint4& operator=(const uint4& other) {
        x = other.x, y = other.y, z = other.z, w = other.w;
        ++on_host::vectors_written;
        return *this;
    }
};

inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __frsqrt_rn(float value) {
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(value)));
}

inline thread_local dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace on_host {

constexpr int warp_size = 32;
constexpr std::size_t stack_bytes = 64 << 10;

struct Barrier {
    int size, arrived = 0;
    long passed = 0;
};

struct Coroutine {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[stack_bytes]};
    bool finished = false;
};

struct Block {
    std::function<void()> kernel;
    std::barrier<>* grid;  // null: an ordinary launch, in which blocks cannot wait for each other
    std::vector<Coroutine> threads;
    std::vector<Barrier> warps;
    Barrier all;
    std::vector<double> exchanged;  // two values of each thread: the last exchange may still be read during the next
    std::vector<int> exchanges;     // of each thread
    ucontext_t scheduler{};
    unsigned running = 0;
    long progress = 0;
};

inline thread_local Block* block;

inline bool last_first = false;  // the threads' turns: a missing barrier shows in one order or the other

[[noreturn]] inline void fail(const char* message) {
    std::fprintf(stderr, "CUDA on the host: %s\n", message);
    std::abort();
}

inline void yield() {
    swapcontext(&block->threads[block->running].context, &block->scheduler);
}

inline void wait(Barrier& barrier) {
    const long passed = barrier.passed;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.passed;
        ++block->progress;
        return;
    }
    while (barrier.passed == passed) yield();
}

inline void run_thread() {
    block->kernel();
    block->threads[block->running].finished = true;
    ++block->progress;
    yield();
}

inline void run_block(std::function<void()> kernel, unsigned index, unsigned blocks, int threads,
                      std::barrier<>* grid) {
    Block self{std::move(kernel),
               grid,
               std::vector<Coroutine>(threads),
               std::vector<Barrier>(threads / warp_size, {warp_size}),
               {threads},
               std::vector<double>(2 * threads),
               std::vector<int>(threads)};
    block = &self;
    blockIdx = dim3(index), gridDim = dim3(blocks), blockDim = dim3(threads);
    for (Coroutine& thread : self.threads) {
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = stack_bytes;
        makecontext(&thread.context, run_thread, 0);
    }
    for (int finished = 0; finished < threads;) {
        const long progress = self.progress;
        finished = 0;
        for (unsigned turn = 0; turn < self.threads.size(); ++turn) {
            self.running = last_first ? static_cast<unsigned>(self.threads.size()) - 1 - turn : turn;
            Coroutine& thread = self.threads[self.running];
            threadIdx = dim3(self.running);
            if (!thread.finished) swapcontext(&self.scheduler, &thread.context);
            finished += thread.finished;
        }
        if (finished < threads && self.progress == progress) fail("threads of a block wait at different barriers");
    }
}

}  // namespace on_host

inline void __syncthreads() {
    on_host::wait(on_host::block->all);
}

inline double __shfl_down_sync(unsigned mask, double value, int offset) {
    if (mask != 0xFFFFFFFFu) on_host::fail("only whole warps exchange values");
    on_host::Block& block = *on_host::block;
    const unsigned thread = block.running, lane = thread % on_host::warp_size;
    double* values = block.exchanged.data() + (block.exchanges[thread]++ % 2 ? block.threads.size() : 0);
    values[thread] = value;
    on_host::wait(block.warps[thread / on_host::warp_size]);
    return lane + offset < on_host::warp_size ? values[thread + offset] : value;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorCooperativeLaunchTooLarge };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int cooperative;
    } val;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

namespace on_host {

inline int multiprocessors = 3;               // of the imagined GPU
inline int resident_blocks = 2;               // of a multiprocessor, of any kernel
inline cudaError_t next_error = cudaSuccess;  // what the next launch answers
inline int launches = 0;
inline unsigned last_grid = 0;

}  // namespace on_host

inline const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaSuccess ? "cudaSuccess" : "cudaErrorCooperativeLaunchTooLarge";
}

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "too many blocks in cooperative launch";
}

inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = on_host::multiprocessors;
    return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
    *blocks = on_host::resident_blocks;
    return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
    if (on_host::next_error != cudaSuccess) return std::exchange(on_host::next_error, cudaSuccess);
    const unsigned blocks = config->gridDim.x;
    const bool cooperative = config->numAttrs == 1 && config->attrs->val.cooperative;
    ++on_host::launches;
    on_host::last_grid = blocks;
    std::barrier<> grid(blocks);
    std::vector<std::thread> running;
    for (unsigned index = 0; index < blocks; ++index) {
        running.emplace_back([&, index] {
            on_host::run_block([&] { kernel(arguments...); }, index, blocks, static_cast<int>(config->blockDim.x),
                               cooperative ? &grid : nullptr);
        });
        if (!cooperative) running.back().join();
    }
    if (cooperative)
        for (std::thread& block : running) block.join();
    return cudaSuccess;
}
