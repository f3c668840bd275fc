// The logits are cut into chunks of a fixed size; blocks take chunks in turn, write the gradients and add up what they
// read in a fixed order: thread, warp, block, grid. There are no atomics, so one device gives one input the same bits
// each time. Few logits take one block. Many take as many blocks as run at once: those wait for each other at a
// grid-wide barrier (hence the cooperative launch), after which the first block adds up the sums of all.
#include "gan_loss.h"

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "launch.h"
#include "vector.h"

namespace ganvas::cuda {
namespace {

constexpr int warp_size = 32;
constexpr int threads = 512;
constexpr int warps = threads / warp_size;
constexpr int logits_per_thread = 4;  // loads on their way at once
constexpr int logits_per_chunk = threads * logits_per_thread;
constexpr int most_blocks = 2;  // of a multiprocessor: __launch_bounds__ keeps registers few enough on any GPU
constexpr Index chunks_for_one_block = 8;  // estimated: up to here the barrier costs more than other blocks save

struct Math {
    // softplus(x) = max(x, 0) + log(1 + e^-|x|), and its derivative, the sigmoid. NaN goes through both.
    GANVAS_HOST_DEVICE static ValueAndGrad softplus(float x) {
        const float e = expf(-fabsf(x));
        const float inverse = 1.0f / (1.0f + e);
        return {fmaxf(x, 0.0f) + log1pf(e), x > 0.0f ? inverse : e * inverse};
    }
};

// A set of logits and the term of the loss that is averaged over it.
template <class T>
struct Part {
    const T* logits;  // [count]
    const T* other;   // [count], pair only: the set that each logit is compared with
    T* grad;          // [count]
    T* grad_other;    // [count], pair only
    Index count;      // 0: no such part
    double mean;      // 1/count
    LogitTerm term;

    __host__ __device__ Index chunks() const { return (count + logits_per_chunk - 1) / logits_per_chunk; }
};

// All but the loss are what the metrics are made of; the generator's loss, which has none, leaves them unread.
struct Sums {
    double loss;  // a sum of means
    double real_logit, fake_logit, real_positive, fake_negative;
};
static_assert(sizeof(Sums) * gan_loss_max_blocks == gan_loss_workspace_bytes);

template <class T>
struct Args {
    Part<T> part[2];  // real and fake logits; one part where the term takes pairs, or the loss one set
    T* loss;          // [1]
    float* metrics;   // [4] or null
    Sums* of_block;   // [gridDim.x]
};

// One chunk: reads all that it needs, then computes. `real`: which of the metrics' sums the logits belong to.
template <LossTerm term, class T>
__device__ void add_chunk(const Part<T>& part, Index begin, bool real, Sums& sums) {
    constexpr bool pairs = term == LossTerm::pair;
    const T* const logits = part.logits + begin;
    const T* const other = part.other + (pairs ? begin : 0);
    const Index left = part.count - begin;
    float x[logits_per_thread], y[logits_per_thread];
#pragma unroll
    for (int j = 0; j < logits_per_thread; ++j) {
        const int i = j * threads + static_cast<int>(threadIdx.x);
        x[j] = i < left ? load(logits + i) : 0.0f;
        y[j] = pairs && i < left ? load(other + i) : 0.0f;
    }

    const float grad_scale = static_cast<float>(part.mean);
    float loss = 0.0f, logit = 0.0f, other_logit = 0.0f;
    int positive = 0, negative = 0, other_negative = 0;
#pragma unroll
    for (int j = 0; j < logits_per_thread; ++j) {
        const int i = j * threads + static_cast<int>(threadIdx.x);
        if (i >= left) break;
        const ValueAndGrad t = evaluate<term, Math>(x[j] - y[j], part.term.parameter);
        loss += t.value;
        logit += x[j];
        other_logit += y[j];
        positive += x[j] > 0.0f;
        negative += x[j] < 0.0f;
        other_negative += y[j] < 0.0f;
        store(part.grad + begin + i, t.grad * grad_scale);
        if (pairs) store(part.grad_other + begin + i, -t.grad * grad_scale);
    }
    sums.loss += part.mean * loss;
    sums.real_logit += real ? logit : 0.0f;
    sums.real_positive += real ? positive : 0;
    sums.fake_logit += real ? other_logit : logit;
    sums.fake_negative += real ? other_negative : negative;
}

template <class T>
__device__ void add_chunk_of(const Part<T>& part, Index begin, bool real, Sums& sums) {
    switch (part.term.term) {
        case LossTerm::bce_real:
            return add_chunk<LossTerm::bce_real>(part, begin, real, sums);
        case LossTerm::softplus_minus:
            return add_chunk<LossTerm::softplus_minus>(part, begin, real, sums);
        case LossTerm::softplus_plus:
            return add_chunk<LossTerm::softplus_plus>(part, begin, real, sums);
        case LossTerm::square_to_label:
            return add_chunk<LossTerm::square_to_label>(part, begin, real, sums);
        case LossTerm::hinge_real:
            return add_chunk<LossTerm::hinge_real>(part, begin, real, sums);
        case LossTerm::hinge_fake:
            return add_chunk<LossTerm::hinge_fake>(part, begin, real, sums);
        case LossTerm::minus:
            return add_chunk<LossTerm::minus>(part, begin, real, sums);
        case LossTerm::plus:
            return add_chunk<LossTerm::plus>(part, begin, real, sums);
        case LossTerm::pair:
            return add_chunk<LossTerm::pair>(part, begin, real, sums);
    }
}

// The sum over the warp, in its first thread.
__device__ Sums warp_sum(Sums sums) {
#pragma unroll
    for (int offset = warp_size / 2; offset > 0; offset /= 2) {
        sums.loss += __shfl_down_sync(0xFFFFFFFFu, sums.loss, offset);
        sums.real_logit += __shfl_down_sync(0xFFFFFFFFu, sums.real_logit, offset);
        sums.fake_logit += __shfl_down_sync(0xFFFFFFFFu, sums.fake_logit, offset);
        sums.real_positive += __shfl_down_sync(0xFFFFFFFFu, sums.real_positive, offset);
        sums.fake_negative += __shfl_down_sync(0xFFFFFFFFu, sums.fake_negative, offset);
    }
    return sums;
}

// The sum over the block, in its first thread. Every thread of the block calls it.
__device__ Sums block_sum(Sums sums) {
    __shared__ Sums of_warp[warps];
    const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size, warp = thread / warp_size;
    sums = warp_sum(sums);
    __syncthreads();  // what an earlier call left has been read
    if (lane == 0) of_warp[warp] = sums;
    __syncthreads();
    if (warp > 0) return sums;
    return warp_sum(lane < warps ? of_warp[lane] : Sums{});
}

template <class T>
__global__ void __launch_bounds__(threads, most_blocks) gan_loss_kernel(const __grid_constant__ Args<T> args) {
    const Index first = args.part[0].chunks(), chunks = first + args.part[1].chunks();
    Sums sums{};
    for (Index chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const bool real = chunk < first;
        add_chunk_of(args.part[real ? 0 : 1], (real ? chunk : chunk - first) * logits_per_chunk, real, sums);
    }
    sums = block_sum(sums);
    if (gridDim.x > 1) {
        static_assert(gan_loss_max_blocks <= threads, "one thread for each block's sums");
        if (threadIdx.x == 0) args.of_block[blockIdx.x] = sums;
        cooperative_groups::this_grid().sync();
        if (blockIdx.x > 0) return;
        sums = block_sum(threadIdx.x < gridDim.x ? args.of_block[threadIdx.x] : Sums{});
    }
    if (threadIdx.x > 0) return;
    store(args.loss, static_cast<float>(sums.loss));
    if (args.metrics == nullptr) return;
    const double real_mean = args.part[0].mean;
    const double fake_mean = args.part[1].count > 0 ? args.part[1].mean : real_mean;  // or they are pairs
    args.metrics[0] = static_cast<float>(sums.real_logit * real_mean);
    args.metrics[1] = static_cast<float>(sums.fake_logit * fake_mean);
    args.metrics[2] = static_cast<float>(sums.real_positive * real_mean);
    args.metrics[3] = static_cast<float>(sums.fake_negative * fake_mean);
}

// How many blocks run at once, of those that are worth it. A debugger's or a sanitizer's additions to the kernel may
// leave less room than its own registers do.
template <class T>
Index resident_blocks(const char* name, Queue queue) {
    int blocks = 0;
    check(name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, gan_loss_kernel<T>, threads, 0));
    return Index{multiprocessors(name, queue)} * std::min(blocks, most_blocks);
}

template <class T>
void launch(const char* name, const Args<T>& args, Queue queue) {
    check(name, cudaSetDevice(queue.device));
    const Index chunks = args.part[0].chunks() + args.part[1].chunks();
    Index blocks = 1;
    if (chunks > chunks_for_one_block)
        blocks = std::min({chunks, Index{gan_loss_max_blocks}, resident_blocks<T>(name, queue)});
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.stream = static_cast<cudaStream_t>(queue.stream);
    config.attrs = &cooperative;
    config.numAttrs = blocks > 1 ? 1 : 0;
    check(name, cudaLaunchKernelEx(&config, gan_loss_kernel<T>, args));
    check(name, cudaGetLastError());
}

template <class T>
Part<T> part_of(LogitTerm term, const void* logits, void* grad, Index count) {
    return {static_cast<const T*>(logits),    nullptr, static_cast<T*>(grad), nullptr, count,
            1.0 / static_cast<double>(count), term};
}

template <class T>
Part<T> pairs_of(LogitTerm term, const void* logits, const void* other, void* grad, void* grad_other, Index count) {
    Part<T> part = part_of<T>(term, logits, grad, count);
    part.other = static_cast<const T*>(other);
    part.grad_other = static_cast<T*>(grad_other);
    return part;
}

template <class T>
void discriminator_loss_of(const DiscriminatorLoss& args, Queue queue) {
    const GanLossTerms terms = terms_of(args.kind, args.label_smoothing);
    Args<T> kernel_args{{}, static_cast<T*>(args.loss), args.metrics, static_cast<Sums*>(args.workspace)};
    if (terms.real.term == LossTerm::pair) {
        kernel_args.part[0] =
            pairs_of<T>(terms.real, args.real, args.fake, args.grad_real, args.grad_fake, args.real_count);
    } else {
        kernel_args.part[0] = part_of<T>(terms.real, args.real, args.grad_real, args.real_count);
        kernel_args.part[1] = part_of<T>(terms.fake, args.fake, args.grad_fake, args.fake_count);
    }
    launch("discriminator_loss", kernel_args, queue);
}

template <class T>
void generator_loss_of(const GeneratorLoss& args, Queue queue) {
    const LogitTerm term = terms_of(args.kind, 0.0f).generator;
    Args<T> kernel_args{{}, static_cast<T*>(args.loss), nullptr, static_cast<Sums*>(args.workspace)};
    kernel_args.part[0] = term.term == LossTerm::pair
                              ? pairs_of<T>(term, args.fake, args.real, args.grad_fake, args.grad_real, args.count)
                              : part_of<T>(term, args.fake, args.grad_fake, args.count);
    launch("generator_loss", kernel_args, queue);
}

}  // namespace

void discriminator_loss(const DiscriminatorLoss& args, Queue queue) {
    switch (args.dtype) {
        case Dtype::float32:
            return discriminator_loss_of<float>(args, queue);
        case Dtype::bfloat16:
            return discriminator_loss_of<__nv_bfloat16>(args, queue);
        case Dtype::float16:
            return discriminator_loss_of<__half>(args, queue);
    }
}

void generator_loss(const GeneratorLoss& args, Queue queue) {
    switch (args.dtype) {
        case Dtype::float32:
            return generator_loss_of<float>(args, queue);
        case Dtype::bfloat16:
            return generator_loss_of<__nv_bfloat16>(args, queue);
        case Dtype::float16:
            return generator_loss_of<__half>(args, queue);
    }
}

}  // namespace ganvas::cuda
