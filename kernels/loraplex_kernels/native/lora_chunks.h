// The update of a prompt's rows beside their base product: B v of a chunk by the tiles just before it, added
// just after it, when all of it has left the core.

#pragma once

#include "epilogue.h"
#include "lora.h"

#if LORAPLEX_AMX

namespace {

// Of one linear, and one thread. Not for chunks that too many segments meet in; what it adds is what `lora_expand`
// would.
class ChunkUpdate {
  public:
    ChunkUpdate(const LoraPlan& plan, int64_t layer, const Projection* p, int64_t num_p, const void* v)
        : plan_(plan), layer_(layer), p_(p), num_p_(num_p), v_(v) {}

    // Rows lo..hi of a panel; a panel's rows come in their order.
    void multiply(const Panel& panel, int64_t lo, int64_t hi, bool is_first) {
        if (is_first) begin(panel);
        num_parts_ = 0;
        const std::vector<Segment>& segments = plan_.segments;
        while (at_ < segments.size() && segments[at_].hi <= lo) ++at_;
        is_added_ = is_whole_;
        for (size_t s = at_; is_added_ && s < segments.size() && segments[s].lo < hi; ++s) {
            if (segments[s].slot != slot_) lay_out(segments[s].slot);
            for (int group = 0; is_added_ && group < ceil_div(hi - lo, kTile); ++group)
                is_added_ = multiply(segments[s], lo, hi, group);
        }
    }

    // False if the chunk that was multiplied last is none of these.
    bool add(const Sums& sums) const {
        if (!is_added_) return false;
        for (const Part* part = parts_; part < parts_ + num_parts_; ++part)
            for (int half = 0; half < sums.halves(); ++half) {
                if (part->count[half] == 0) continue;
                __m512i y[kTile];
                const float* const high = part->sums[half][0];
                const float* const low = part->sums[half][1];
                for (int64_t i = 0; i < kTile; ++i) y[i] = _mm512_load_si512(high + i * kTile);
                for (int64_t i = 0; i < kTile && part->count[half] > 1; ++i)
                    y[i] = _mm512_castps_si512(add_in_order(_mm512_castsi512_ps(y[i]), _mm512_load_ps(low + i * kTile)));
                add_turned(y, sums, half, part->group, part->rows);
            }
        return true;
    }

  private:
    const LoraPlan& plan_;
    const int64_t layer_;
    const Projection* const p_;
    const int64_t num_p_;
    const void* const v_;

    static constexpr int kMostParts = 6;

    // Rows of a group that have one adapter.
    struct Part {
        int group;
        __mmask16 rows;
        int64_t count[2];                             // granules of each half
        alignas(64) float sums[2][2][kTile * kTile];  // [half][high, low][row][output]
    };

    size_t at_ = 0;          // the first segment that does not end before the chunk
    int64_t slot_ = -1;      // whose B is laid out
    bool is_whole_ = false;  // each half of the panel is a piece of one projection's B
    bool is_added_ = false;
    int64_t projection_[2], place_[2];  // of each half, and where in it
    int64_t count_[2];                  // granules
    // Of each half and granule: a piece of B beside the high parts of v, and beside the low ones.
    alignas(64) bf16 weights_[2][kGroup][2][kTileElements];
    Part parts_[kMostParts];
    int num_parts_ = 0;

    void begin(const Panel& panel) {
        at_ = 0, slot_ = -1, is_whole_ = true;
        for (int half = 0; half < 2; ++half) {
            const int64_t lo = panel.first[half], hi = lo + panel.outputs[half];
            projection_[half] = -1;
            for (int64_t i = 0; i < num_p_; ++i) {
                if (hi <= p_[i].column || p_[i].column + p_[i].width <= lo) continue;
                const int64_t place = lo - p_[i].column;
                const bool is_inside = place >= 0 && place % kTile == 0 && place + kTile <= p_[i].width;
                projection_[half] = i, place_[half] = place;
                is_whole_ = is_whole_ && is_inside && hi - lo == kTile;
            }
        }
    }

    void lay_out(int64_t slot) {
        slot_ = slot;
        for (int half = 0; half < 2; ++half) {
            count_[half] = 0;
            if (projection_[half] < 0) continue;
            const Granules granules = plan_.granules(slot, layer_, p_[projection_[half]].module);
            count_[half] = granules.count;
            for (int64_t g = 0; g < std::min(granules.count, kGroup); ++g) {
                const bf16* const b = granules.b<bf16>(g) + place_[half] * kRank;
                for (int64_t pair = 0; pair < kRank / 2; ++pair) {
                    const __m512i values = _mm512_load_si512(b + 32 * pair);
                    for (int low = 0; low < 2; ++low) {
                        _mm512_store_si512(weights_[half][g][low] + 32 * (8 * low + pair), values);
                        _mm512_store_si512(weights_[half][g][low] + 32 * (8 - 8 * low + pair), _mm512_setzero_si512());
                    }
                }
            }
        }
        written();
    }

    // False where there is no room for it.
    bool multiply(const Segment& s, int64_t lo, int64_t hi, int group) {
        const int64_t first = lo + group * kTile, from = std::max(s.lo, first) - first;
        const int64_t to = std::min({s.hi, hi, first + kTile}) - first;
        if (from >= to) return true;
        if (num_parts_ == kMostParts || std::max(count_[0], count_[1]) > kGroup) return false;
        Part& part = parts_[num_parts_++];
        part.group = group, part.rows = static_cast<__mmask16>((1u << to) - (1u << from));
        for (int half = 0; half < 2; ++half) {
            part.count[half] = count_[half];
            if (count_[half] == 0) continue;
            const char* const lines = plan_.line(v_, first, projection_[half], num_p_);
            _tile_zero(0);
            if (count_[half] == 1) {  // low after high: their sum
                _tile_loadd(2, lines, plan_.row_bytes(num_p_));
                _tile_loadd(3, weights_[half][0][0], 64);
                _tile_dpbf16ps(0, 2, 3);
                _tile_loadd(4, weights_[half][0][1], 64);
                _tile_dpbf16ps(0, 2, 4);
                _tile_stored(0, part.sums[half][0], 64);
                continue;
            }
            _tile_zero(1);
            for (int64_t g = 0; g < count_[half]; ++g) {
                _tile_loadd(2, lines + g * kLineBytes, plan_.row_bytes(num_p_));
                _tile_loadd(3, weights_[half][g][0], 64);
                _tile_dpbf16ps(0, 2, 3);
                _tile_loadd(4, weights_[half][g][1], 64);
                _tile_dpbf16ps(1, 2, 4);
            }
            _tile_stored(0, part.sums[half][0], 64);
            _tile_stored(1, part.sums[half][1], 64);
        }
        return true;
    }
};

}  // namespace

#endif
