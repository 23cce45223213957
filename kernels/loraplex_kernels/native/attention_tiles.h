// Attention's sums in the processor's tiles: bf16 keys, values, queries and weights, float sums.
//
// S^T = K Q^T with the keys straight from the cache as the left operand, so that softmax runs across
// tile rows with a column a lane; then O += P V with V's rows interleaved in pairs.

#pragma once

#if LORAPLEX_AMX

namespace {

// 2^x for x <= 0 to 9e-5, a twentieth of a rounding to bf16; 0 below -126, where tiny numbers are zero (see
// Tiles); NaN stays NaN. Least squares on [0, 1) with 2^0 = 1 kept.
inline __m512 power_of_two(__m512 x) {
    const __m512 r = _mm512_reduce_ps(x, 1);  // x - floor(x)
    __m512 p = _mm512_set1_ps(0.07705805f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.22764558f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69512289f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(p, x);
}

class InTiles {
  public:
    InTiles(const Tile<bf16>& tile, Carver& scratch);
    void add(int64_t lo, int64_t hi, const Partial& out);

  private:
    static constexpr int64_t kSteps = kKeyBlock / 32;  // of 32 keys

    const Tile<bf16>& tile_;
    int64_t dim_, padded_, depth_, groups_;  // depth_: steps of 32 in dim; groups_: of 16 columns
    float scale_;
    int32_t *limits_, *firsts_;  // [columns]
    bf16 *queries_, *keys_, *values_, *weights_;
    float* scores_;
    const bf16 *key_[kKeyBlock / kTile], *value_[kKeyBlock / kTile];  // of the block's groups of 16 keys
    int64_t key_stride_;                                        // bytes
    const AttentionItem* later_;                                // whose keys come next, and which of them
    int64_t later_lo_, later_groups_;

    void pack_queries();
    void find(int64_t base, int64_t end);
    void pad_keys(int64_t groups);
    void interleave_values(int64_t size);
    template <bool kPair>
    void score(int64_t group, int64_t key_groups);
    void weigh(int64_t group, int64_t base, int64_t end, const Partial& out);
    template <bool kPair>
    void sum_up(int64_t group, int64_t steps, float* sums);
    template <int64_t Count>
    void weigh_few(int64_t base, int64_t end, const Partial& out);
    template <int64_t Count>
    void sum_up_few(int64_t size, float* sums);
    void look_ahead(int64_t end);
    void prefetch(const bf16* base, int64_t group) const;
};

inline InTiles::InTiles(const Tile<bf16>& tile, Carver& scratch) : tile_(tile) {
    const AttentionPlan& plan = tile.plan;
    dim_ = plan.dim, padded_ = plan.padded, depth_ = round_up(dim_, 32) / 32;
    groups_ = (tile.columns() + kTile - 1) / kTile;
    scale_ = 1.f / std::sqrt(static_cast<float>(dim_));
    limits_ = scratch.take<int32_t>(plan.columns);
    firsts_ = scratch.take<int32_t>(plan.columns);
    queries_ = scratch.take<bf16>(plan.columns * depth_ * 32);
    keys_ = scratch.take<bf16>(kKeyBlock * depth_ * 32);
    scores_ = scratch.take<float>(2 * kKeyBlock * kTile);
    weights_ = scratch.take<bf16>(2 * kKeyBlock * kTile);
    values_ = scratch.take<bf16>(kKeyBlock * padded_);
    pack_queries();
    std::fill_n(limits_, groups_ * kTile, INT32_MAX);
    std::fill_n(firsts_, groups_ * kTile, 0);
    for (int64_t c = 0; c < tile.columns(); c += plan.group) {
        std::fill_n(limits_ + c, plan.group, tile.limit(c));
        std::fill_n(firsts_ + c, plan.group, tile.first(c));
    }
}

// queries_[group][step of 32][pair of dim][column][2]
inline void InTiles::pack_queries() {
    const int64_t row_stride = tile_.query(tile_.plan.group) - tile_.query(0);
    const bf16* row = tile_.query(0);
    int64_t head = 0;
    for (int64_t group = 0; group < groups_; ++group) {
        const bf16* columns[kTile];
        for (int64_t j = 0; j < kTile; ++j) {
            columns[j] = group * kTile + j < tile_.columns() ? row + head * dim_ : nullptr;
            if (++head == tile_.plan.group) head = 0, row += row_stride;
        }
        for (int64_t step = 0; step < depth_; ++step) {
            const int64_t left = std::min<int64_t>(32, dim_ - 32 * step);
            const __mmask32 mask = left == 32 ? ~0u : (1u << left) - 1;
            __m512i rows[kTile];
            for (int64_t j = 0; j < kTile; ++j)
                rows[j] = columns[j] ? _mm512_maskz_loadu_epi16(mask, columns[j] + 32 * step) : _mm512_setzero_si512();
            transpose(rows);
            bf16* packed = queries_ + (group * depth_ + step) * kTileElements;
            for (int64_t j = 0; j < kTile; ++j) _mm512_store_si512(packed + 32 * j, rows[j]);
        }
    }
}

// Where the block's keys and values lie; a group of 16 never crosses a cache block.
inline void InTiles::find(int64_t base, int64_t end) {
    key_stride_ = dim_ * static_cast<int64_t>(sizeof(bf16));
    int64_t g = 0;
    for (int64_t key = base; key < end; key += kTile, ++g) {
        key_[g] = tile_.at(tile_.k_cache, key);
        value_[g] = tile_.at(tile_.v_cache, key);
    }
    if (dim_ % 32) pad_keys(g);
    if (g % 2) key_[g] = key_[g - 1], value_[g] = value_[g - 1];  // stand in for keys that nobody sees
}

// Zeros where a tile of 32 would reach into the next key: it may hold anything.
inline void InTiles::pad_keys(int64_t groups) {
    for (int64_t g = 0; g < groups; ++g) {
        bf16* padded = keys_ + g * kTile * depth_ * 32;
        for (int64_t j = 0; j < kTile; ++j)
            for (int64_t step = 0; step < depth_; ++step) {
                const int64_t left = std::min<int64_t>(32, dim_ - 32 * step);
                const __mmask32 mask = left == 32 ? ~0u : (1u << left) - 1;
                const __m512i row = _mm512_maskz_loadu_epi16(mask, key_[g] + j * dim_ + 32 * step);
                _mm512_store_si512(padded + (j * depth_ + step) * 32, row);
            }
        key_[g] = padded;
    }
    key_stride_ = depth_ * 64;
}

// values_[step of 32 keys][dim / 16][pair of keys][16 of dim][2]; zeros from key `size` on.
inline void InTiles::interleave_values(int64_t size) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const int64_t wide = padded_ / kTile;
    for (int64_t key = 0; key < round_up(size, 32); key += 2) {
        if (key % kTile == 0) prefetch(tile_.k_cache, key / kTile);
        const bf16* rows = value_[key / kTile] + key % kTile * dim_;
        bf16* target = values_ + key / 32 * wide * kTileElements + key % 32 / 2 * 32;
        for (int64_t i = 0; i < dim_; i += 32) {
            const __mmask32 mask = dim_ - i >= 32 ? ~0u : (1u << (dim_ - i)) - 1;
            const __m512i even = _mm512_maskz_loadu_epi16(key < size ? mask : 0, rows + i);
            const __m512i odd = _mm512_maskz_loadu_epi16(key + 1 < size ? mask : 0, rows + dim_ + i);
            bf16* pair = target + i / kTile * kTileElements;
            _mm512_store_si512(pair, _mm512_permutex2var_epi16(even, low, odd));
            if (dim_ - i > kTile)
                _mm512_store_si512(pair + kTileElements, _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

// scores_[0 or 1][key][column] of one or two groups of columns.
template <bool kPair>
inline void InTiles::score(int64_t group, int64_t key_groups) {
    const bf16* right = queries_ + group * depth_ * kTileElements;
    written();
    for (int64_t g = 0; g < key_groups; g += 2) {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (kPair) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t step = 0; step < depth_; ++step) {
            _tile_loadd(4, key_[g] + 32 * step, key_stride_);
            _tile_loadd(5, key_[g + 1] + 32 * step, key_stride_);
            _tile_loadd(6, right + step * kTileElements, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if constexpr (kPair) {
                _tile_loadd(7, right + (depth_ + step) * kTileElements, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        float* scores = scores_ + g * kTile * kTile;
        _tile_stored(0, scores, 64);
        _tile_stored(1, scores + kTile * kTile, 64);
        if constexpr (kPair) {
            scores += kKeyBlock * kTile;
            _tile_stored(2, scores, 64);
            _tile_stored(3, scores + kTile * kTile, 64);
        }
    }
}

// Online softmax of one group of columns: weights_ from scores_, and what was summed up before scaled.
inline void InTiles::weigh(int64_t group, int64_t base, int64_t end, const Partial& out) {
    float* scores = scores_ + group % 2 * kKeyBlock * kTile;
    bf16* weights = weights_ + group % 2 * kKeyBlock * kTile;
    const int64_t size = round_up(end - base, 32), at = group * kTile;
    const __m512i limit = _mm512_load_si512(limits_ + at), first = _mm512_load_si512(firsts_ + at);
    const __m512 before = _mm512_loadu_ps(out.top + at);
    const bool all_begin = !_mm512_cmpgt_epi32_mask(first, _mm512_set1_epi32(base));
    // The group's first column sees the fewest keys.
    for (int64_t k = all_begin ? std::max<int64_t>(0, limits_[at] - base) : 0; k < size; ++k) {
        const __m512i key = _mm512_set1_epi32(base + k);
        const __mmask16 seen = _mm512_cmplt_epi32_mask(key, limit) & _mm512_cmpge_epi32_mask(key, first);
        const __m512 score = _mm512_load_ps(scores + k * kTile);
        _mm512_store_ps(scores + k * kTile, _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, score));
    }
    __m512 highest[4] = {before, before, before, before};
    for (int64_t k = 0; k < size; k += 4)  // a NaN is never the highest
        for (int64_t j = 0; j < 4; ++j) highest[j] = _mm512_max_ps(_mm512_load_ps(scores + (k + j) * kTile), highest[j]);
    const __m512 top = _mm512_max_ps(_mm512_max_ps(highest[0], highest[1]), _mm512_max_ps(highest[2], highest[3]));
    const __m512 scale = _mm512_set1_ps(scale_ * 1.44269504f);
    const __m512 offset = _mm512_mul_ps(top, scale);
    __m512 total = _mm512_loadu_ps(out.total + at);
    const __mmask16 raised = _mm512_cmp_ps_mask(top, before, _CMP_NEQ_UQ);
    if (raised) {
        alignas(64) float kept[kTile];
        // Exactly 1 for a column whose top stays, whatever the others' do.
        const __m512 factor = _mm512_mask_mov_ps(_mm512_set1_ps(1.f), raised,
                                                 power_of_two(_mm512_fmsub_ps(before, scale, offset)));
        _mm512_store_ps(kept, factor);
        total = _mm512_mul_ps(total, factor);
        const bool any = _mm512_cmp_ps_mask(before, _mm512_set1_ps(-FLT_MAX), _CMP_NEQ_UQ);  // was summed up
        for (int64_t c = 0; any && c < kTile; ++c) {
            float* sums = out.sums + (at + c) * padded_;
            for (int64_t i = 0; i < padded_; i += kTile)
                _mm512_storeu_ps(sums + i, _mm512_mul_ps(_mm512_loadu_ps(sums + i), _mm512_set1_ps(kept[c])));
        }
    }
    for (int64_t k = 0; k < size; k += 32) {
        if (group == 0) prefetch(tile_.v_cache, k / kTile), prefetch(tile_.v_cache, k / kTile + 1);
        __m512i rows[kTile];
        __m512 both[kTile];
        for (int64_t j = 0; j < kTile; ++j) {
            const float* score = scores + (k + 2 * j) * kTile;
            const __m512 even = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(score), scale, offset));
            const __m512 odd = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(score + kTile), scale, offset));
            both[j] = add_in_order(even, odd);
            rows[j] = as_pairs(even, odd);
        }
        for (int64_t half = 0; half < kTile; half += 8) {  // 16 keys, as `weigh_few` adds its lanes up
            for (int64_t apart = 1; apart < 8; apart *= 2)
                for (int64_t j = half; j < half + 8; j += 2 * apart) both[j] = add_in_order(both[j], both[j + apart]);
            total = add_in_order(total, both[half]);
        }
        transpose(rows);
        for (int64_t j = 0; j < kTile; ++j) _mm512_store_si512(weights + k * kTile + 32 * j, rows[j]);
    }
    _mm512_storeu_ps(out.top + at, top);
    _mm512_storeu_ps(out.total + at, total);
}

// sums += weights_ values_ of one or two groups of columns.
template <bool kPair>
inline void InTiles::sum_up(int64_t group, int64_t steps, float* sums) {
    const int64_t wide = padded_ / kTile, stride = padded_ * static_cast<int64_t>(sizeof(float));
    float *upper = sums + group * kTile * padded_, *lower = upper + kTile * padded_;
    written();
    for (int64_t d = 0; d < wide; d += 2) {
        const bool two = d + 1 < wide;
        _tile_loadd(0, upper + d * kTile, stride);
        if (two) _tile_loadd(1, upper + (d + 1) * kTile, stride);
        if constexpr (kPair) {
            _tile_loadd(2, lower + d * kTile, stride);
            if (two) _tile_loadd(3, lower + (d + 1) * kTile, stride);
        }
        for (int64_t step = 0; step < steps; ++step) {
            const bf16* values = values_ + (step * wide + d) * kTileElements;
            _tile_loadd(6, values, 64);
            if (two) _tile_loadd(7, values + kTileElements, 64);
            _tile_loadd(4, weights_ + step * kTileElements, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (two) _tile_dpbf16ps(1, 4, 7);
            if constexpr (kPair) {
                _tile_loadd(5, weights_ + kKeyBlock * kTile + step * kTileElements, 64);
                _tile_dpbf16ps(2, 5, 6);
                if (two) _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, upper + d * kTile, stride);
        if (two) _tile_stored(1, upper + (d + 1) * kTile, stride);
        if constexpr (kPair) {
            _tile_stored(2, lower + d * kTile, stride);
            if (two) _tile_stored(3, lower + (d + 1) * kTile, stride);
        }
    }
}

// Keys or values of the next block, 16 tokens of one head.
inline void InTiles::prefetch(const bf16* base, int64_t group) const {
    if (tile_.stream) return tile_.stream->share();
    if (group >= later_groups_) return;
    const bf16* rows = tile_.at(*later_, base, later_lo_ + group * kTile);
    for (int64_t i = 0; i < kTile * dim_; i += 32) _mm_prefetch(reinterpret_cast<const char*>(rows + i), _MM_HINT_T0);
}

inline void InTiles::look_ahead(int64_t end) {
    later_ = end < tile_.item.hi ? &tile_.item : tile_.ahead;
    later_lo_ = end;
    if (later_ == tile_.ahead && later_) later_lo_ = later_->lo;
    const int64_t left = later_ ? std::min(later_->hi - later_lo_, kKeyBlock) : 0;
    later_groups_ = (left + kTile - 1) / kTile;
}

inline void InTiles::add(int64_t lo, int64_t hi, const Partial& out) {
    const int64_t columns = groups_ * kTile;
    std::fill_n(out.sums, columns * padded_, 0.f);
    std::fill_n(out.top, columns, -FLT_MAX);
    std::fill_n(out.total, columns, 0.f);
    for (int64_t base = lo; base < hi; base += kKeyBlock) {
        const int64_t end = std::min(base + kKeyBlock, hi), key_groups = (end - base + kTile - 1) / kTile;
        find(base, end);
        look_ahead(end);
        if (tile_.columns() <= kFewColumns) {
            score<false>(0, key_groups);
            switch (tile_.columns()) {
                case 1: weigh_few<1>(base, end, out), sum_up_few<1>(end - base, out.sums); break;
                case 2: weigh_few<2>(base, end, out), sum_up_few<2>(end - base, out.sums); break;
                case 3: weigh_few<3>(base, end, out), sum_up_few<3>(end - base, out.sums); break;
                default: weigh_few<4>(base, end, out), sum_up_few<4>(end - base, out.sums);
            }
            continue;
        }
        for (int64_t group = 0; group < groups_; group += 2) {
            const bool pair = group + 1 < groups_;
            if (group == 0) interleave_values(end - base);
            // The last column sees the most keys.
            const int64_t last = std::min((group + 2) * kTile, tile_.columns()) - 1;
            const int64_t seen = std::min(end, tile_.limit(last));
            if (seen <= base) continue;
            const int64_t of_them = (seen - base + kTile - 1) / kTile;
            pair ? score<true>(group, of_them) : score<false>(group, of_them);
            weigh(group, base, seen, out);
            if (pair) weigh(group + 1, base, seen, out);
            const int64_t steps = (seen - base + 31) / 32;
            pair ? sum_up<true>(group, steps, out.sums) : sum_up<false>(group, steps, out.sums);
        }
    }
    for (int64_t c = 0; c < columns; ++c) out.top[c] *= scale_;
}

}  // namespace

#include "attention_few.h"

#endif
