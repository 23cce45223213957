// What follows the scores for a few columns, those of one query: tiles would be mostly empty.
//
// Softmax runs with a key a lane, and every sum is the tiles' own, bit for bit: a column's answer does not
// depend on how many others there are.

#pragma once

namespace {

// The sum of all lanes, in each of them: neighbours first.
inline __m512 sum_of_lanes(__m512 x) {
    x = add_in_order(x, _mm512_permute_ps(x, 0xb1));
    x = add_in_order(x, _mm512_permute_ps(x, 0x4e));
    x = add_in_order(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    return add_in_order(x, _mm512_shuffle_f32x4(x, x, 0x4e));
}

// The first four columns of 16 keys' scores, a key a lane.
inline void columns_of(const float* scores, __m512* columns) {
    __m512 keys[4];
    for (int64_t i = 0; i < 4; ++i) {
        const float* from = scores + i * kTile;
        keys[i] = _mm512_castps128_ps512(_mm_load_ps(from));
        keys[i] = _mm512_insertf32x4(keys[i], _mm_load_ps(from + 4 * kTile), 1);
        keys[i] = _mm512_insertf32x4(keys[i], _mm_load_ps(from + 8 * kTile), 2);
        keys[i] = _mm512_insertf32x4(keys[i], _mm_load_ps(from + 12 * kTile), 3);
    }
    const __m512d low0 = _mm512_castps_pd(_mm512_unpacklo_ps(keys[0], keys[1]));
    const __m512d low1 = _mm512_castps_pd(_mm512_unpacklo_ps(keys[2], keys[3]));
    const __m512d high0 = _mm512_castps_pd(_mm512_unpackhi_ps(keys[0], keys[1]));
    const __m512d high1 = _mm512_castps_pd(_mm512_unpackhi_ps(keys[2], keys[3]));
    columns[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low0, low1));
    columns[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low0, low1));
    columns[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high0, high1));
    columns[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high0, high1));
}

// As `weigh`; the weights, rounded to bf16, stand in scores_ as floats, [column][key].
template <int64_t Count>
inline void InTiles::weigh_few(int64_t base, int64_t end, const Partial& out) {
    constexpr int64_t kGroups = kKeyBlock / kTile;
    const int64_t groups = round_up(end - base, 32) / kTile;
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 scale = _mm512_set1_ps(scale_ * 1.44269504f);
    __m512 score[kGroups][4];
    for (int64_t g = 0; g < groups; ++g) {
        prefetch(tile_.k_cache, g);
        columns_of(scores_ + g * kTile * kTile, score[g]);
    }
    for (int64_t c = 0; c < Count; ++c) {
        const __m512i limit = _mm512_set1_epi32(limits_[c]), first = _mm512_set1_epi32(firsts_[c]);
        const __m512 before = _mm512_set1_ps(out.top[c]);
        __m512 highest = before;
        for (int64_t g = 0; g < groups; ++g) {
            const __m512i key = _mm512_add_epi32(lanes, _mm512_set1_epi32(base + g * kTile));
            const __mmask16 seen = _mm512_cmplt_epi32_mask(key, limit) & _mm512_cmpge_epi32_mask(key, first);
            score[g][c] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, score[g][c]);
            highest = _mm512_max_ps(score[g][c], highest);  // a NaN is never the highest
        }
        const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(highest));
        const __m512 offset = _mm512_mul_ps(top, scale);
        __m512 total = _mm512_set1_ps(out.total[c]);
        if (_mm512_cmp_ps_mask(top, before, _CMP_NEQ_UQ)) {
            const __m512 kept = power_of_two(_mm512_fmsub_ps(before, scale, offset));
            total = _mm512_mul_ps(total, kept);
            float* sums = out.sums + c * padded_;
            for (int64_t i = 0; i < padded_; i += kTile)
                _mm512_storeu_ps(sums + i, _mm512_mul_ps(_mm512_loadu_ps(sums + i), kept));
        }
        float* weights = scores_ + c * kKeyBlock;
        for (int64_t g = 0; g < groups; ++g) {
            const __m512 weight = power_of_two(_mm512_fmsub_ps(score[g][c], scale, offset));
            total = add_in_order(total, sum_of_lanes(weight));
            _mm512_store_ps(weights + g * kTile,
                            first_of_pairs(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(weight))));
        }
        out.top[c] = _mm512_cvtss_f32(top);
        out.total[c] = _mm512_cvtss_f32(total);
    }
}

// As `sum_up`, of `size` keys.
template <int64_t Count>
inline void InTiles::sum_up_few(int64_t size, float* sums) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int64_t step = 0; step < size; step += 32) {
        const int64_t keys = std::min<int64_t>(32, size - step);
        prefetch(tile_.v_cache, step / kTile), prefetch(tile_.v_cache, step / kTile + 1);
        for (int64_t d = 0; d < dim_; d += 32) {
            const __mmask32 mask = first_of_32(dim_ - d);
            __m512 first[2][Count], second[2][Count];  // of even and odd keys: even and odd dims
            for (int64_t odd = 0; odd < 2; ++odd)
                for (int64_t c = 0; c < Count; ++c) first[odd][c] = second[odd][c] = _mm512_setzero_ps();
            const auto add = [&](int64_t key, int64_t odd) {
                const bf16* row = value_[(step + key) / kTile] + (step + key) % kTile * dim_ + d;
                const __m512i pairs = _mm512_maskz_loadu_epi16(mask, row);
                const __m512 a = first_of_pairs(pairs), b = second_of_pairs(pairs);
#pragma GCC unroll 4
                for (int64_t c = 0; c < Count; ++c) {
                    const __m512 weight = _mm512_set1_ps(scores_[c * kKeyBlock + step + key]);
                    first[odd][c] = _mm512_fmadd_ps(weight, a, first[odd][c]);
                    second[odd][c] = _mm512_fmadd_ps(weight, b, second[odd][c]);
                }
            };
            int64_t key = 0;
            for (; key + 2 <= keys; key += 2) add(key, 0), add(key + 1, 1);
            if (key < keys) add(key, 0);
            for (int64_t c = 0; c < Count; ++c) {
                const __m512 a = add_in_order(first[0][c], first[1][c]), b = add_in_order(second[0][c], second[1][c]);
                float* to = sums + c * padded_ + d;
                _mm512_storeu_ps(to, add_in_order(_mm512_loadu_ps(to), _mm512_permutex2var_ps(a, low, b)));
                if (dim_ - d <= kTile) continue;
                _mm512_storeu_ps(to + kTile, add_in_order(_mm512_loadu_ps(to + kTile), _mm512_permutex2var_ps(a, high, b)));
            }
        }
    }
}

}  // namespace
