// Memory that is asked for in the order of its addresses, some lines at a time, while something else is
// computed.

#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"

namespace {

class Stream {
  public:
    // What there is no place for is not asked for.
    template <typename T>
    void push(const T* from, int64_t count) {
        const char* const at = reinterpret_cast<const char*>(from);
        const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
        if (last_ == kMost) {
            std::copy(ranges_ + first_, ranges_ + last_, ranges_);
            last_ -= first_, first_ = 0;
        }
        if (last_ > first_ && ranges_[last_ - 1].end == at)
            ranges_[last_ - 1].end += bytes;
        else if (last_ < kMost)
            ranges_[last_++] = {at, at + bytes};
        else
            return;
        bytes_ += bytes;
    }
    // All in so many shares.
    void over(int64_t shares) { share_ = bytes_ / 64 / std::max<int64_t>(1, shares) + 1; }
    // So much at once, and then as much with each share.
    void ahead(int64_t first_bytes, int64_t bytes_a_share) {
        ask(first_bytes / 64);
        share_ = bytes_a_share / 64;
    }
    void share(int64_t count = 1) { ask(count * share_); }
    void rest() {
        ask(bytes_ / 64 + 1);
        first_ = last_ = bytes_ = share_ = 0;
    }

  private:
    static constexpr int kMost = 64, kIntoL2 = 2;  // `__builtin_prefetch` calls it locality
    struct Range {
        const char *at, *end;
    };

    void ask(int64_t lines) {
        while (lines > 0 && first_ < last_) {
            Range& range = ranges_[first_];
            const char *at = range.at, *const end = std::min(range.end, at + 64 * lines);
            lines -= (end - at + 63) / 64;
            for (; at < end; at += 64) __builtin_prefetch(at, 0, kIntoL2);
            range.at = at;
            if (at >= range.end) ++first_;
        }
    }

    Range ranges_[kMost];
    int64_t first_ = 0, last_ = 0, bytes_ = 0, share_ = 0;
};

}  // namespace
