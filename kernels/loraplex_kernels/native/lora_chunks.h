// The update of a prompt's rows beside their base product: B v of a chunk by the tiles just before it, added
// just after it, when all of it has left the core.

#pragma once

#include "epilogue.h"
#include "lora.h"

#if LORAPLEX_AMX

namespace {

// Of one linear, and one thread. Only for chunks whose groups of 16 rows have an adapter each; what it adds is
// what `lora_expand` would.
class ChunkUpdate {
  public:
    ChunkUpdate(const LoraPlan& plan, int64_t layer, const Projection* p, int64_t num_p, const void* v)
        : plan_(plan), layer_(layer), p_(p), num_p_(num_p), v_(v) {}

    // Rows lo..hi of a panel; a panel's rows come in their order.
    void multiply(const Panel& panel, int64_t lo, int64_t hi, bool is_first) {
        if (is_first) begin(panel);
        for (int64_t group = 0; is_whole_ && group < ceil_div(hi - lo, kTile); ++group) {
            const int64_t first = lo + group * kTile;
            while (at_ < plan_.segments.size() && plan_.segments[at_].hi <= first) ++at_;
            const bool any = at_ < plan_.segments.size() && plan_.segments[at_].lo < std::min(first + kTile, hi);
            const Segment s = any ? plan_.segments[at_] : Segment{-1, 0, 0};
            if (any && (s.lo > first || s.hi < std::min(first + kTile, hi))) {
                is_added_ = false;
                return;
            }
            if (s.slot >= 0 && s.slot != slot_) lay_out(panel, s.slot);
            for (int half = 0; half < 2; ++half) multiply(first, group, half, s.slot);
        }
        is_added_ = is_whole_;
    }

    // False if the chunk that was multiplied last is none of these.
    bool add(const Sums& sums) const {
        if (!is_added_) return false;
        for (int group = 0; group < sums.groups(); ++group)
            for (int half = 0; half < sums.halves(); ++half) {
                if (!has_[group][half]) continue;
                __m512i v[kTile];
                const float* const from = sums_ + group * kTile * kPanel + half * kTile;
                for (int64_t i = 0; i < kTile; ++i) v[i] = _mm512_load_si512(from + i * kPanel);
                transpose(v);
                float* const to = sums.at + (half * 2 + group) * 256;
                for (int64_t i = 0; i < kTile; ++i) {
                    const __m512 sum = _mm512_add_ps(_mm512_load_ps(to + i * kTile), _mm512_castsi512_ps(v[i]));
                    _mm512_store_ps(to + i * kTile, sum);
                }
            }
        return true;
    }

  private:
    const LoraPlan& plan_;
    const int64_t layer_;
    const Projection* const p_;
    const int64_t num_p_;
    const void* const v_;

    size_t at_ = 0;             // the first segment that does not end before the next group
    int64_t slot_ = -1;         // whose B is laid out
    bool is_whole_ = false;     // each half of the panel is of one projection
    bool is_added_ = false;
    int64_t projection_[2], count_[2];  // granules
    bool has_[2][2];            // [group][half]: has sums
    alignas(64) bf16 weights_[2][kGroup][kTileElements];  // [half][granule][rank][output][2]
    alignas(64) float sums_[kChunk * kPanel];             // as Result's y

    void begin(const Panel& panel) {
        at_ = 0, slot_ = -1, is_whole_ = true;
        for (int half = 0; half < 2; ++half) {
            const int64_t lo = panel.first[half], hi = lo + panel.outputs[half];
            projection_[half] = -1;
            for (int64_t i = 0; i < num_p_; ++i) {
                if (hi <= p_[i].column || p_[i].column + p_[i].width <= lo) continue;
                const bool is_inside = p_[i].column <= lo && lo + kTile <= p_[i].column + p_[i].width;
                projection_[half] = i;
                is_whole_ = is_whole_ && is_inside && hi - lo == kTile;
            }
        }
    }

    void lay_out(const Panel& panel, int64_t slot) {
        slot_ = slot;
        for (int half = 0; half < 2; ++half) {
            count_[half] = 0;
            if (projection_[half] < 0) continue;
            const Projection& p = p_[projection_[half]];
            const Granules granules = plan_.granules(slot, layer_, p.module);
            if (granules.count > kGroup) is_whole_ = false;
            count_[half] = std::min(granules.count, kGroup);
            for (int64_t g = 0; g < count_[half]; ++g) {
                const bf16* const b = granules.b<bf16>(g) + panel.first[half] - p.column;
                for (int64_t r = 0; r < kRank; ++r) {
                    const auto row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + r * p.width));
                    _mm512_store_si512(weights_[half][g] + 32 * r, each_twice(row));
                }
            }
        }
        written();
    }

    void multiply(int64_t first, int64_t group, int half, int64_t slot) {
        has_[group][half] = slot >= 0 && projection_[half] >= 0 && count_[half] > 0;
        if (!has_[group][half]) return;
        const char* const lines = plan_.line(v_, first, projection_[half], num_p_);
        float* const to = sums_ + group * kTile * kPanel + half * kTile;
        _tile_zero(0);
        for (int64_t g = 0; g < count_[half]; ++g) {
            _tile_loadd(1, lines + g * kLineBytes, plan_.row_bytes(num_p_));
            _tile_loadd(2, weights_[half][g], 64);
            _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, to, kPanel * sizeof(float));
    }
};

}  // namespace

#endif
