// Activations as the tiles' right operands.

#pragma once

#include <algorithm>

#include "amx.h"
#include "lanes.h"
#include "scratch.h"

namespace {

constexpr int64_t kBlock = 64;  // weights that share an absmax; k of two tiles

// The k that share a pair lie apart in a block of codes: looked up four at a time, they need no
// interleaving. Activations are packed in the same order, and so is an adapter's A (granules.py).
// (`kNatural` for bf16 weights.)
enum class Order { kCodes, kNatural };

// Elements of packed activations: [ceil(rows / 16)][ceil(k / 64)][2][16 pairs of k][16 rows][2].
inline int64_t packed_size(int64_t rows, int64_t k) { return ceil_div(rows, kTile) * kTile * round_up(k, kBlock); }

#if LORAPLEX_AMX

// Element of a block of 64 that lies at place p of its two tiles.
constexpr int64_t place_in_codes(int64_t p) { return p % 16 * 4 + p / 16; }

struct PlaceTable {
    alignas(64) uint16_t at[kBlock];
    PlaceTable() {
        for (int64_t p = 0; p < kBlock; ++p) at[p] = static_cast<uint16_t>(place_in_codes(p));
    }
};

// Up to 64 k of up to 16 rows of x, whose rows lie `stride` apart; what is beyond is zero.
inline void pack_block(const bf16* x, int64_t stride, int64_t rows, int64_t k, bf16* packed, Order order) {
    static const PlaceTable places;
    __m512i first[16], second[16];
    const __mmask32 first_k = first_of_32(k), second_k = k > 32 ? first_of_32(k - 32) : 0;
    const __m512i low = _mm512_load_si512(places.at), high = _mm512_load_si512(places.at + 32);
    for (int64_t r = 0; r < kTile; ++r) {
        if (r >= rows) {
            first[r] = second[r] = _mm512_setzero_si512();
            continue;
        }
        const __m512i a = _mm512_maskz_loadu_epi16(first_k, x + r * stride);
        const __m512i b = _mm512_maskz_loadu_epi16(second_k, x + r * stride + 32);
        first[r] = order == Order::kCodes ? _mm512_permutex2var_epi16(a, low, b) : a;
        second[r] = order == Order::kCodes ? _mm512_permutex2var_epi16(a, high, b) : b;
    }
    transpose(first);
    transpose(second);
    for (int64_t i = 0; i < kTile; ++i) {
        _mm512_storeu_si512(packed + i * 32, first[i]);
        _mm512_storeu_si512(packed + kTileElements + i * 32, second[i]);
    }
}

// Rows 16 * group.. of x [rows, k].
inline void pack_group(const bf16* x, int64_t rows, int64_t k, int64_t group, bf16* packed, Order order) {
    const int64_t lo = group * kTile, count = std::min(kTile, rows - lo);
    packed += lo * round_up(k, kBlock);
    for (int64_t at = 0; at < k; at += kBlock)
        pack_block(x + lo * k + at, k, count, std::min(kBlock, k - at), packed + at * kTile, order);
}

#endif

}  // namespace
