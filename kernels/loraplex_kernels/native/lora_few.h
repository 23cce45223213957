// The low-rank updates of few rows in vectors: a tile would be mostly empty, and is slow to get at what
// was just written.
//
// Every sum is the tiles' own, bit for bit: of a tile's 32 products one chain adds up those at even places
// and one those at odd places, and their sum is added to the tile's (TDPBF16PS in Intel's manual).

#pragma once

#if LORAPLEX_AMX

namespace {

constexpr int kIntoL1 = 3, kIntoL2 = 2;  // `__builtin_prefetch` calls it locality

// 16 floats as pairs of bf16 that add up to them.
inline __m512i pairs_of(__m512 whole) {
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(whole));
    const __m512 rest = _mm512_sub_ps(whole, first_of_pairs(high));
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rest));
    return _mm512_or_si512(high, _mm512_slli_epi32(low, 16));
}

// Asks for some memory, share by share, into the cache that is named.
template <int Locality>
class Stream {
  public:
    Stream(const bf16* from, int64_t count)
        : at_(reinterpret_cast<const char*>(from)), end_(reinterpret_cast<const char*>(from + count)) {
        bytes_ = end_ - at_;
    }
    // One of `shares`.
    void share(int64_t shares) {
        const char* until = std::min(end_, at_ + (bytes_ + shares * 64 - 1) / (shares * 64) * 64);
        for (; at_ < until; at_ += 64) __builtin_prefetch(at_, 0, Locality);
    }

  private:
    const char *at_, *end_;
    int64_t bytes_;
};

// Up to kFewRows rows of x as floats, [row][0: even k, 1: odd k][k / 2]; zeros from k on.
class FewInputs {
  public:
    void spread(const bf16* x, int64_t rows, int64_t k) {
        half_ = (k + 31) / 32 * kTile;
        memory_.resize(std::max<size_t>(memory_.size(), kFewRows * 2 * half_ + 16));
        for (int64_t j = 0; j < rows; ++j)
            for (int64_t i = 0; i < k; i += 32) {
                const __m512i pairs = _mm512_maskz_loadu_epi16(first_of_32(k - i), x + j * k + i);
                _mm512_store_ps(of(j) + i / 2, first_of_pairs(pairs));
                _mm512_store_ps(of(j) + half_ + i / 2, second_of_pairs(pairs));
            }
    }
    // At most, for inputs of up to k.
    static int64_t own_bytes(int64_t k) {
        return kGrowth * (kFewRows * 2 * ((k + 31) / 32) * kTile + 16) * static_cast<int64_t>(sizeof(float));
    }
    float* of(int64_t row) { return aligned(memory_.data()) + row * 2 * half_; }
    int64_t half() const { return half_; }

  private:
    std::vector<float> memory_;
    int64_t half_ = 0;
};

// v = scale * A x of Rows rows and one granule. Meanwhile a granule of the same size that comes next is asked
// for, and the same one's B, both in the order of their addresses.
template <int64_t Rows>
void shrink_few(FewInputs& inputs, const bf16* a, float scale, int64_t k, Stream<kIntoL1> next,
                Stream<kIntoL2> b, char* v, int64_t v_stride) {
    const int64_t steps = (k + 31) / 32;
    __m512 sum[Rows];
    const float* x[Rows];
    const int64_t half = inputs.half();
    for (int64_t j = 0; j < Rows; ++j) sum[j] = _mm512_setzero_ps(), x[j] = inputs.of(j);
    for (int64_t i = 0; i < k; i += 32) {
        const __mmask32 mask = first_of_32(k - i);
        __m512i pairs[kTile];
        for (int64_t r = 0; r < kRank; ++r) pairs[r] = _mm512_maskz_loadu_epi16(mask, a + r * k + i);
        next.share(steps);
        b.share(steps);
        transpose(pairs);
        __m512 even[Rows], odd[Rows];
        for (int64_t j = 0; j < Rows; ++j) even[j] = odd[j] = _mm512_setzero_ps();
#pragma GCC unroll 16
        for (int64_t p = 0; p < kTile; ++p) {
            const __m512 first = first_of_pairs(pairs[p]), second = second_of_pairs(pairs[p]);
#pragma GCC unroll 4
            for (int64_t j = 0; j < Rows; ++j) {
                even[j] = _mm512_fmadd_ps(first, _mm512_set1_ps(x[j][i / 2 + p]), even[j]);
                odd[j] = _mm512_fmadd_ps(second, _mm512_set1_ps(x[j][half + i / 2 + p]), odd[j]);
            }
        }
        for (int64_t j = 0; j < Rows; ++j) sum[j] = add_in_order(sum[j], add_in_order(even[j], odd[j]));
    }
    for (int64_t j = 0; j < Rows; ++j)
        _mm512_store_si512(v + j * v_stride, pairs_of(_mm512_mul_ps(sum[j], _mm512_set1_ps(scale))));
}

// All granules of a module; `ahead` follows the last, or null. B's outputs are `width`, 0: do not ask for it.
inline void shrink_few(FewInputs& inputs, const Granules& granules, int64_t rows, int64_t k, const bf16* ahead,
                       int64_t width, char* v, int64_t v_stride) {
    for (int64_t g = 0; g < granules.count; ++g) {
        const bf16* next = g + 1 < granules.count ? granules.a<bf16>(g + 1) : ahead;
        const auto run = rows == 1   ? shrink_few<1>
                         : rows == 2 ? shrink_few<2>
                         : rows == 3 ? shrink_few<3>
                                     : shrink_few<kFewRows>;
        run(inputs, granules.a<bf16>(g), granules.scales[g], k, {next, next ? kRank * k : 0},
            {granules.b<bf16>(g), kRank * width}, v + g * kLineBytes, v_stride);
    }
}

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
void expand_few(const Granules& granules, const char* v, int64_t v_stride, const Target& to) {
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
            run(b, count, to.width, mask, spread, to.panel + n - to.lo, to.stride);
            for (int64_t g = 0; g < count; ++g) b[g] += step;
            n += step;
        }
    }
}

// Of up to kFewRows rows.
inline void expand_few(const Granules& granules, const char* v, int64_t v_stride, int64_t rows, const Target& to) {
    const auto run = rows == 1 ? expand_few<1> : rows == 2 ? expand_few<2> : rows == 3 ? expand_few<3> : expand_few<kFewRows>;
    run(granules, v, v_stride, to);
}

}  // namespace

#endif
