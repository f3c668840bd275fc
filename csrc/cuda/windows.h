// Where a 2×2 window lies among the pixels of a batch of maps. Plain C++, as channels.h.
#pragma once

#include "channels.h"

namespace ganvas::cuda {

// The windows of a group's maps in a row. With `open`, those that an odd last row or column cuts off are counted too.
struct Windows {
    Index batch, height, width;  // of a group's maps
    Index high, wide;            // windows of a map
    bool open;

    Windows(Index batch, Index height, Index width, bool open)
        : batch(batch), height(height), width(width), high((height + open) / 2), wide((width + open) / 2), open(open) {}

    GANVAS_HOST_DEVICE Index count() const { return batch * high * wide; }
};

struct Window {
    Index first;        // pixel, of all groups' together
    int rows, columns;  // 2, or 1 where the map ends
    Index pooled;       // pixel of the pooled maps, or -1 where the window is cut off

    GANVAS_HOST_DEVICE Window(const Windows& windows, Index group, Index window) {
        Index image, y, x;
        if (windows.count() <= 0x7FFFFFFF) {  // division of 64 bits takes several times as long
            const auto at = static_cast<std::uint32_t>(window), wide = static_cast<std::uint32_t>(windows.wide);
            const std::uint32_t row = at / wide, of_image = row / static_cast<std::uint32_t>(windows.high);
            image = of_image, x = at - row * wide, y = row - of_image * static_cast<std::uint32_t>(windows.high);
        } else {
            const Index row = window / windows.wide;
            image = row / windows.high, x = window - row * windows.wide, y = row - image * windows.high;
        }
        image += group * windows.batch;
        first = (image * windows.height + 2 * y) * windows.width + 2 * x;
        rows = 2 * y + 1 < windows.height ? 2 : 1;
        columns = 2 * x + 1 < windows.width ? 2 : 1;
        const Index pooled_high = windows.height / 2, pooled_wide = windows.width / 2;
        pooled = y < pooled_high && x < pooled_wide ? (image * pooled_high + y) * pooled_wide + x : -1;
    }
};

}  // namespace ganvas::cuda
