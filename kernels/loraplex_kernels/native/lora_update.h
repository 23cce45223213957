// The low-rank updates of a step's few rows an adapter, ahead of the products they belong to.
//
// What an update costs is its adapter's bytes. Adapter after adapter they stream in as they lie in memory;
// fetched beside the base's panels they keep the processor's few outstanding misses busy, and the base waits
// as long as is saved.

#pragma once

#include <omp.h>

#include "epilogue.h"
#include "lora.h"
#include "team.h"

#if LORAPLEX_AMX

namespace {

constexpr int64_t kMostFew = 64;       // rows, at most
constexpr int64_t kManyOfOne = 8;      // rows an adapter, on average: then its bytes are few beside the work
constexpr int64_t kBytesAhead = 8192;  // of what is computed with, weights are asked for

// Floats from row to row of an update. Rows of whole pages would have a panel's share of each in the same few places
// of a cache.
inline int64_t update_stride(int64_t outputs) { return round_up(outputs, 1024) + kTile; }

// Only with so many granules do both ways add up in one order: this one adds them up before they meet the base.
inline bool are_few(const LoraPlan& plan) {
    return plan.num_owned < kManyOfOne * plan.num_slots && plan.step.tables.granules <= kGroup;
}

// Both phases of such rows in one, adapter after adapter, so that the weights stream in as they lie in
// memory: update[row][n] of every row with an adapter, fp32 rows of `stride`, is ready when all threads are
// through, which is waited for only where it is added. Everything else as for `lora_shrink`.
inline void lora_update(const LoraPlan& plan, int64_t layer, const Projection* p, int64_t num_p, const bf16* packed,
                        int64_t k, void* v, float* update, int64_t stride, std::atomic<int64_t>& next) {
    const int64_t v_stride = plan.row_bytes(num_p), count = plan.num_tasks(num_p);
    const bool from_back = is_from_back(omp_get_thread_num());
    Stream stream;
    const auto take_task = [&] {
        const int64_t task = take(next, count, from_back);
        if (task == count) return task;
        const auto [chunk, i] = plan.task(task);
        const Granules granules = plan.granules(chunk.slot, layer, p[i].module);
        for (int64_t g = 0; g < granules.count; ++g) stream.push(granules.a<bf16>(g), operand_size(k));
        for (int64_t g = 0; g < granules.count; ++g) stream.push(granules.b<bf16>(g), operand_size(p[i].width));
        return task;
    };
    int64_t task = take_task();
    stream.ahead(kBytesAhead, kTileElements * sizeof(bf16));
    for (int64_t following; task < count; task = following) {
        following = take_task();
        const auto [chunk, i] = plan.task(task);
        const Granules granules = plan.granules(chunk.slot, layer, p[i].module);
        const int64_t rows = chunk.hi - chunk.lo, width = p[i].width;
        char* const lines = plan.line(v, chunk.lo, i, num_p);
        shrink_chunk(granules, chunk, packed, k, lines, v_stride, stream);
        float* const to = update + chunk.lo * stride + p[i].column;
        for (int64_t j = 0; j < rows && granules.count == 0; ++j) std::memset(to + j * stride, 0, width * sizeof(float));
        Expander(stream).expand(granules, lines, v_stride, rows, {to, stride, 0, width, width, true});
    }
}

// Asks for what a panel takes of the update, so that it is on its way from the other core's cache while the base's
// sums are computed.
inline void ask_for_update(const LoraPlan& plan, const float* update, int64_t stride, const Panel& panel, int64_t row_lo,
                           int64_t row_hi) {
    for (int64_t row = row_lo; row < std::min(row_hi, plan.owned.back().hi); ++row)
        for (int half = 0; half < 2; ++half)
            if (panel.outputs[half]) _mm_prefetch(update + row * stride + panel.first[half], _MM_HINT_T1);
}

// panel[row - row_lo][n - n_lo] += update[row][n] of the rows with an adapter.
inline void add_update(const LoraPlan& plan, const float* update, int64_t update_stride, float* panel, int64_t stride,
                       int64_t row_lo, int64_t row_hi, int64_t n_lo, int64_t n_hi) {
    for (const Segment& rows : plan.owned)
        for (int64_t n = n_lo; n < n_hi; n += kTile) {
            const __mmask16 mask = n_hi - n >= kTile ? 0xffff : (1u << (n_hi - n)) - 1;
#pragma GCC unroll 4
            for (int64_t row = std::max(rows.lo, row_lo); row < std::min(rows.hi, row_hi); ++row) {
                const float* const from = update + row * update_stride + n;
                float* const to = panel + (row - row_lo) * stride + n - n_lo;
                const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), _mm512_maskz_loadu_ps(mask, from));
                _mm512_mask_storeu_ps(to, mask, sum);
            }
        }
}

// The same to sums.
inline void add_update(const LoraPlan& plan, const float* update, int64_t update_stride, const Sums& sums) {
    for (int group = 0; group < sums.groups(); ++group) {
        const int64_t first = sums.lo + group * kTile, last = std::min(first + kTile, sums.hi);
        for (int half = 0; half < sums.halves(); ++half) {
            const auto mask = static_cast<__mmask16>((1u << sums.panel.outputs[half]) - 1);
            __m512i y[kTile] = {};
            __mmask16 owned = 0;
            for (const Segment& rows : plan.owned)
                for (int64_t row = std::max(rows.lo, first); row < std::min(rows.hi, last); ++row) {
                    y[row - first] = _mm512_maskz_loadu_epi32(mask, update + row * update_stride + sums.panel.first[half]);
                    owned |= 1u << (row - first);
                }
            if (owned) add_turned(y, sums, half, group, owned);
        }
    }
}

}  // namespace

#endif
