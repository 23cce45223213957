// x W^T by AMX tiles, from 4-bit codes or from bf16 weights, for any number of rows.
//
// The weight is the left operand (16 outputs by 32 k, as it lies in memory), the activations the right
// one, packed in pairs of k; so 16 rows are as quick as one, and the product comes out transposed, fp32.
// Each row is a column of its tiles: its sums run over k in one order, whatever the batch.

#pragma once

#include <omp.h>

#include <type_traits>
#include <utility>
#include <vector>

#include "amx.h"
#include "epilogue.h"
#include "lanes.h"
#include "packed.h"
#include "scratch.h"
#include "team.h"

namespace {

constexpr int64_t kAhead = 2;                   // blocks between looking weights up and multiplying them:
constexpr int64_t kRing = 4;                    // a tile is not read before its stores have left the core

// [outputs, k] of a stacked linear; `codes` and `absmax` as in nf4.py, or `dense`.
struct Weight {
    const uint8_t* codes;
    const float* absmax;
    const float* levels;  // fp32 [16]
    const bf16* dense;    // instead of codes
    int64_t outputs, k;
};

constexpr int64_t kSplitRows = 192;  // from which on a task has half the rows: weights are looked up twice, but
                                     // its rows are in its core's cache

// Elements of a thread's own buffer: a panel's weights as bf16.
inline int64_t panel_size(int64_t k) { return kPanel * std::max(k, kRing * kBlock); }

#if LORAPLEX_AMX

// 64 k of 16 outputs, from the first's codes and absmax on: two left operands. An output's value is
// bf16(level * absmax): its block's 16 possible ones are a table, twice over so that bit 4 of an index
// is nothing.
template <bool Whole>
inline void dequantize_tiles(const uint8_t* codes, const float* absmax, int64_t blocks, __m512 levels,
                             int64_t outputs, bf16* tiles) {
    const auto shifts = [](short low, short high) {
        return _mm512_inserti64x4(_mm512_set1_epi16(low), _mm256_set1_epi16(high), 1);
    };
    const __m512i shift0 = shifts(4, 0), shift1 = shifts(12, 8);  // the high nibble comes first
#pragma GCC unroll 4
    for (int64_t r = 0; r < kTile; ++r) {
        const int64_t row = Whole ? r : std::min(r, outputs - 1);
        const __m512 values = _mm512_mul_ps(levels, _mm512_set1_ps(absmax[row * blocks]));
        const __m256i half = (__m256i)_mm512_cvtneps_pbh(values);
        const __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
        const __m512i four = _mm512_broadcast_i64x4(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + row * blocks * 32)));
        _mm512_store_si512(tiles + r * 32, _mm512_permutexvar_epi16(_mm512_srlv_epi16(four, shift0), table));
        _mm512_store_si512(tiles + kTileElements + r * 32,
                           _mm512_permutexvar_epi16(_mm512_srlv_epi16(four, shift1), table));
    }
}

// Where panels begin. Of the first `paired` outputs, each comes with the one `apart` from it, 16 and 16 (weights
// as codes); the others come 32 in a row.
struct Panels {
    int64_t outputs, paired = 0, apart = 1;
    // Panels that one thread computes: those in pairs share lines of the adapters' weights.
    int64_t together() const { return paired < outputs ? 1 : 2; }
    int64_t pairs() const { return paired / (2 * apart) * ceil_div(apart, kTile); }
    int64_t count() const { return pairs() + ceil_div(outputs - paired, kPanel); }
    Panel at(int64_t index) const {
        if (index < pairs()) {
            const int64_t shares = ceil_div(apart, kTile), place = index % shares * kTile;
            const int64_t first = index / shares * 2 * apart + place, count = std::min(kTile, apart - place);
            return {{first, first + apart}, {count, count}};
        }
        const int64_t first = paired + (index - pairs()) * kPanel, rest = outputs - first - kTile;
        return {{first, first + kTile},
                {std::min(kTile, outputs - first), std::max<int64_t>(0, std::min(kTile, rest))}};
    }
};

// Asks for a panel's memory, share by share, so that it streams in while another one is computed. Lines
// are asked for in the order of their addresses: then the processor runs ahead by itself, far further
// than the few misses that a core has under way.
class Ahead {
  public:
    Ahead(const Weight& w, const Panel& panel) : dense_(w.dense != nullptr) {
        const int64_t blocks = w.k / kBlock, row = w.dense ? w.k * 2 : w.k / 2;
        share_ = ceil_div(kPanel * row / blocks, 64);
        const char* const weights = w.dense ? reinterpret_cast<const char*>(w.dense) : reinterpret_cast<const char*>(w.codes);
        at_ = weights + panel.first[0] * row;
        end_ = at_ + panel.outputs[0] * row;
        second_ = weights + panel.first[1] * row;
        second_end_ = second_ + panel.outputs[1] * row;
        if (w.dense) return;
        for (int half = 0; half < 2; ++half) {
            const char* const p = reinterpret_cast<const char*>(w.absmax + panel.first[half] * blocks);
            for (int64_t i = 0; i < panel.outputs[half] * blocks * 4; i += 64) _mm_prefetch(p + i, _MM_HINT_T0);
        }
    }

    void next_share() {
        for (int64_t i = 0; i < share_; ++i, at_ += 64) {
            if (at_ >= end_) {
                at_ = second_, end_ = second_end_;
                second_end_ = second_;
                if (at_ >= end_) return;
            }
            dense_ ? _mm_prefetch(at_, _MM_HINT_T1) : _mm_prefetch(at_, _MM_HINT_T0);
        }
    }

  private:
    const bool dense_;
    int64_t share_;
    const char *at_, *end_, *second_, *second_end_;
};

inline void dequantize_block(const Weight& w, const Panel& panel, int64_t block, __m512 levels, bf16* tiles) {
    const int64_t blocks = w.k / kBlock;
    for (int half = 0; half < 2; ++half) {
        const int64_t first = panel.first[half] * blocks + block, outputs = panel.outputs[half];
        bf16* const place = tiles + half * 2 * kTileElements;
        if (outputs == kTile)
            dequantize_tiles<true>(w.codes + first * 32, w.absmax + first, blocks, levels, outputs, place);
        else if (outputs > 0)
            dequantize_tiles<false>(w.codes + first * 32, w.absmax + first, blocks, levels, outputs, place);
    }
}

// Tiles 0..3 hold the sums [half][group], 4 and 5 the weights, 6 and 7 the activations.
template <int Groups, bool Both>
inline void multiply_block(const bf16* w0, const bf16* w1, int64_t w_stride, int64_t w_step, const bf16* x,
                           int64_t x_stride) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < 2; ++i) {
        _tile_loadd(6, x + i * kTileElements, 64);
        _tile_loadd(4, w0 + i * w_step, w_stride);
        _tile_dpbf16ps(0, 4, 6);
        if (Groups == 2) {
            _tile_loadd(7, x + x_stride + i * kTileElements, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (Both) {
            _tile_loadd(5, w1 + i * w_step, w_stride);
            _tile_dpbf16ps(2, 5, 6);
            if (Groups == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
}

struct Product {
    Weight weight;
    const bf16* packed;  // of all rows, in the weight's order
    int64_t rows;
};

// sums [half][group][16 outputs][16 rows] of up to 32 rows from 16 * group on. `buffer` holds the
// panel's weights when `is_ready`; otherwise they are read, and left there if `keep`. The panel `ahead`
// is asked for meanwhile.
template <int Groups, bool Both>
void multiply_panel(const Product& p, const Panel& panel, Ahead* ahead, int64_t group, bf16* buffer,
                    bool is_ready, bool keep, float* sums) {
    const Weight& w = p.weight;
    const int64_t blocks = w.k / kBlock, unit = 4 * kTileElements;
    const bf16* x = p.packed + group * kTile * w.k;
    const int64_t x_stride = kTile * w.k;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const __m512 levels = w.dense ? _mm512_setzero_ps() : _mm512_loadu_ps(w.levels);
    const auto place = [&](int64_t block) { return buffer + (keep ? block : block % kRing) * unit; };
    if (!w.dense && !is_ready)
        for (int64_t block = 0; block < std::min(kAhead, blocks); ++block)
            dequantize_block(w, panel, block, levels, place(block));
    for (int64_t block = 0; block < blocks; ++block) {
        const bf16* right = x + block * 2 * kTileElements;
        written();
        if (w.dense) {
            const bf16* w0 = w.dense + panel.first[0] * w.k + block * kBlock;
            const bf16* w1 = w.dense + panel.first[1] * w.k + block * kBlock;
            multiply_block<Groups, Both>(w0, w1, w.k * 2, 32, right, x_stride);
        } else {
            const bf16* left = place(block);
            multiply_block<Groups, Both>(left, left + 2 * kTileElements, 64, kTileElements, right, x_stride);
            if (!is_ready && block + kAhead < blocks)
                dequantize_block(w, panel, block + kAhead, levels, place(block + kAhead));
        }
        if (ahead) ahead->next_share();
    }
    _tile_stored(0, sums, 64);
    if (Groups == 2) _tile_stored(1, sums + 256, 64);
    if (Both) _tile_stored(2, sums + 512, 64);
    if (Both && Groups == 2) _tile_stored(3, sums + 768, 64);
}

// A bf16 panel with less than 16 outputs in a run, whole in `buffer`: no tile reads past the weight.
inline Weight padded(const Weight& w, const Panel& panel, bf16* buffer) {
    for (int half = 0; half < 2; ++half)
        for (int64_t r = 0; r < kTile && panel.outputs[half]; ++r) {
            const int64_t n = panel.first[half] + std::min(r, panel.outputs[half] - 1);
            std::memcpy(buffer + (half * kTile + r) * w.k, w.dense + n * w.k, w.k * sizeof(bf16));
        }
    Weight copy = w;
    copy.dense = buffer - panel.first[0] * w.k;  // where the second run follows the first
    return copy;
}

constexpr auto kNothing = [](const Panel&, int64_t, int64_t, bool) {};

// Every panel of a linear, shared with the other threads of a region: each calls this with the same
// counter and a buffer of its own. `begin(Panel, lo, hi, is_first)` comes before each chunk of rows;
// `finish(Result)`, or `finish(Sums)`, writes what it is given.
template <typename Begin, typename Finish>
void multiply(const Product& product, const Panels& panels, bf16* buffer, std::atomic<int64_t>& next, Begin&& begin,
              Finish&& finish) {
    alignas(64) float sums[4 * 256], y[kChunk * kPanel];
    const int64_t middle = product.rows < kSplitRows ? product.rows : round_up(product.rows / 2, kChunk);
    const int64_t count = panels.count(), together = panels.together(), tasks = ceil_div(count, together);
    const int64_t halves = middle < product.rows ? 2 : 1;
    const bool from_back = is_from_back(omp_get_thread_num());
    struct Share {
        int64_t half, panel;
    };
    Share taken{halves, count};
    const auto take_share = [&] {
        if (++taken.panel < count && taken.panel % together) return taken;
        const int64_t task = take(next, halves * tasks, from_back);
        return taken = {task / tasks, task % tasks * together};
    };
    for (Share share = take_share(), following; share.half < halves; share = following) {
        following = take_share();
        const Panel panel = panels.at(share.panel);
        const int64_t first = share.half * middle, rows = share.half ? product.rows : middle;
        Ahead ahead(product.weight, panels.at(following.panel));
        const bool both = panel.outputs[1] > 0;
        Product p = product;
        if (p.weight.dense && (panel.outputs[0] < kTile || (both && panel.outputs[1] < kTile)))
            p.weight = padded(p.weight, panel, buffer);
        for (int64_t lo = first; lo < rows; lo += kChunk) {
            const int64_t hi = std::min(lo + kChunk, rows);
            const bool two = hi - lo > kTile;
            begin(panel, lo, hi, lo == first);
            const auto run = both ? (two ? multiply_panel<2, true> : multiply_panel<1, true>)
                                  : (two ? multiply_panel<2, false> : multiply_panel<1, false>);
            Ahead* const prefetched = lo == first && following.half < halves ? &ahead : nullptr;
            run(p, panel, prefetched, lo / kTile, buffer, lo > first, rows - first > kChunk, sums);
            const Sums made{panel, lo, hi, sums};
            if constexpr (std::is_invocable_v<Finish, const Sums&>) {
                finish(made);
            } else {
                to_rows(made, y);
                finish(Result{panel, lo, hi, y});
            }
        }
    }
}

// The op alone: out [rows, outputs] = x W^T, in a region of its own.
inline void linear(const Weight& w, const bf16* x, int64_t rows, bf16* out) {
    const bool worthwhile = ceil_div(rows, kTile) * kTile * w.outputs * w.k > kWorthWaking;
    const int threads = worthwhile ? num_threads : 1;
    std::vector<bf16> packed(packed_size(rows, w.k) + 32), buffers(threads * panel_size(w.k) + 32);
    bf16* const right = aligned(packed.data());
    bf16* const own = aligned(buffers.data());
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        const Order order = w.dense ? Order::kNatural : Order::kCodes;
#pragma omp for schedule(static)
        for (int64_t group = 0; group < ceil_div(rows, kTile); ++group) pack_group(x, rows, w.k, group, right, order);
        multiply({w, right, rows}, {w.outputs}, own + omp_get_thread_num() * panel_size(w.k),
                 next, kNothing, [&](const Result& result) { store_rows(result, out, w.outputs); });
    }
}

#endif

}  // namespace
