// Weights as kernels multiply by them, kept from call to call where nothing is trained. A weight is known by its
// numbers, not by where they lie: whoever changes them, and however, need not say so. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "convolution.h"
#include "isa.h"

namespace ganvas::cpu {

// Of an array of bytes. Arrays that differ in one 32-bit word never have the same one, others once in 2³² at most.
struct Digest {
    std::uint32_t words[16];
};

// Beside the numbers, all that a kernel's form of them hangs on: which kernel (its number comes first), strides, sizes.
struct WeightForm {
    std::int64_t values[16];  // 0 where there are fewer
};
constexpr std::int64_t winograd_form = 1, direct_form = 2;

// How many numbers a convolution's weight has, if they lie in one piece of memory; else 0.
std::int64_t dense_numbers(const ConvolutionShape& shape, const ConvolutionWeight& weight);

// The form of a weight, in a call that may come again with the same one.
class KeptWeight {
  public:
    // Of the `count` numbers of a weight; 0: nothing is kept. The second call of a weight gets memory for its form, and
    // later ones find it made.
    KeptWeight(const float* numbers, std::int64_t count, const WeightForm& form, std::size_t bytes, int threads);
    ~KeptWeight();
    KeptWeight(const KeptWeight&) = delete;
    KeptWeight& operator=(const KeptWeight&) = delete;

    // Where it is, or is to be made, aligned to a cache line; null: elsewhere.
    void* memory() const;
    bool is_made() const { return made_; }
    // The caller has made it, all of it: later calls may find it.
    void keep();

  private:
    struct Entry;
    std::shared_ptr<Entry> entry_;
    bool made_ = false;

    friend class WeightStore;
};

std::size_t kept_weight_bytes();
void release_kept_weights();

#define DECLARE(isa)                                                    \
    namespace isa {                                                     \
    Digest take_digest(const unsigned char* bytes, std::int64_t count); \
    }
GANVAS_FOR_EACH_ISA(DECLARE)
#undef DECLARE

}  // namespace ganvas::cpu
