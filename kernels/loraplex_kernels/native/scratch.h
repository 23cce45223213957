// Memory handed out in aligned pieces, and this thread's tiles.

#pragma once

#include <cstdint>
#include <optional>

#include "amx.h"

namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

constexpr int64_t kGrowth = 3;  // a std::vector that grows: twice what it holds, and what it held before

// Tile loads are not seen as reads of memory by the compiler: what was written must be there.
inline void written() { asm volatile("" ::: "memory"); }

template <typename T>
inline T* aligned(T* at) {
    return reinterpret_cast<T*>(round_up(reinterpret_cast<int64_t>(at), 64));
}

#if LORAPLEX_AMX
// Tiles for this thread as long as it lives, where the system grants them.
class TileScope {
  public:
    TileScope() {
        if (amx_is_permitted()) tiles_.emplace();
    }

  private:
    std::optional<Tiles> tiles_;
};
#else
struct TileScope {
    TileScope() {}
};
#endif

// Hands out one thread's memory, 64 bytes aligned throughout.
class Carver {
  public:
    explicit Carver(void* at) : at_(static_cast<char*>(at)) {}
    template <typename T>
    T* take(int64_t count) {
        T* taken = reinterpret_cast<T*>(at_);
        at_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return taken;
    }

  private:
    char* at_;
};

}  // namespace
