// Threads that go through the phases of a step together, inside one parallel region.

#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kSpins = 2000;  // some tens of microseconds: then the core is left to others

// One phase of the work: its tasks are numbered from 0 and taken one at a time with `next`. It is over
// when a thread has left it, as none was left to take, and no thread is inside: a thread that comes late
// finds it over, and only one that lost its core in the midst of a task is waited for.
class PhaseState {
  public:
    alignas(64) std::atomic<int64_t> next{0};

    // `work(next)` takes tasks until there are none. What all threads wrote is seen by all that return.
    template <typename Work>
    void share(Work&& work) {
        start(work);
        wait();
    }

    // The same without waiting for the others' last tasks: `wait` does, whenever what they wrote is needed.
    template <typename Work>
    void start(Work&& work) {
        if (is_over()) return;
        state_.fetch_add(1);
        work(next);
        state_.fetch_add(kLeft - 1);
    }

    void wait() const {
        for (int spins = 0; !is_over(); ++spins) {
            if (spins >= kSpins) {
                sched_yield();
                continue;
            }
#if defined(__x86_64__)
            _mm_pause();
#endif
        }
    }

    void reset() {
        next.store(0, std::memory_order_relaxed);
        state_.store(0, std::memory_order_relaxed);
    }

  private:
    static constexpr int64_t kLeft = int64_t{1} << 32;

    bool is_over() const {
        const int64_t state = state_.load(std::memory_order_acquire);
        return state >= kLeft && state % kLeft == 0;
    }

    alignas(64) std::atomic<int64_t> state_{0};  // threads inside, and kLeft times those that have left
};

inline bool is_from_back(int thread) { return thread % 2; }

// One of `count` tasks, or `count` when none is left. Threads come from either end, in halves of 32 bits of
// `next`, and so mostly to the same rows in every phase: these are still in their core's cache.
inline int64_t take(std::atomic<int64_t>& next, int64_t count, bool from_back) {
    constexpr int64_t kBack = int64_t{1} << 32;
    const int64_t before = next.fetch_add(from_back ? kBack : 1);
    const int64_t front = before % kBack, back = before / kBack;
    if (front + back >= count) return count;
    return from_back ? count - 1 - back : front;
}

// Takes tasks of `next` below `count`.
template <typename Work>
inline void each_task(std::atomic<int64_t>& next, int64_t count, bool from_back, Work&& work) {
    for (int64_t task = take(next, count, from_back); task < count; task = take(next, count, from_back)) work(task);
}

}  // namespace
