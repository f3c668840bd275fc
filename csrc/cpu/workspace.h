// Scratch memory that outlives a call: fresh pages cost more than the kernels that use them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>

namespace ganvas::cpu {

// A block of the pool, handed back when this object ends. Contents are whatever the last user left. Thread-safe.
class Workspace {
  public:
    static constexpr int shared = -1, tensor = -2;

    // For all threads of a team, or for one of them: that is a block which no other has written to, so that none of its
    // lines lies in another core's cache. Or for a tensor: what finds no room in the pool then goes back to the system,
    // and drives out nothing. Throws std::bad_alloc.
    explicit Workspace(std::size_t bytes, int thread = shared);
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    // The next so many of those bytes, aligned to a cache line: ask for padded(a) + padded(b) + ... in all.
    void* take(std::size_t bytes);
    std::byte* begin() const { return begin_; }
    std::size_t bytes() const { return bytes_; }  // at least as many as were asked for
    static std::size_t padded(std::size_t bytes);

  private:
    friend class ThreadWorkspaces;
    std::byte* begin_ = nullptr;
    std::size_t bytes_;
    std::size_t used_ = 0;
    int thread_;
};

// Bytes for so many, padded.
std::size_t floats(std::int64_t count);

// So many bytes for each thread of a team.
class ThreadWorkspaces {
  public:
    ThreadWorkspaces(std::size_t bytes, int threads);  // throws std::bad_alloc
    ~ThreadWorkspaces();
    char* of(std::int64_t thread) const;

  private:
    std::deque<Workspace> blocks_;
};

// Bytes that the pool holds for later calls, and giving them back to the system.
std::size_t workspace_bytes_held();
void release_workspace();

}  // namespace ganvas::cpu
