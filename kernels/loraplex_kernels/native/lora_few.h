// B v of few rows in vectors: a tile would be mostly empty.
//
// Every sum is the tiles' own, bit for bit: of a tile's 32 products one chain adds up those at even places
// and one those at odd places, and their sum is added to the tile's (TDPBF16PS in Intel's manual).

#pragma once

#if LORAPLEX_AMX

namespace {

// panel += B v of Rows rows and 32 outputs, masked: those at even places and those at odd ones.
template <int64_t Rows>
inline void expand_32(const bf16* const* b, int64_t granules, int64_t width, __mmask32 mask,
                       const float (*v)[kFewRows][2][kRank], float* panel, int64_t stride, bool is_new) {
    __m512 total[Rows][2];
    for (int64_t g = 0; g < granules; ++g) {
        __m512 high[Rows][2], low[Rows][2];
        for (int64_t j = 0; j < Rows; ++j)
            for (int64_t odd = 0; odd < 2; ++odd) high[j][odd] = low[j][odd] = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int64_t r = 0; r < kRank; ++r) {
            const __m512i pairs = _mm512_maskz_loadu_epi16(mask, b[g] + r * width);
            const __m512 weight[] = {first_of_pairs(pairs), second_of_pairs(pairs)};
#pragma GCC unroll 4
            for (int64_t j = 0; j < Rows; ++j)
#pragma GCC unroll 2
                for (int64_t odd = 0; odd < 2; ++odd) {
                    high[j][odd] = _mm512_fmadd_ps(weight[odd], _mm512_set1_ps(v[g][j][0][r]), high[j][odd]);
                    low[j][odd] = _mm512_fmadd_ps(weight[odd], _mm512_set1_ps(v[g][j][1][r]), low[j][odd]);
                }
        }
        for (int64_t j = 0; j < Rows; ++j)
            for (int64_t odd = 0; odd < 2; ++odd) {
                const __m512 sum = add_in_order(high[j][odd], low[j][odd]);
                total[j][odd] = g ? add_in_order(total[j][odd], sum) : sum;
            }
    }
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t j = 0; j < Rows; ++j)
        for (int64_t h = 0; h < 2; ++h) {
            float* const at = panel + j * stride + h * kTile;
            const auto m = static_cast<__mmask16>(mask >> h * kTile);
            const __m512i places = _mm512_add_epi32(first, _mm512_set1_epi32(static_cast<int>(8 * h)));
            const __m512 sum = _mm512_permutex2var_ps(total[j][0], places, total[j][1]);
            _mm512_mask_storeu_ps(at, m, add_in_order(_mm512_maskz_loadu_ps(is_new ? 0 : m, at), sum));
        }
}

template <int64_t Rows>
void expand_few(const Granules& granules, const char* v, int64_t v_stride, const Target& to, Stream& stream) {
    alignas(64) float spread[kGroup][kFewRows][2][kRank];
    for (int64_t from = 0; from < granules.count; from += kGroup) {
        const int64_t count = std::min(kGroup, granules.count - from);
        const bf16* b[kGroup];
        for (int64_t g = 0; g < count; ++g) {
            b[g] = granules.b<bf16>(from + g) + to.lo;
            for (int64_t j = 0; j < Rows; ++j) {
                const __m512i pairs = _mm512_load_si512(v + j * v_stride + (from + g) * kLineBytes);
                _mm512_store_ps(spread[g][j][0], first_of_pairs(pairs));
                _mm512_store_ps(spread[g][j][1], second_of_pairs(pairs));
            }
        }
        for (int64_t n = to.lo; n < to.hi; n += 2 * kTile) {
            stream.share();
            stream.share();
            expand_32<Rows>(b, count, to.width, first_of_32(to.hi - n), spread, to.panel + n - to.lo, to.stride,
                             to.is_new && from == 0);
            for (int64_t g = 0; g < count; ++g) b[g] += 2 * kTile;
        }
    }
}

// Of up to kFewRows rows.
inline void expand_few(const Granules& granules, const char* v, int64_t v_stride, int64_t rows, const Target& to,
                       Stream& stream) {
    const auto run = rows == 1   ? expand_few<1>
                     : rows == 2 ? expand_few<2>
                     : rows == 3 ? expand_few<3>
                                 : expand_few<kFewRows>;
    run(granules, v, v_stride, to, stream);
}

}  // namespace

#endif
