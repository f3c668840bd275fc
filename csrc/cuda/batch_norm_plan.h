// How batch norm's passes are cut up: what the kernels' launches and the size of their workspace agree on.
#pragma once

#include "batch_norm_leaky_relu.h"
#include "channels.h"

namespace ganvas::cuda {

// Blocks of a multiprocessor: __launch_bounds__ keeps registers few enough for them. Each pass has at least 32 KiB on
// their way to a multiprocessor: what an H200's memory delivers to it in 0.9 µs, more than it takes to answer.
constexpr int statistics_blocks = 2, apply_blocks = 3, backward_blocks = 2;

// Vectors of each array that a thread reads at once.
GANVAS_HOST_DEVICE constexpr int statistics_unroll(int element_bytes) {
    return element_bytes == 4 ? 8 : 4;
}
constexpr int apply_unroll = 4;
constexpr int backward_unroll = 4;
constexpr int few_unroll = 3;  // where registers allow no more: three arrays are read, or the activation comes first

// The arrays' rows, the groups' beginnings and ends included in what bounds an access.
inline Tiling tiling_of(const BatchNormShape& shape, std::initializer_list<const void*> arrays) {
    const Index rows = shape.rows / shape.groups;
    const int bytes = element_bytes(shape.dtype);
    return tiling_of_rows(bytes, rows, shape.channels, shape.groups,
                          widest_access(arrays, rows * shape.channels * bytes));
}

// Tiles of statistics that a pass leaves for each group.
GANVAS_HOST_DEVICE inline Index tiles_of(const Tiling& tiling) {
    return tiling.slices * tiling.pack;
}

}  // namespace ganvas::cuda
