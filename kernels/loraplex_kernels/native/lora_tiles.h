// The low-rank updates in the processor's tiles: bf16 rows and weights, float sums.
//
// v^T = A x^T with A's granule as the left operand. For B v each v is written as two bf16 that add up to it
// (16 bits of its mantissa), and each of B's values stands twice under them.

#pragma once

#if LORAPLEX_AMX

namespace {

// Up to 16 rows of x, packed once for all the granules they meet. B of `width` outputs is asked for, too.
class Shrinker {
  public:
    Shrinker(const bf16* x, int64_t rows, int64_t k_size, int64_t width)
        : x_(x), rows_(rows), k_(k_size), width_(width), steps_((k_size + 31) / 32), is_packed_(false) {
        static thread_local std::vector<char> memory;
        memory.resize(std::max<size_t>(memory.size(), steps_ * 1024 + 64));
        packed_ = reinterpret_cast<bf16*>(aligned(memory.data()));
    }
    // At most, for inputs of up to k.
    static int64_t own_bytes(int64_t k) { return kGrowth * ((k + 31) / 32 * 1024 + 64); }
    void run(const Granules& granules, char* v, int64_t v_stride) {
        for (int64_t g = 0; g < granules.count; g += kGroup) switch (granules.count - g) {
                case 1: run<1>(granules, g, v, v_stride); break;
                case 2: run<2>(granules, g, v, v_stride); break;
                case 3: run<3>(granules, g, v, v_stride); break;
                default: run<kGroup>(granules, g, v, v_stride);
            }
    }

  private:
    const bf16* x_;
    int64_t rows_, k_, width_, steps_;
    bool is_packed_;
    bf16* packed_;  // [step of 32 k][pair][row][2]

    // Meanwhile the first granule's lines are asked for, in their order.
    void pack(const bf16* a) {
        for (int64_t step = 0; step < steps_; ++step) {
            const __mmask32 mask = first_of_32(k_ - 32 * step);
            __m512i rows[kTile];
            for (int64_t j = 0; j < kTile; ++j) {
                rows[j] = j < rows_ ? _mm512_maskz_loadu_epi16(mask, x_ + j * k_ + 32 * step) : _mm512_setzero_si512();
                __builtin_prefetch(a + (step * kTile + j) * 32);
            }
            transpose(rows);
            for (int64_t j = 0; j < kTile; ++j) _mm512_store_si512(packed_ + step * kTileElements + 32 * j, rows[j]);
        }
        is_packed_ = true;
    }

    template <int64_t Count>
    void run(const Granules& granules, int64_t from, char* v, int64_t v_stride) {
        const bf16* a[Count];
        for (int64_t g = 0; g < Count; ++g) a[g] = granules.a<bf16>(from + g);
        if (!is_packed_) pack(a[0]);
        for (int64_t g = 0; g < Count; ++g) Stream<kIntoL2>(granules.b<bf16>(from + g), kRank * width_).share(1);
        written();
        _tile_zero(0);
        if constexpr (Count > 1) _tile_zero(1);
        if constexpr (Count > 2) _tile_zero(2);
        if constexpr (Count > 3) _tile_zero(3);
        for (int64_t step = 0; step < k_ / 32; ++step) multiply<Count>(a, 2 * k_, 32 * step, step);
        if (k_ % 32) {  // a tile would reach into the next row, or past the last
            alignas(64) bf16 ends[Count][kTileElements];
            const bf16* end[Count];
            for (int64_t g = 0; g < Count; ++g) {
                end[g] = ends[g];
                for (int64_t r = 0; r < kRank; ++r)
                    _mm512_store_si512(ends[g] + 32 * r, _mm512_maskz_loadu_epi16(first_of_32(k_ % 32),
                                                                                  a[g] + r * k_ + k_ / 32 * 32));
            }
            written();
            multiply<Count>(end, 64, 0, steps_ - 1);
        }
        alignas(64) float sums[Count][kRank * kTile];
        _tile_stored(0, sums[0], 64);
        if constexpr (Count > 1) _tile_stored(1, sums[1], 64);
        if constexpr (Count > 2) _tile_stored(2, sums[2], 64);
        if constexpr (Count > 3) _tile_stored(3, sums[3], 64);
        for (int64_t g = 0; g < Count; ++g)
            write(sums[g], granules.scales[from + g], v + (from + g) * kLineBytes, v_stride);
    }

    template <int64_t Count>
    void multiply(const bf16* const* a, int64_t stride, int64_t at, int64_t step) {
        _tile_loadd(5, packed_ + step * kTileElements, 64);
        _tile_loadd(4, a[0] + at, stride);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (Count > 1) {
            _tile_loadd(4, a[1] + at, stride);
            _tile_dpbf16ps(1, 4, 5);
        }
        if constexpr (Count > 2) {
            _tile_loadd(4, a[2] + at, stride);
            _tile_dpbf16ps(2, 4, 5);
        }
        if constexpr (Count > 3) {
            _tile_loadd(4, a[3] + at, stride);
            _tile_dpbf16ps(3, 4, 5);
        }
    }

    // sums [rank][row] to one line a row: v, scaled, as pairs of bf16.
    void write(const float* sums, float scale, char* v, int64_t v_stride) const {
        __m512i rows[kTile];
        for (int64_t r = 0; r < kRank; ++r) rows[r] = _mm512_load_si512(sums + r * kTile);
        transpose(rows);
        for (int64_t j = 0; j < rows_; ++j) {
            const __m512 whole = _mm512_mul_ps(_mm512_castsi512_ps(rows[j]), _mm512_set1_ps(scale));
            _mm512_store_si512(v + j * v_stride, pairs_of(whole));
        }
    }
};

// panel += B v. Tiles hold whole chunks; of what they give, only the segment's own rows are added.
inline void expand_in_tiles(const Granules& granules, const char* v, int64_t v_stride, int64_t rows, const Target& to) {
    alignas(64) bf16 weights[kGroup][kTileElements];
    alignas(64) float sums[kTile * kTile];
    for (int64_t n = to.lo; n < to.hi; n += kTile) {
        const __mmask16 mask = to.hi - n >= kTile ? 0xffff : (1u << (to.hi - n)) - 1;
        for (int64_t from = 0; from < granules.count; from += kGroup) {
            const int64_t count = std::min(kGroup, granules.count - from);
            for (int64_t g = 0; g < count; ++g) {
                const bf16* b = granules.b<bf16>(from + g) + n;
                for (int64_t r = 0; r < kRank; ++r) {
                    const __m512i word = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b + r * to.width));
                    _mm512_store_si512(weights[g] + 32 * r, _mm512_or_si512(word, _mm512_slli_epi32(word, 16)));
                }
            }
            for (int64_t lo = 0; lo < rows; lo += kLoraRows) {
                const char* lines = v + lo * v_stride + from * kLineBytes;
                written();
                _tile_zero(0);
                for (int64_t g = 0; g < count; ++g) {
                    _tile_loadd(1, lines + g * kLineBytes, v_stride);
                    _tile_loadd(2, weights[g], 64);
                    _tile_dpbf16ps(0, 1, 2);
                }
                _tile_stored(0, sums, 64);
                for (int64_t j = 0; j < std::min(kLoraRows, rows - lo); ++j) {
                    float* panel = to.panel + (lo + j) * to.stride + n - to.lo;
                    const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, panel), _mm512_load_ps(sums + j * kTile));
                    _mm512_mask_storeu_ps(panel, mask, sum);
                }
            }
        }
    }
}

}  // namespace

#endif
