// bfloat16, float and sixteen floats at once: what every op is written in.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// Of the whole library. OpenMP's own setting is a thread's, and steps run on a thread of their own.
[[gnu::visibility("hidden")]] inline int num_threads = 1;

namespace {

// Multiplications from which a second thread pays for being woken: 70 us (measured) under OpenMP's
// passive waiting, which leaves the cores to others.
constexpr int64_t kWorthWaking = 1'000'000;

struct bf16 {
    uint16_t bits;
};

inline float load(const float* p, int64_t i) { return p[i]; }

inline float load(const bf16* p, int64_t i) {
    uint32_t word = static_cast<uint32_t>(p[i].bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

inline void store(float* p, int64_t i, float value) { p[i] = value; }

inline void store(bf16* p, int64_t i, float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;  // to nearest, ties to even
    bool nan = (word & 0x7fffffffu) > 0x7f800000u;
    p[i].bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

// e^x to a few units in the last place, in operations that vectorise: e^x = 2^n e^r with |r| <= ln 2 / 2
// and a Taylor polynomial for e^r. Below -87 it gives about 1e-38 instead of a denormal.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.f), 88.f);
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float p = 1.f / 5040.f;
    p = p * r + 1.f / 720.f;
    p = p * r + 1.f / 120.f;
    p = p * r + 1.f / 24.f;
    p = p * r + 1.f / 6.f;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

// kLanes floats at once, whatever the processor's own vectors hold. Every row keeps the same order of
// additions in each lane and across lanes, however many rows share a pass.
constexpr int64_t kLanes = 16;
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
using Bits16 = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));
using Bits32 = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));

inline Lanes load_lanes(const float* p) {
    Lanes value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

inline Lanes load_lanes(const bf16* p) {
    Bits16 half;
    std::memcpy(&half, p, sizeof half);
    const Bits32 word = __builtin_convertvector(half, Bits32) << 16;
    Lanes value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

inline void store_lanes(float* p, Lanes value) { std::memcpy(p, &value, sizeof value); }

inline void store_lanes(bf16* p, Lanes value) {
    Bits32 word;
    std::memcpy(&word, &value, sizeof word);
    const Bits32 rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    const auto nan = (word & 0x7fffffffu) > 0x7f800000u;
    const Bits16 half = __builtin_convertvector(nan ? Bits32{} + 0x7fc0u : rounded, Bits16);
    std::memcpy(p, &half, sizeof half);
}

// Halves onto each other until four are left.
inline float sum_lanes(Lanes value) {
    using Half = float __attribute__((vector_size(sizeof(Lanes) / 2)));
    using Quarter = float __attribute__((vector_size(sizeof(Lanes) / 4)));
    Half half[2];
    std::memcpy(half, &value, sizeof value);
    half[0] += half[1];
    Quarter quarter[2];
    std::memcpy(quarter, half, sizeof half[0]);
    quarter[0] += quarter[1];
    return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

}  // namespace
