// Compiled once per instruction set.
#include "kept_weights.h"
#include "vector.h"

namespace ganvas::cpu::GANVAS_ISA {
namespace {

constexpr Index chains = 8;                                      // that are mixed side by side
constexpr Index vectors_kept = sizeof(Digest) / sizeof(Vector);  // of them in the end
constexpr Index block_bytes = chains * static_cast<Index>(sizeof(VectorBits));

// Of two states, or of two words mixed into one state, no two results are the same.
inline VectorBits mixed(VectorBits state, VectorBits words) {
    const VectorBits product = (state ^ words) * 0x9E3779B1u;
    return (product << 15) | (product >> 17);
}

inline VectorBits load_words(const unsigned char* bytes) {
    VectorBits words;
    std::memcpy(&words, bytes, sizeof words);
    return words;
}

void mix_block(const unsigned char* bytes, VectorBits (&state)[chains]) {
    for (Index i = 0; i < chains; ++i)
        state[i] = mixed(state[i], load_words(bytes + i * static_cast<Index>(sizeof(VectorBits))));
}

}  // namespace

Digest take_digest(const unsigned char* bytes, std::int64_t count) {
    VectorBits state[chains];
    for (Index i = 0; i < chains; ++i) state[i] = VectorBits{} + static_cast<std::uint32_t>(i + 1);
    for (; count >= block_bytes; count -= block_bytes, bytes += block_bytes) mix_block(bytes, state);
    if (count > 0) {
        unsigned char rest[block_bytes] = {};
        std::memcpy(rest, bytes, static_cast<std::size_t>(count));
        mix_block(rest, state);
    }
    for (Index i = vectors_kept; i < chains; ++i) state[i % vectors_kept] = mixed(state[i % vectors_kept], state[i]);
    Digest digest;
    std::memcpy(digest.words, state, sizeof digest.words);
    return digest;
}

}  // namespace ganvas::cpu::GANVAS_ISA
