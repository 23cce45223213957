// What becomes of a product's sums: rows of bf16, a share of the residual, q and k turned and k and v in their
// cache, what SiLU gates. And how sums lie: panels of outputs, chunks of rows.
//
// A chunk's sums lie transposed, as the tiles leave them; `to_rows` turns them round for those that need rows.

#pragma once

#include <array>

#include "amx.h"
#include "elementwise.h"
#include "lanes.h"
#include "packed.h"

namespace {

constexpr int64_t kPanel = 2 * kTile;  // outputs that are computed at a time
constexpr int64_t kChunk = 2 * kTile;  // rows that are computed at a time

#if LORAPLEX_AMX

// Outputs lo..hi of a linear, at `place` of each row of a result.
struct Run {
    int64_t lo, hi, place;
};

// Two times up to 16 outputs, from `first[half]` on, that are computed together.
struct Panel {
    int64_t first[2], outputs[2];  // outputs 0: nothing

    std::array<Run, 2> runs() const {  // one of them, and an empty one, where the halves meet
        if (first[1] == first[0] + kTile) return {{{first[0], first[0] + outputs[0] + outputs[1], 0}, {0, 0, 0}}};
        return {{{first[0], first[0] + outputs[0], 0}, {first[1], first[1] + outputs[1], kTile}}};
    }
};

// Sums of rows lo..hi: at[half][group][16 outputs][16 rows].
struct Sums {
    Panel panel;
    int64_t lo, hi;
    float* at;
    int halves() const { return panel.outputs[1] > 0 ? 2 : 1; }
    int groups() const { return hi - lo > kTile ? 2 : 1; }
};

// Part of a panel's result: y[row * kPanel + half * 16 + i] is output `panel.first[half] + i` of row
// `lo + row`, fp32, for rows lo..hi.
struct Result {
    const Panel& panel;
    int64_t lo, hi;
    float* y;
};

// Sums as rows: y[row][half * 16 + output].
inline void to_rows(const Sums& sums, float* y) {
    for (int half = 0; half < sums.halves(); ++half)
        for (int group = 0; group < sums.groups(); ++group) {
            __m512i v[kTile];
            const float* const from = sums.at + (half * 2 + group) * 256;
            for (int64_t i = 0; i < kTile; ++i) v[i] = _mm512_load_si512(from + i * kTile);
            transpose(v);
            float* const to = y + group * kTile * kPanel + half * kTile;
            for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(to + i * kPanel, v[i]);
        }
}

// Some rows of one half and group: sums += y, which is [16 rows][16 outputs].
inline void add_turned(__m512i* y, const Sums& sums, int half, int group, __mmask16 rows) {
    transpose(y);
    float* const to = sums.at + (half * 2 + group) * 256;
    for (int64_t i = 0; i < kTile; ++i) {
        const __m512 old = _mm512_load_ps(to + i * kTile);
        _mm512_store_ps(to + i * kTile, _mm512_mask_add_ps(old, rows, old, _mm512_castsi512_ps(y[i])));
    }
}

// The way back.
inline void from_rows(const float* y, const Sums& sums) {
    for (int half = 0; half < sums.halves(); ++half)
        for (int group = 0; group < sums.groups(); ++group) {
            __m512i v[kTile];
            const float* const from = y + group * kTile * kPanel + half * kTile;
            for (int64_t i = 0; i < kTile; ++i) v[i] = _mm512_load_si512(from + i * kPanel);
            transpose(v);
            float* const to = sums.at + (half * 2 + group) * 256;
            for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(to + i * kTile, v[i]);
        }
}

// 16 floats as bf16; `count` of them are written.
inline void store_half(bf16* out, __m512 value, int64_t count) {
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(value);
    if (count >= kTile)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), half);
    else
        _mm256_mask_storeu_epi16(out, static_cast<__mmask16>((1u << count) - 1), half);
}

// Rows of y [rows, stride] as bf16.
inline void store_rows(const Result& result, bf16* y, int64_t stride) {
    for (int half = 0; half < 2; ++half)
        for (int64_t row = result.lo; row < result.hi && result.panel.outputs[half]; ++row)
            store_half(y + row * stride + result.panel.first[half],
                       _mm512_load_ps(result.y + (row - result.lo) * kPanel + half * kTile),
                       result.panel.outputs[half]);
}

// y [rows, stride] += the result, fp32.
inline void add_rows(const Result& result, float* y, int64_t stride) {
    for (int half = 0; half < 2; ++half) {
        const int64_t outputs = result.panel.outputs[half];
        const auto mask = static_cast<__mmask16>((1u << outputs) - 1);
        for (int64_t row = result.lo; row < result.hi && outputs; ++row) {
            float* const to = y + row * stride + result.panel.first[half];
            const __m512 value = _mm512_load_ps(result.y + (row - result.lo) * kPanel + half * kTile);
            _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), value));
        }
    }
}

// Rows of q, k and v: q and k turned by their row's angles, k and v written to their slots. What q and k are turned
// with comes in the same panel.
struct Turned {
    bf16 *qkv, *k_cache, *v_cache;
    const float *cos, *sin;  // [rows, head_dim / 2]
    const int64_t* slots;
    int64_t heads;
    Cache cache;

    void store(const Result& result) const {
        const int64_t dim = cache.head_dim, half = dim / 2, first = result.panel.first[0];
        const int64_t head = first / dim, place = first % dim, kv_head = head - heads;
        if (kv_head >= cache.kv_heads) return store_values(result);
        const int64_t count = result.panel.outputs[0], width = (heads + 2 * cache.kv_heads) * dim;
        const auto mask = static_cast<__mmask16>((1u << count) - 1);
        for (int64_t row = result.lo; row < result.hi; ++row) {
            const float* const y = result.y + (row - result.lo) * kPanel;
            const int64_t angle = row * half + place;
            const __m512 c = _mm512_maskz_loadu_ps(mask, cos + angle), s = _mm512_maskz_loadu_ps(mask, sin + angle);
            const __m512 low = rounded(_mm512_load_ps(y)), high = rounded(_mm512_load_ps(y + kTile));
            if (kv_head >= 0 && slots[row] < 0) continue;
            bf16* const to = kv_head < 0 ? qkv + row * width + first : k_cache + cache.at(slots[row], kv_head) + place;
            store_half(to, _mm512_fmsub_ps(low, c, _mm512_mul_ps(high, s)), count);
            store_half(to + half, _mm512_fmadd_ps(high, c, _mm512_mul_ps(low, s)), count);
        }
    }

  private:
    static __m512 rounded(__m512 value) {
        const __m256i half = (__m256i)_mm512_cvtneps_pbh(value);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }

    void store_values(const Result& result) const {
        const int64_t dim = cache.head_dim, before = (heads + cache.kv_heads) * dim;
        for (int half = 0; half < 2; ++half)
            for (int64_t done = 0; done < result.panel.outputs[half];) {  // up to where a head ends
                const int64_t at = result.panel.first[half] - before + done, place = at % dim;
                const int64_t count = std::min(result.panel.outputs[half] - done, dim - place);
                const auto mask = static_cast<__mmask16>((1u << count) - 1);
                for (int64_t row = result.lo; row < result.hi; ++row)
                    if (slots[row] >= 0)
                        store_half(v_cache + cache.at(slots[row], at / dim) + place,
                                   _mm512_maskz_loadu_ps(mask, result.y + (row - result.lo) * kPanel + half * kTile + done),
                                   count);
                done += count;
            }
    }
};

inline void write_rows(const Result& result, float* y, int64_t stride) {
    for (int half = 0; half < 2; ++half) {
        const int64_t outputs = result.panel.outputs[half];
        const auto mask = static_cast<__mmask16>((1u << outputs) - 1);
        for (int64_t row = result.lo; row < result.hi && outputs; ++row)
            _mm512_mask_storeu_ps(y + row * stride + result.panel.first[half], mask,
                                  _mm512_load_ps(result.y + (row - result.lo) * kPanel + half * kTile));
    }
}

// x / (1 + e^-x), with `exponential`'s polynomial.
inline __m512 silu(__m512 x) {
    const __m512 y = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_max_ps(x, _mm512_set1_ps(-87.f)));
    const __m512 bounded = _mm512_max_ps(y, _mm512_set1_ps(-87.f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), bounded);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.f / 5040.f);
    for (const float c : {1.f / 720.f, 1.f / 120.f, 1.f / 24.f, 1.f / 6.f, 0.5f, 1.f, 1.f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    const __m512 e = _mm512_scalef_ps(p, n);
    return _mm512_div_ps(x, _mm512_add_ps(e, _mm512_set1_ps(1.f)));
}

// silu(gate) * up of a panel in pairs, as right operands of [rows, k] in Order::kCodes, where the two k of a pair are 4
// apart.
inline void gate_and_pack(const Sums& sums, bf16* packed, int64_t k) {
    const int64_t at = sums.panel.first[0];
    for (int64_t group = 0; group < sums.groups(); ++group) {
        const float* const gate = sums.at + group * 256;
        __m512 gated[kTile];
        for (int64_t i = 0; i < kTile; ++i)
            gated[i] = _mm512_mul_ps(silu(_mm512_load_ps(gate + i * kTile)), _mm512_load_ps(gate + 512 + i * kTile));
        const int64_t rows = (sums.lo + group * kTile) * k;
        bf16* const lines = packed + rows + at / kBlock * kBlock * kTile + at % kBlock / 8 * 32;
        for (int64_t i = 0; i < 8; ++i) {
            const int64_t half = i / 4, first = i % 4;
            const __m512* const pair = gated + half * 8 + first;
            _mm512_store_si512(lines + (first * 8 + half) * 32, as_pairs(pair[0], pair[4]));
        }
    }
}

#endif

}  // namespace
