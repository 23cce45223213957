// The low-rank updates in the processor's tiles: bf16 rows and weights, float sums.
//
// v^T = A x^T with A's granule as the left operand, as it lies in memory, and 16 packed rows of the batch as
// the right one, whoever owns them. For B v each v is written as two bf16 that add up to it (16 bits of its
// mantissa), and each of B's values stands twice under them.

#pragma once

#if LORAPLEX_AMX

namespace {

// 16 floats as pairs of bf16 that add up to them.
inline __m512i pairs_of(__m512 whole) {
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(whole));
    const __m512 rest = _mm512_sub_ps(whole, first_of_pairs(high));
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rest));
    return _mm512_or_si512(high, _mm512_slli_epi32(low, 16));
}

// What a pair of v is multiplied with: each of 16 bf16 twice.
inline __m512i each_twice(__m256i values) {
    const __m512i twice = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5,
                                           4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return _mm512_permutexvar_epi16(twice, _mm512_castsi256_si512(values));
}

// Up to 16 rows of x, `stride` apart, as right operands: [step of 32 k][pair][row][2]; zeros from k on, and
// beyond the rows.
inline void pack_rows(const bf16* x, int64_t rows, int64_t stride, int64_t k, bf16* packed) {
    for (int64_t at = 0; at < k; at += 32, packed += kTileElements) {
        const __mmask32 mask = first_of_32(k - at);
        __m512i pairs[kTile];
        for (int64_t j = 0; j < kTile; ++j)
            pairs[j] = j < rows ? _mm512_maskz_loadu_epi16(mask, x + j * stride + at) : _mm512_setzero_si512();
        transpose(pairs);
        for (int64_t j = 0; j < kTile; ++j) _mm512_store_si512(packed + 32 * j, pairs[j]);
    }
}

// One granule's share of v, of a chunk's rows: A, the packed rows of the group they stand in, and where their
// lines go.
struct Shrink {
    const bf16 *a, *x;
    float scale;
    int64_t first, rows;  // of the group
    char* v;
};

template <int Count>
inline void shrink_step(const Shrink* items, const bf16* const* a, int64_t stride, int64_t step) {
    const int64_t at = step * kTileElements;
    _tile_loadd(4, items[0].x + at, 64);
    _tile_loadd(5, a[0], stride);
    _tile_dpbf16ps(0, 5, 4);
    if constexpr (Count > 1) {
        _tile_loadd(6, items[1].x + at, 64);
        _tile_loadd(7, a[1], stride);
        _tile_dpbf16ps(1, 7, 6);
    }
    if constexpr (Count > 2) {
        _tile_loadd(4, items[2].x + at, 64);
        _tile_loadd(5, a[2], stride);
        _tile_dpbf16ps(2, 5, 4);
    }
    if constexpr (Count > 3) {
        _tile_loadd(6, items[3].x + at, 64);
        _tile_loadd(7, a[3], stride);
        _tile_dpbf16ps(3, 7, 6);
    }
}

// Up to four at a time, as a tile's sums have to wait for each other.
template <int Count>
void shrink_in_tiles(const Shrink* items, int64_t k, int64_t v_stride, Stream& stream) {
    alignas(64) float sums[Count][kRank * kTile];
    const bf16* a[Count];
    written();
    _tile_zero(0);
    if constexpr (Count > 1) _tile_zero(1);
    if constexpr (Count > 2) _tile_zero(2);
    if constexpr (Count > 3) _tile_zero(3);
    for (int64_t step = 0; step < k / 32; ++step) {
        for (int i = 0; i < Count; ++i) a[i] = items[i].a + 32 * step;
        shrink_step<Count>(items, a, 2 * k, step);
        stream.share();
    }
    if (k % 32) {  // a tile would reach into the next row, or past the last
        alignas(64) bf16 ends[Count][kTileElements];
        for (int i = 0; i < Count; ++i)
            for (int64_t r = 0; r < kRank; ++r) {
                const bf16* end = items[i].a + r * k + k / 32 * 32;
                _mm512_store_si512(ends[i] + 32 * r, _mm512_maskz_loadu_epi16(first_of_32(k % 32), end));
                a[i] = ends[i];
            }
        written();
        shrink_step<Count>(items, a, 64, k / 32);
    }
    _tile_stored(0, sums[0], 64);
    if constexpr (Count > 1) _tile_stored(1, sums[1], 64);
    if constexpr (Count > 2) _tile_stored(2, sums[2], 64);
    if constexpr (Count > 3) _tile_stored(3, sums[3], 64);
    for (int i = 0; i < Count; ++i) {  // [rank][row] to one line a row
        __m512i rows[kTile];
        for (int64_t r = 0; r < kRank; ++r) rows[r] = _mm512_load_si512(sums[i] + r * kTile);
        transpose(rows);
        for (int64_t j = 0; j < items[i].rows; ++j) {
            const __m512 whole = _mm512_castsi512_ps(rows[items[i].first + j]);
            const __m512 scaled = _mm512_mul_ps(whole, _mm512_set1_ps(items[i].scale));
            _mm512_store_si512(items[i].v + j * v_stride, pairs_of(scaled));
        }
    }
}

// Collects what there is to shrink, until four can be done together.
class Shrinker {
  public:
    Shrinker(int64_t k, int64_t v_stride, Stream& stream) : k_(k), v_stride_(v_stride), stream_(stream) {}
    void add(const Shrink& item) {
        items_[count_++] = item;
        if (count_ == kTogether) flush();
    }
    void flush() {
        switch (count_) {
            case 1: shrink_in_tiles<1>(items_, k_, v_stride_, stream_); break;
            case 2: shrink_in_tiles<2>(items_, k_, v_stride_, stream_); break;
            case 3: shrink_in_tiles<3>(items_, k_, v_stride_, stream_); break;
            case 4: shrink_in_tiles<4>(items_, k_, v_stride_, stream_);
        }
        count_ = 0;
    }

  private:
    static constexpr int kTogether = 4;
    Shrink items_[kTogether];
    int count_ = 0;
    const int64_t k_, v_stride_;
    Stream& stream_;
};

// panel += B v, piece after piece of 16 outputs: B's values are laid out some pieces ahead of their product,
// and its sums are added some pieces later, as both have to leave the core in between. Tiles hold whole
// chunks; of what they give, only the segment's own rows are added.
class Expander {
  public:
    explicit Expander(Stream& stream) : stream_(stream) {}
    ~Expander() {
        while (multiplied_ < laid_out_) multiply();
        while (added_ < laid_out_) add();
    }
    void expand(const Granules& granules, const char* v, int64_t v_stride, int64_t rows, const Target& to) {
        for (int64_t n = to.lo; n < to.hi; n += kTile)
            for (int64_t from = 0; from < granules.count; from += kGroup) {
                const auto mask = static_cast<__mmask16>(to.hi - n >= kTile ? 0xffff : (1u << (to.hi - n)) - 1);
                Piece piece{std::min(kGroup, granules.count - from), v + from * kLineBytes, v_stride, rows,
                            to.panel + n - to.lo, to.stride, mask, to.is_new && from == 0, 0};
                for (int64_t lo = 0; lo < rows; lo += kLoraRows) {
                    piece.rows = std::min(kLoraRows, rows - lo);
                    piece.weights = lo / kLoraRows % 2 ? (laid_out_ - 1) % kSlots : laid_out_ % kSlots;
                    lay_out(granules, from, n, to.width, piece);
                    piece.v += kLoraRows * v_stride, piece.panel += kLoraRows * to.stride;
                }
            }
    }

  private:
    static constexpr int64_t kAheadPieces = 2, kSlots = 4;
    struct Piece {
        int64_t count;  // of granules
        const char* v;
        int64_t v_stride, rows;
        float* panel;
        int64_t stride;
        __mmask16 mask;
        bool is_new;
        int64_t weights;  // their slot: its own, or for the next rows the one before it
    };

    void lay_out(const Granules& granules, int64_t from, int64_t n, int64_t width, const Piece& piece) {
        const int64_t slot = laid_out_++ % kSlots;
        pieces_[slot] = piece;
        stream_.share();
        for (int64_t g = 0; g < piece.count && piece.weights == slot; ++g) {
            const bf16* b = granules.b<bf16>(from + g) + n;
#pragma GCC unroll 16
            for (int64_t r = 0; r < kRank; ++r) {
                _mm512_store_si512(weights_[slot][g] + 32 * r,
                                   each_twice(_mm256_maskz_loadu_epi16(piece.mask, b + r * width)));
            }
        }
        if (laid_out_ - multiplied_ > kAheadPieces) multiply();
    }
    void multiply() {
        const int64_t slot = multiplied_++ % kSlots;
        const Piece& piece = pieces_[slot];
        written();
        _tile_zero(0);
        for (int64_t g = 0; g < piece.count; ++g) {
            _tile_loadd(1, piece.v + g * kLineBytes, piece.v_stride);
            _tile_loadd(2, weights_[piece.weights][g], 64);
            _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, sums_[slot], 64);
        if (multiplied_ - added_ > 1) add();
    }
    void add() {
        const int64_t slot = added_++ % kSlots;
        const Piece& piece = pieces_[slot];
        for (int64_t j = 0; j < piece.rows; ++j) {
            float* const panel = piece.panel + j * piece.stride;
            const __m512 old = _mm512_maskz_loadu_ps(piece.is_new ? 0 : piece.mask, panel);
            const __m512 sum = _mm512_load_ps(sums_[slot] + j * kTile);
            _mm512_mask_storeu_ps(panel, piece.mask, _mm512_add_ps(old, sum));
        }
    }

    alignas(64) bf16 weights_[kSlots][kGroup][kTileElements];
    alignas(64) float sums_[kSlots][kTile * kTile];
    Piece pieces_[kSlots];
    int64_t laid_out_ = 0, multiplied_ = 0, added_ = 0;
    Stream& stream_;
};

}  // namespace

#endif
