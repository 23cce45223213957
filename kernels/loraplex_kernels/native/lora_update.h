// The low-rank updates of a step's few rows an adapter, ahead of the products they belong to.
//
// What an update costs is its adapter's bytes. Adapter after adapter they stream in as they lie in memory;
// fetched in pieces beside the base's panels they keep the processor's few outstanding misses busy, and the
// base waits, too.

#pragma once

#include "lora.h"

#if LORAPLEX_AMX

namespace {

constexpr int64_t kMostFew = 64;     // rows, at most
constexpr int64_t kManyOfOne = 8;    // rows an adapter, on average: then its bytes are few beside the work

// Only with so many granules do both ways add up in one order: this one adds them up before they meet the base.
inline bool are_few(const LoraPlan& plan) {
    return plan.num_owned < kManyOfOne * plan.num_slots && plan.step.tables.granules <= kGroup;
}

// Both phases of such rows in one, adapter after adapter, so that the weights stream in as they lie in
// memory: update[row][n] of every row with an adapter, fp32 rows of `stride`, is ready when all threads are
// through. Everything else as for `lora_shrink`.
inline void lora_update(const LoraPlan& plan, int64_t layer, const Projection* p, int64_t num_p, const bf16* packed,
                        int64_t k, void* v, float* update, int64_t stride, std::atomic<int64_t>& next) {
    const int64_t v_stride = plan.row_bytes(num_p), count = plan.num_blocks * num_p;
    const auto granules_of = [&](const Segment& chunk, int64_t i) {
        return plan.granules(chunk.slot, layer, p[i].module);
    };
    Stream stream;
    const auto push_a = [&](int64_t task) {
        if (task < count)
            plan.each_chunk(task, [&](const Segment& chunk, int64_t i) {
                const Granules granules = granules_of(chunk, i);
                for (int64_t g = 0; g < granules.count; ++g) stream.push(granules.a<bf16>(g), kRank * k);
            });
    };
    const auto push_b = [&](const Segment& chunk, int64_t i) {
        const Granules granules = granules_of(chunk, i);
        for (int64_t g = 0; g < granules.count; ++g) stream.push(granules.b<bf16>(g), kRank * p[i].width);
    };
    int64_t task = next++;
    push_a(task);
    stream.rest();
    while (task < count) {
        const int64_t following = next++;
        Segment chunks[kChunks];
        int64_t num_chunks = 0, i = 0;
        plan.each_chunk(task, [&](const Segment& chunk, int64_t projection) {
            chunks[num_chunks++] = chunk, i = projection;
        });
        push_b(chunks[0], i);
        stream.over(k / 32);
        {
            Shrinker shrinker(k, v_stride, stream);
            for (int64_t c = 0; c < num_chunks; ++c)
                shrink_chunk(shrinker, granules_of(chunks[c], i), chunks[c], packed, k,
                             plan.line(v, chunks[c].lo, i, num_p));
            shrinker.flush();
        }
        stream.rest();
        for (int64_t c = 0; c < num_chunks; ++c) {
            const Segment& chunk = chunks[c];
            const int64_t rows = chunk.hi - chunk.lo, width = p[i].width;
            const Granules granules = granules_of(chunk, i);
            if (c + 1 < num_chunks)
                push_b(chunks[c + 1], i);
            else
                push_a(following);
            stream.over(width / kTile);
            float* const to = update + chunk.lo * stride + p[i].column;
            for (int64_t j = 0; j < rows && granules.count == 0; ++j)
                std::memset(to + j * stride, 0, width * sizeof(float));
            const Target target{to, stride, 0, width, width, true};
            const char* const lines = plan.line(v, chunk.lo, i, num_p);
            if (rows <= kFewRows)
                expand_few(granules, lines, v_stride, rows, target, stream);
            else
                Expander(stream).expand(granules, lines, v_stride, rows, target);
            stream.rest();
        }
        task = following;
    }
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

}  // namespace

#endif
