// The most likely token of each row, without a product by the whole head.
//
// The head is kept a second time in int8, half the bytes: w ~ s q. Then, with fixed-point activations
// x ~ t m of 15 bits, |w x - s t (q m)| <= |x| b by the Cauchy-Schwarz inequality, where b is the output's:
// |w - s q|, and what of |w| comes of rounding x and of the exact product's own sums. The tokens whose upper
// bound reaches the largest lower one are few (14 a row on text, by measurement), and their logits
// are computed as `multiply` does, with the same bits. Bounds are in units of t.

#pragma once

#include <sys/mman.h>

#include <cfloat>
#include <cstdlib>
#include <limits>
#include <memory>

#include "linear.h"

#if LORAPLEX_AMX

namespace {

#if defined(__AMX_INT8__)
constexpr bool kHasByteTiles = true;
#else
constexpr bool kHasByteTiles = false;
#endif

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The largest number of a row, the first of equal ones; -1 where one is not finite.
inline int64_t argmax(const float* row, int64_t count) {
    const __m512 infinity = _mm512_set1_ps(kInfinity);
    __m512 most = _mm512_set1_ps(-kInfinity);
    __mmask16 wrong = 0;
    for (int64_t i = 0; i < count; i += 16) {
        const auto mask = static_cast<__mmask16>(first_of_32(std::min<int64_t>(16, count - i)));
        const __m512 values = _mm512_maskz_loadu_ps(mask, row + i);
        wrong |= _mm512_mask_cmp_ps_mask(mask, _mm512_abs_ps(values), infinity, _CMP_NLT_UQ);
        most = _mm512_mask_max_ps(most, mask, most, values);
    }
    if (wrong) return -1;
    return std::find(row, row + count, _mm512_reduce_max_ps(most)) - row;
}

// The head's int8 form: codes [panel][k / 64][half][16 outputs][64], and each output's scale and bound.
class ByteHead {
  public:
    explicit ByteHead(const Weight& head) : outputs_(head.outputs), k_(head.k), blocks_(head.k / kBlock) {
        if (!kHasByteTiles || head.k % kBlock || head.k > kMostInputs) return;
        const int64_t rows = num_panels() * kPanel;
        memory_.reset(static_cast<char*>(std::aligned_alloc(kLargePage, size())));
        if (!memory_) return;
        madvise(memory_.get(), size(), MADV_HUGEPAGE);
        codes_ = reinterpret_cast<int8_t*>(memory_.get());
        scales_ = reinterpret_cast<float*>(codes_ + rows * k_);
        bounds_ = scales_ + rows;
        bool fits = true;
#pragma omp parallel for schedule(static) num_threads(num_threads) reduction(&& : fits)
        for (int64_t row = 0; row < rows; ++row)  // those beyond the last are its copies
            fits = keep(head.dense + std::min(row, outputs_ - 1) * k_, row) && fits;
        if (!fits) memory_.reset();
    }

    // False: no such tiles, or weights that are not finite or out of all proportion.
    bool is_usable() const { return memory_ != nullptr; }
    int64_t num_bytes() const { return memory_ ? size() : 0; }
    int64_t outputs() const { return outputs_; }
    int64_t k() const { return k_; }
    int64_t blocks() const { return blocks_; }
    int64_t num_panels() const { return ceil_div(outputs_, kPanel); }
    const int8_t* panel(int64_t index) const { return codes_ + index * kPanel * k_; }
    const float* scales(int64_t index) const { return scales_ + index * kPanel; }
    const float* bounds(int64_t index) const { return bounds_ + index * kPanel; }

    // Norms of weights and largest activations: in between, no product of them is too small or too large.
    static constexpr float kLeast = 1e-15f, kMost = 1e15f;
    static constexpr float kLevels = 32639.f;  // largest m: its parts are bytes, 256 * 127 + 127

  private:
    struct Free {
        void operator()(char* at) const { std::free(at); }
    };
    static constexpr int64_t kLargePage = 2 << 20;
    static constexpr int64_t kMostInputs = int64_t{1} << 16;  // whose products of bytes add up in 32 bits

    int64_t size() const {
        return round_up(num_panels() * kPanel * (k_ + 2 * static_cast<int64_t>(sizeof(float))), kLargePage);
    }

    // One output's weights as codes, scale and bound; false if they are too large.
    bool keep(const bf16* w, int64_t row) {
        float absmax = 0.f;
        bool finite = true;
        for (int64_t i = 0; i < k_; ++i) {
            absmax = std::max(absmax, std::fabs(load(w, i)));
            finite &= (w[i].bits & 0x7f80) != 0x7f80;
        }
        const float exact = absmax / 127.f, scale = exact < FLT_MIN ? 0.f : exact;
        const float inverse = scale == 0.f ? 0.f : 1.f / scale;
        int8_t* const to = codes_ + row / kPanel * kPanel * k_ + row % kPanel * kBlock;
        double of_row = 0., of_error = 0.;
        for (int64_t block = 0; finite && block < blocks_; ++block)
            for (int64_t i = 0; i < kBlock; ++i) {
                const float value = load(w, block * kBlock + i);
                const auto code = static_cast<int32_t>(std::nearbyint(value * inverse));
                const double error = value - static_cast<double>(scale) * code;
                to[block * kPanel * kBlock + i] = static_cast<int8_t>(code);
                of_row += static_cast<double>(value) * value;
                of_error += error * error;
            }
        // Of |w|: x is rounded by half a level at most, and both forms' sums are rounded.
        const double levels = 0.51 * std::sqrt(k_) / kLevels;
        const double part = levels + (k_ + 32.) * FLT_EPSILON;
        const double norm = std::sqrt(of_row);
        scales_[row] = scale;
        // kLeast is far more than all that becomes zero because it is small.
        bounds_[row] = static_cast<float>(1.001 * ((1. + part) * std::sqrt(of_error) + part * norm) + kLeast);
        return finite && norm < kMost;
    }

    const int64_t outputs_, k_, blocks_;
    std::unique_ptr<char, Free> memory_;
    int8_t* codes_ = nullptr;
    float *scales_ = nullptr, *bounds_ = nullptr;
};

// The rows of one step on their way through a head: `add` each group of 16, then `screen`, then `choose` for
// each row; threads share each of these, and meet in between.
class GreedyRows {
  public:
    // What so many rows take.
    static int64_t num_bytes(int64_t rows, int64_t k, int64_t threads) {
        const int64_t padded = ceil_div(rows, kTile) * kTile;
        return padded * (2 * k + of_row()) + threads * padded * (of_row() + of_thread()) + 5 * 64;
    }

    void build(const ByteHead& head, int64_t rows, int64_t threads, char* memory) {
        head_ = &head, rows_ = rows, threads_ = threads;
        padded_ = ceil_div(rows, kTile) * kTile;
        Carver carver(memory);
        packed_ = carver.take<int8_t>(padded_ * 2 * head.k());
        norms_ = carver.take<float>(padded_);
        least_ = carver.take<float>(threads * padded_);
        counts_ = carver.take<int32_t>(threads * padded_);
        lists_ = carver.take<Candidate>(threads * padded_ * kMostCandidates);
        std::fill(counts_, counts_ + threads * padded_, 0);
    }

    // Rows 16 * group.. of x [rows, k].
    void add(const bf16* x, int64_t group) {
        const int64_t k = head_->k();
        const bf16* from[kTile];  // null: not screened
        float inverse[kTile];
        for (int64_t r = 0; r < kTile; ++r) {
            const int64_t row = group * kTile + r;
            const float most = row < rows_ ? absmax(x + row * k, k) : 0.f;
            const bool is_screened = most >= ByteHead::kLeast && most <= ByteHead::kMost;
            from[r] = is_screened ? x + row * k : nullptr;
            inverse[r] = is_screened ? ByteHead::kLevels / most : 0.f;
            for (int64_t thread = 0; thread < threads_; ++thread)
                least_[thread * padded_ + row] = is_screened ? -kInfinity : kInfinity;
        }
        __m512 sums[kTile];
        for (__m512& sum : sums) sum = _mm512_setzero_ps();
        int8_t* to = packed_ + group * kTile * 2 * k;
        for (int64_t at = 0; at < k; at += kBlock, to += 2 * kTileBytes) {
            __m512i high[kTile], low[kTile];
            for (int64_t r = 0; r < kTile; ++r) {
                high[r] = low[r] = _mm512_setzero_si512();
                if (from[r]) to_bytes(from[r] + at, _mm512_set1_ps(inverse[r]), &high[r], &low[r], &sums[r]);
            }
            transpose(high);
            transpose(low);
            for (int64_t i = 0; i < kTile; ++i) {
                _mm512_store_si512(to + i * kBlock, high[i]);
                _mm512_store_si512(to + kTileBytes + i * kBlock, low[i]);
            }
        }
        for (int64_t r = 0; r < kTile; ++r)
            norms_[group * kTile + r] = 1.001f * std::sqrt(_mm512_reduce_add_ps(sums[r]));
    }

    // Bounds every logit; panels are shared with the other threads.
    void screen(int64_t thread, std::atomic<int64_t>& next) {
        const int64_t panels = head_->num_panels();
        const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed) * kShare; };
        for (int64_t first = take(); first < panels;) {
            const int64_t following = take(), end = std::min(first + kShare, panels);
            for (int64_t panel = first; panel < end; ++panel) {
                const int64_t then = panel + 1 < end ? panel + 1 : std::min(following, panels - 1);
                for (int64_t group = 0; group < padded_ / kTile; ++group)
                    screen_panel(thread, panel, group, group == 0 ? head_->panel(then) : nullptr);
            }
            first = following;
        }
    }

    // Whether `screen` could not tell the row's few from the others, or did not try.
    bool is_left(int64_t row) const { return least(row) == kInfinity; }
    bool any_left() const {
        for (int64_t row = 0; row < rows_; ++row)
            if (is_left(row)) return true;
        return false;
    }

    // The largest logit's token, of a row that is not left. `packed` as `multiply` reads it.
    int64_t choose(const Weight& head, const bf16* packed, int64_t row, bf16* panel) const {
        Best best{-kInfinity, 0};
        int64_t tokens[kPanel], count = 0;
        const float least = this->least(row);
        for (int64_t thread = 0; thread < threads_; ++thread) {
            const int64_t list = thread * padded_ + row;
            for (int64_t i = 0; i < counts_[list]; ++i) {
                const Candidate& each = lists_[list * kMostCandidates + i];
                if (each.most < least) continue;
                tokens[count++] = each.token;
                if (count == kPanel) compute(head, packed, row, panel, tokens, std::exchange(count, 0), best);
            }
        }
        compute(head, packed, row, panel, tokens, count, best);
        return best.token;
    }

  private:
    struct Candidate {
        float most;
        int32_t token;
    };
    struct Best {
        float logit;
        int64_t token;
    };
    static constexpr int64_t kShare = 4;             // panels taken at a time
    static constexpr int64_t kMostCandidates = 512;  // of a row and thread
    static constexpr int64_t kTileBytes = kTile * kBlock;

    static constexpr int64_t of_row() { return sizeof(float); }
    static constexpr int64_t of_thread() { return sizeof(int32_t) + kMostCandidates * sizeof(Candidate); }

    float least(int64_t row) const {
        float most = -kInfinity;
        for (int64_t thread = 0; thread < threads_; ++thread) most = std::max(most, least_[thread * padded_ + row]);
        return most;
    }

    // Infinite or not a number where one of them is.
    static float absmax(const bf16* x, int64_t k) {
        float most = 0.f;
        for (int64_t i = 0; i < k; ++i) {
            const float value = std::fabs(load(x, i));
            most = value > most || !(value < kInfinity) ? value : most;
            if (!(value < kInfinity)) break;
        }
        return most;
    }

    // 64 numbers as x / t = 256 high + low, and their squares added to sixteen sums.
    static void to_bytes(const bf16* x, __m512 inverse, __m512i* high, __m512i* low, __m512* sums) {
        alignas(64) int8_t of_high[kBlock], of_low[kBlock];
        for (int64_t i = 0; i < kBlock; i += 16) {
            const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
            const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
            const __m512 scaled = _mm512_mul_ps(value, inverse);
            const __m512i whole = _mm512_cvtps_epi32(scaled);
            const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
            const __m512i rest = _mm512_sub_epi32(whole, _mm512_slli_epi32(upper, 8));
            _mm_store_si128(reinterpret_cast<__m128i*>(of_high + i), _mm512_cvtepi32_epi8(upper));
            _mm_store_si128(reinterpret_cast<__m128i*>(of_low + i), _mm512_cvtepi32_epi8(rest));
            *sums = _mm512_fmadd_ps(scaled, scaled, *sums);
        }
        *high = _mm512_load_si512(of_high);
        *low = _mm512_load_si512(of_low);
    }

    // sums [half][high, low][16 outputs][16 rows] of a panel and a group; the codes at `ahead`, if any, are
    // asked for meanwhile.
    void multiply_codes([[maybe_unused]] int64_t panel, [[maybe_unused]] int64_t group,
                        [[maybe_unused]] const int8_t* ahead, [[maybe_unused]] int32_t* sums) const {
#if defined(__AMX_INT8__)
        const int8_t* w = head_->panel(panel);
        const int8_t* x = packed_ + group * kTile * 2 * head_->k();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t block = 0; block < head_->blocks(); ++block, w += 2 * kTileBytes, x += 2 * kTileBytes) {
            written();
            _tile_loadd(4, w, 64);
            _tile_loadd(6, x, 64);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(7, x + kTileBytes, 64);
            _tile_dpbssd(1, 4, 7);
            _tile_loadd(5, w + kTileBytes, 64);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
            if (!ahead) continue;
            for (int64_t i = 0; i < 2 * kTileBytes; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T1);
            ahead += 2 * kTileBytes;
        }
        _tile_stored(0, sums, 64);
        _tile_stored(1, sums + 256, 64);
        _tile_stored(2, sums + 512, 64);
        _tile_stored(3, sums + 768, 64);
#endif
    }

    struct Bounds {
        __m512 middle, distance;
    };

    // Of output i of a panel, for 16 rows.
    static Bounds bounds(const int32_t* sums, int64_t i, const float* scales, const float* of_outputs, __m512 norm) {
        const int32_t* const at = sums + i / kTile * 512 + i % kTile * kTile;
        const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(at));
        const __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(at + 256));
        const __m512 product = _mm512_fmadd_ps(high, _mm512_set1_ps(256.f), low);
        return {_mm512_mul_ps(product, _mm512_set1_ps(scales[i])), _mm512_mul_ps(norm, _mm512_set1_ps(of_outputs[i]))};
    }

    void screen_panel(int64_t thread, int64_t panel, int64_t group, const int8_t* ahead) {
        alignas(64) int32_t sums[4 * 256];
        multiply_codes(panel, group, ahead, sums);
        const float *scales = head_->scales(panel), *of_outputs = head_->bounds(panel);
        float* const own = least_ + thread * padded_ + group * kTile;
        const __m512 norm = _mm512_load_ps(norms_ + group * kTile);
        __m512 least = _mm512_load_ps(own), most = _mm512_set1_ps(-kInfinity);
#pragma GCC unroll 4
        for (int64_t i = 0; i < kPanel; ++i) {
            const auto [middle, distance] = bounds(sums, i, scales, of_outputs, norm);
            most = _mm512_max_ps(most, _mm512_add_ps(middle, distance));
            least = _mm512_max_ps(least, _mm512_sub_ps(middle, distance));
        }
        _mm512_store_ps(own, least);
        if (!_mm512_cmp_ps_mask(most, least, _CMP_GE_OQ)) return;
        for (int64_t i = 0; i < kPanel; ++i) {
            const int64_t token = panel * kPanel + i;
            if (token >= head_->outputs()) break;
            const auto [middle, distance] = bounds(sums, i, scales, of_outputs, norm);
            const __m512 upper = _mm512_add_ps(middle, distance);
            unsigned rows = _mm512_cmp_ps_mask(upper, least, _CMP_GE_OQ);
            if (!rows) continue;
            alignas(64) float values[kTile];
            _mm512_store_ps(values, upper);
            for (; rows; rows &= rows - 1) {
                const int64_t r = __builtin_ctz(rows);
                push(thread, group * kTile + r, {values[r], static_cast<int32_t>(token)});
            }
        }
    }

    // A list that is full is cleared of what has been outbid since; where that is little, the row is left.
    void push(int64_t thread, int64_t row, const Candidate& candidate) {
        const int64_t list = thread * padded_ + row;
        Candidate* const begin = lists_ + list * kMostCandidates;
        int32_t& count = counts_[list];
        if (count == kMostCandidates) {
            const float least = least_[list];
            const auto is_outbid = [&](const Candidate& each) { return each.most < least; };
            count = static_cast<int32_t>(std::remove_if(begin, begin + count, is_outbid) - begin);
            if (count > kMostCandidates * 7 / 8) least_[list] = kInfinity;
        }
        if (count < kMostCandidates) begin[count++] = candidate;
    }

    // The logits of up to 32 tokens: their weights side by side are a head of their own.
    void compute(const Weight& head, const bf16* packed, int64_t row, bf16* panel, const int64_t* tokens,
                 int64_t count, Best& best) const {
        if (count == 0) return;
        const int64_t k = head.k, padded = ceil_div(count, kTile) * kTile;
        for (int64_t i = 0; i < padded; ++i)
            std::memcpy(panel + i * k, head.dense + tokens[std::min(i, count - 1)] * k, k * sizeof(bf16));
        alignas(64) float sums[4 * 256];
        const Product product{{nullptr, nullptr, nullptr, panel, padded, k}, packed, rows_};
        const auto run = padded > kTile ? multiply_panel<1, true> : multiply_panel<1, false>;
        run(product, {{0, kTile}, {kTile, padded - kTile}}, nullptr, row / kTile, panel, false, false, sums);
        for (int64_t i = 0; i < count; ++i) {
            const float logit = sums[i / kTile * 512 + i % kTile * kTile + row % kTile];
            if (logit > best.logit || (logit == best.logit && tokens[i] < best.token)) best = {logit, tokens[i]};
        }
    }

    const ByteHead* head_ = nullptr;
    int64_t rows_ = 0, padded_ = 0, threads_ = 0;
    int8_t* packed_ = nullptr;     // [group][k / 64][high, low][16 times four k][16 rows][4]
    float* norms_ = nullptr;       // |x| / t, rounded up
    float* least_ = nullptr;       // [thread][row], the largest lower bound so far; infinite: the row is left
    int32_t* counts_ = nullptr;    // [thread][row]
    Candidate* lists_ = nullptr;   // [thread][row][kMostCandidates]
};

}  // namespace

#endif
