// How work is spread over threads and memory.
#pragma once

#include <cstdint>
#include <memory>

namespace ganvas::cpu {

// The number of threads to open a team with: at most `threads`, one where the work is not worth waking a second for,
// and one in a forked child: libgomp's threads do not survive fork, and a team there would wait for them forever.
int team_size(std::int64_t bytes_touched, int threads);

// Numbers 0 to count - 1, handed out one by one to the threads of a team. Each takes those of its own share first,
// which is the same from pass to pass: what it wrote of them may still lie in its cache. Then it takes what others have
// left.
class Shares {
  public:
    Shares(std::int64_t count, int threads);
    ~Shares();
    std::int64_t take(std::int64_t thread);  // -1 where none is left

  private:
    struct Share;
    std::int64_t threads_;
    std::unique_ptr<Share[]> shares_;
};

// Memory traffic above this many bytes goes past the cache: nothing of it would still be there when it is read again.
std::int64_t cache_bytes();

// Whether an array that is written once goes past the cache: its rows are whole lines, and of so many bytes little
// would still be there when it is read.
bool goes_past_cache(const void* array, std::int64_t rows, std::int64_t row_bytes);

// Of the cache that a core has for itself, the second level.
std::int64_t core_cache_bytes();

// Whether the third level is far from a core, as on Intel's processors: what is read from it next is worth asking for
// early. On AMD's the hardware is faster by itself.
bool shared_cache_is_far();

// Asks for 2 MiB pages under a result that is about to be written, perhaps for the first time: the C library gives
// large blocks back to the system when they are freed, and with 4 KiB pages the faults cost several times what writing
// costs.
void expect_first_touch(void* begin, std::int64_t bytes);

}  // namespace ganvas::cpu
