// What every library of kernels for the processor offers beside them. Included once in each.
#pragma once

#include <exception>
#include <string>

#include "cuda_runtime.h"

namespace on_host {

inline std::string message;

// The text of the error that `call` throws, empty if there was none.
template <class Call>
const char* message_of(Call call) {
    message.clear();
    try {
        call();
    } catch (const std::exception& error) {
        message = error.what();
    }
    return message.c_str();
}

}  // namespace on_host

extern "C" {

inline __attribute__((used)) int launches() {
    return on_host::launches;
}

inline __attribute__((used)) unsigned last_grid() {
    return on_host::last_grid;
}

inline __attribute__((used)) void set_multiprocessors(int count) {
    on_host::multiprocessors = count;
}

inline __attribute__((used)) void set_resident_blocks(int count) {
    on_host::resident_blocks = count;
}

// Since the last call, in whole vectors of 16 bytes.
inline __attribute__((used)) long vectors_read() {
    return on_host::vectors_read.exchange(0);
}

inline __attribute__((used)) long vectors_written() {
    return on_host::vectors_written.exchange(0);
}

inline __attribute__((used)) void set_last_first(bool last_first) {
    on_host::last_first = last_first;
}

inline __attribute__((used)) void fail_next_launch() {
    on_host::next_error = cudaErrorCooperativeLaunchTooLarge;
}
}
