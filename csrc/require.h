// Checks of arguments.
#pragma once

#include <sstream>
#include <stdexcept>

namespace ganvas {

// Throws std::invalid_argument unless `holds`. The parts become one message only where it is thrown: the strings of ten
// checks take longer than a small kernel.
template <class... Parts>
void require(bool holds, const Parts&... message) {
    if (holds) return;
    std::ostringstream text;
    (text << ... << message);
    throw std::invalid_argument(text.str());
}

}  // namespace ganvas
