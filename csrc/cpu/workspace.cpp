#include "workspace.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

#include "parallel.h"

namespace ganvas::cpu {
namespace {

constexpr std::size_t line = 64;
constexpr std::size_t page = std::size_t{2} << 20;
constexpr std::size_t held_limit = std::size_t{1} << 30;
constexpr std::size_t tensors_limit = held_limit / 4 * 3;  // so that theirs leaves room for scratch

struct Block {
    std::byte* begin;
    std::size_t bytes;
    int thread;
};

struct Pool {
    std::mutex mutex;
    std::vector<Block> free;
    std::size_t held = 0;
};

// Never destroyed: a kernel may still run in another thread while the process ends.
Pool& pool() {
    static Pool* const instance = new Pool;
    return *instance;
}

}  // namespace

Workspace::Workspace(std::size_t bytes, int thread) : bytes_(0), thread_(thread) {
    if (bytes == 0) return;
    {
        Pool& p = pool();
        const std::lock_guard lock(p.mutex);
        // The smallest that is large enough; not one far too large, which another call may want.
        auto best = p.free.end();
        for (auto block = p.free.begin(); block != p.free.end(); ++block)
            if (block->thread == thread && block->bytes >= bytes && block->bytes / 8 <= bytes + page &&
                (best == p.free.end() || block->bytes < best->bytes))
                best = block;
        if (best != p.free.end()) {
            begin_ = best->begin;
            bytes_ = best->bytes;
            p.held -= bytes_;
            p.free.erase(best);
            return;
        }
    }
    bytes_ = std::max((bytes + page - 1) / page, std::size_t{1}) * page;
    begin_ = static_cast<std::byte*>(::operator new(bytes_, std::align_val_t{page}));
    expect_first_touch(begin_, static_cast<std::int64_t>(bytes_));
}

// Past the limit the pool starts afresh, but for tensors: what lies idle is of sizes that are no longer asked for.
Workspace::~Workspace() {
    if (!begin_) return;
    const std::size_t held = workspace_bytes_held() + bytes_;
    if (thread_ == tensor && held > tensors_limit) {
        ::operator delete(begin_, std::align_val_t{page});
        return;
    }
    if (held > held_limit) release_workspace();
    Pool& p = pool();
    const std::lock_guard lock(p.mutex);
    p.free.push_back({begin_, bytes_, thread_});
    p.held += bytes_;
}

void* Workspace::take(std::size_t bytes) {
    std::byte* first = begin_ + used_;
    used_ += padded(bytes);
    return first;
}

std::size_t Workspace::padded(std::size_t bytes) {
    return (bytes + line - 1) / line * line;
}

std::size_t floats(std::int64_t count) {
    return Workspace::padded(static_cast<std::size_t>(count) * sizeof(float));
}

ThreadWorkspaces::ThreadWorkspaces(std::size_t bytes, int threads) {
    for (int thread = 0; thread < threads; ++thread) blocks_.emplace_back(bytes, thread);
}

ThreadWorkspaces::~ThreadWorkspaces() = default;

char* ThreadWorkspaces::of(std::int64_t thread) const {
    return reinterpret_cast<char*>(blocks_[static_cast<std::size_t>(thread)].begin_);
}

std::size_t workspace_bytes_held() {
    Pool& p = pool();
    const std::lock_guard lock(p.mutex);
    return p.held;
}

void release_workspace() {
    std::vector<Block> blocks;
    {
        Pool& p = pool();
        const std::lock_guard lock(p.mutex);
        blocks.swap(p.free);
        p.held = 0;
    }
    for (const Block& block : blocks) ::operator delete(block.begin, std::align_val_t{page});
}

}  // namespace ganvas::cpu
