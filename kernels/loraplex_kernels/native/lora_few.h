// B v of few rows in vectors: a tile would be mostly empty.
//
// Every sum is the tiles' own, bit for bit: of a tile's 32 products one chain adds up those at even places
// and one those at odd places, and their sum is added to the tile's (TDPBF16PS in Intel's manual).

#pragma once

#if LORAPLEX_AMX

namespace {

// panel += B v of Rows rows and 16 * Halves outputs from n on, of which the last 16 are masked.
template <int64_t Rows, int64_t Halves>
inline void expand_few(const bf16* const* b, int64_t granules, int64_t width, __mmask16 mask,
                       const float (*v)[kFewRows][2][kRank], float* panel, int64_t stride) {
    __m512 total[Rows][Halves];
    for (int64_t g = 0; g < granules; ++g) {
        __m512 high[Rows][Halves], low[Rows][Halves];
        for (int64_t j = 0; j < Rows; ++j)
            for (int64_t h = 0; h < Halves; ++h) high[j][h] = low[j][h] = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int64_t r = 0; r < kRank; ++r) {
            __m512 weight[Halves];
            for (int64_t h = 0; h < Halves; ++h) {
                const __m256i half = h + 1 < Halves
                                         ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b[g] + r * width))
                                         : _mm256_maskz_loadu_epi16(mask, b[g] + r * width + h * kTile);
                weight[h] = first_of_pairs(_mm512_cvtepu16_epi32(half));
            }
#pragma GCC unroll 4
            for (int64_t j = 0; j < Rows; ++j)
#pragma GCC unroll 2
                for (int64_t h = 0; h < Halves; ++h) {
                    high[j][h] = _mm512_fmadd_ps(weight[h], _mm512_set1_ps(v[g][j][0][r]), high[j][h]);
                    low[j][h] = _mm512_fmadd_ps(weight[h], _mm512_set1_ps(v[g][j][1][r]), low[j][h]);
                }
        }
        for (int64_t j = 0; j < Rows; ++j)
            for (int64_t h = 0; h < Halves; ++h) {
                const __m512 sum = add_in_order(high[j][h], low[j][h]);
                total[j][h] = g ? add_in_order(total[j][h], sum) : sum;
            }
    }
    for (int64_t j = 0; j < Rows; ++j)
        for (int64_t h = 0; h < Halves; ++h) {
            float* at = panel + j * stride + h * kTile;
            const __mmask16 m = h + 1 < Halves ? 0xffff : mask;
            _mm512_mask_storeu_ps(at, m, add_in_order(_mm512_maskz_loadu_ps(m, at), total[j][h]));
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
        for (int64_t n = to.lo; n < to.hi;) {
            const int64_t left = to.hi - n, step = left > kTile ? 2 * kTile : kTile;
            const auto mask = static_cast<__mmask16>(left >= step ? 0xffff : (1u << (left - step + kTile)) - 1);
            const auto run = step > kTile ? expand_few<Rows, 2> : expand_few<Rows, 1>;
            stream.share();
            if (step > kTile) stream.share();
            run(b, count, to.width, mask, spread, to.panel + n - to.lo, to.stride);
            for (int64_t g = 0; g < count; ++g) b[g] += step;
            n += step;
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
