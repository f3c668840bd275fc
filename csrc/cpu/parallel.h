// How work is spread over threads and memory.
#pragma once

#include <cstdint>

namespace ganvas::cpu {

// The number of threads to open a team with: at most `threads`, one where the work is not worth waking a second for,
// and one in a forked child: libgomp's threads do not survive fork, and a team there would wait for them forever.
int team_size(std::int64_t bytes_touched, int threads);

// Memory traffic above this many bytes goes past the cache: nothing of it would still be there when it is read again.
std::int64_t cache_bytes();

// Asks for 2 MiB pages under a result that is about to be written, perhaps for the first time: the C library gives
// large blocks back to the system when they are freed, and with 4 KiB pages the faults cost several times what writing
// costs.
void expect_first_touch(void* begin, std::int64_t bytes);

}  // namespace ganvas::cpu
