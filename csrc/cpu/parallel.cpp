#include "parallel.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>

namespace ganvas::cpu {
namespace {

std::atomic<bool> in_forked_child{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

constexpr std::int64_t large_page = 2 << 20;
constexpr std::int64_t bytes_per_thread = 192 << 10;  // some 10 µs of work: less is not worth waking a thread for

// Of the third level, as Linux has it, in bytes; 0 where it does not say. sysconf() has all of an AMD processor's, of
// which a core reaches a part.
std::int64_t shared_cache_bytes() {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    std::int64_t size = 0;
    char unit = 'B';
    file >> size >> unit;
    return size * (unit == 'K' ? 1 << 10 : unit == 'M' ? 1 << 20 : 1);
}

}  // namespace

int team_size(std::int64_t bytes_touched, int threads) {
    if (in_forked_child) return 1;
    return static_cast<int>(std::clamp<std::int64_t>(bytes_touched / bytes_per_thread, 1, std::max(threads, 1)));
}

struct alignas(64) Shares::Share {
    std::atomic<std::int64_t> next;
    std::int64_t end;
};

Shares::Shares(std::int64_t count, int threads) : threads_(threads), shares_(new Share[threads]) {
    for (std::int64_t thread = 0; thread < threads; ++thread) {
        shares_[thread].next = count * thread / threads;
        shares_[thread].end = count * (thread + 1) / threads;
    }
}

Shares::~Shares() = default;

std::int64_t Shares::take(std::int64_t thread) {
    for (std::int64_t i = 0; i < threads_; ++i) {
        Share& share = shares_[(thread + i) % threads_];
        if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
        const std::int64_t number = share.next.fetch_add(1, std::memory_order_relaxed);
        if (number < share.end) return number;
    }
    return -1;
}

std::int64_t cache_bytes() {
    static const std::int64_t bytes = [] {
        std::int64_t found = shared_cache_bytes();
#if defined(_SC_LEVEL3_CACHE_SIZE)
        if (found == 0) found = sysconf(_SC_LEVEL3_CACHE_SIZE);
        found = std::max<std::int64_t>(found, sysconf(_SC_LEVEL2_CACHE_SIZE));
#endif
        return std::max<std::int64_t>(found, 4 << 20);
    }();
    return bytes;
}

bool goes_past_cache(const void* array, std::int64_t rows, std::int64_t row_bytes) {
    return row_bytes % 64 == 0 && reinterpret_cast<std::uintptr_t>(array) % 64 == 0 &&
           8 * rows * row_bytes >= cache_bytes();
}

std::int64_t core_cache_bytes() {
    static const std::int64_t bytes = [] {
        std::int64_t found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
        found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        return std::max<std::int64_t>(found, 512 << 10);
    }();
    return bytes;
}

bool shared_cache_is_far() {
#if defined(__x86_64__)
    static const bool is_far = [] {
        __builtin_cpu_init();
        return __builtin_cpu_is("intel") != 0;
    }();
    return is_far;
#else
    return false;
#endif
}

void expect_first_touch(void* begin, std::int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    if (bytes < 2 * large_page) return;
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(begin) + page - 1) / page * page;
    const std::uintptr_t last =
        (reinterpret_cast<std::uintptr_t>(begin) + static_cast<std::uintptr_t>(bytes)) / page * page;
    // Advice only: where the system has no such pages the call fails and nothing is lost.
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    static_cast<void>(begin), static_cast<void>(bytes);
#endif
}

}  // namespace ganvas::cpu
