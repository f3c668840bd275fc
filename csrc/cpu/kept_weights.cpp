// The part that is compiled once: the store, and the choice of instruction set.
#include "kept_weights.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "parallel.h"

namespace ganvas::cpu {
namespace {

constexpr std::size_t held_limit = std::size_t{256} << 20;
constexpr std::size_t entries_most = 4096;
constexpr std::align_val_t line{64};
constexpr std::int64_t piece_bytes = 16 << 10;  // of a weight, of which a thread takes the digest

Digest take_digest(const unsigned char* bytes, std::int64_t count) {
    GANVAS_DISPATCH(take_digest(bytes, count));
}

// The same for any number of threads.
Digest digest_of(const float* numbers, std::int64_t count, int threads) {
    const auto* const bytes = reinterpret_cast<const unsigned char*>(numbers);
    const std::int64_t size = count * static_cast<std::int64_t>(sizeof(float));
    const std::int64_t pieces = (size + piece_bytes - 1) / piece_bytes;
    std::vector<Digest> of_pieces(static_cast<std::size_t>(pieces));
    const int team = team_size(size, threads);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (std::int64_t piece = 0; piece < pieces; ++piece)
        of_pieces[static_cast<std::size_t>(piece)] =
            take_digest(bytes + piece * piece_bytes, std::min(piece_bytes, size - piece * piece_bytes));
    if (pieces == 1) return of_pieces[0];
    return take_digest(reinterpret_cast<const unsigned char*>(of_pieces.data()),
                       pieces * static_cast<std::int64_t>(sizeof(Digest)));
}

}  // namespace

// What is known of a weight: that it was there, and from the second time on its form.
struct KeptWeight::Entry {
    Digest digest;
    WeightForm form;
    std::size_t bytes;
    void* memory = nullptr;  // null: only that it was there

    Entry(const Digest& digest, const WeightForm& form, std::size_t bytes) : digest(digest), form(form), bytes(bytes) {}
    ~Entry() { ::operator delete(memory, line); }
    Entry(const Entry&) = delete;
    Entry& operator=(const Entry&) = delete;
    bool is_like(const Entry& other) const {
        return bytes == other.bytes && std::memcmp(&digest, &other.digest, sizeof digest) == 0 &&
               std::memcmp(&form, &other.form, sizeof form) == 0;
    }
};

// Past a limit it starts afresh: what lies idle is of weights that are no longer asked for.
class WeightStore {
  public:
    using Entry = std::shared_ptr<KeptWeight::Entry>;

    // Never destroyed: a kernel may still run in another thread while the process ends.
    static WeightStore& instance() {
        static WeightStore* const store = new WeightStore;
        return *store;
    }
    std::size_t held() {
        const std::lock_guard lock(mutex_);
        return held_;
    }
    // What is known of the weight. Null: nothing was, and now it is known to be there.
    Entry find(const Entry& weight) {
        const std::lock_guard lock(mutex_);
        for (const Entry& known : entries_)
            if (known->is_like(*weight)) return known;
        if (entries_.size() >= entries_most) clear();
        entries_.push_back(weight);
        return nullptr;
    }
    // Takes a form that is made, if another call was not faster.
    void add(const Entry& form) {
        const std::lock_guard lock(mutex_);
        const auto known =
            std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e->is_like(*form); });
        if (known != entries_.end()) {
            if ((*known)->memory) return;
            entries_.erase(known);
        }
        if (held_ + form->bytes > held_limit) clear();
        entries_.push_back(form);
        held_ += form->bytes;
    }
    void release() {
        const std::lock_guard lock(mutex_);
        clear();
    }

  private:
    void clear() {
        entries_.clear();
        held_ = 0;
    }

    std::mutex mutex_;
    std::vector<Entry> entries_;  // whoever reads one holds it too
    std::size_t held_ = 0;
};

std::int64_t dense_numbers(const ConvolutionShape& shape, const ConvolutionWeight& w) {
    const std::int64_t numbers = shape.out_channels * shape.in_channels * shape.rows.size * shape.columns.size;
    const std::int64_t last = (shape.out_channels - 1) * w.out + (shape.in_channels - 1) * w.in +
                              (shape.rows.size - 1) * w.row + (shape.columns.size - 1) * w.column;
    return last + 1 == numbers ? numbers : 0;
}

KeptWeight::KeptWeight(const float* numbers, std::int64_t count, const WeightForm& form, std::size_t bytes,
                       int threads) {
    if (count == 0 || bytes > held_limit) return;
    auto weight = std::make_shared<Entry>(digest_of(numbers, count, threads), form, bytes);
    const auto known = WeightStore::instance().find(weight);
    if (!known) return;
    made_ = known->memory != nullptr;
    if (made_) {
        entry_ = known;
        return;
    }
    weight->memory = ::operator new(bytes, line);
    entry_ = std::move(weight);
}

KeptWeight::~KeptWeight() = default;

void* KeptWeight::memory() const {
    return entry_ ? entry_->memory : nullptr;
}

void KeptWeight::keep() {
    if (entry_ && !made_) WeightStore::instance().add(entry_);
}

std::size_t kept_weight_bytes() {
    return WeightStore::instance().held();
}

void release_kept_weights() {
    WeightStore::instance().release();
}

}  // namespace ganvas::cpu
