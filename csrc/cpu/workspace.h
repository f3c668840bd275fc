// Scratch memory that outlives a call: fresh pages cost more than the kernels that use them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ganvas::cpu {

// A block of the pool, handed back when this object ends. Contents are whatever the last user left. Thread-safe.
class Workspace {
  public:
    explicit Workspace(std::size_t bytes);  // throws std::bad_alloc
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    // The next so many of those bytes, aligned to a cache line: ask for padded(a) + padded(b) + ... in all.
    void* take(std::size_t bytes);
    static std::size_t padded(std::size_t bytes);

  private:
    std::byte* begin_;
    std::size_t bytes_;
    std::size_t used_ = 0;
};

// Bytes that the pool holds for later calls, and giving them back to the system.
std::size_t workspace_bytes_held();
void release_workspace();

}  // namespace ganvas::cpu
