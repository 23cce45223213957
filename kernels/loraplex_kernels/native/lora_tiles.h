// The low-rank updates in the processor's tiles: bf16 rows and weights, float sums.
//
// v^T = A x^T with A's granule as the left operand and 16 packed rows of the batch as the right one, whoever
// owns them. B v takes B as the right operand, in pairs of ranks: a tile of 32 outputs holds their 16 ranks in
// two pieces of 16 outputs, one above the other, and v as the left operand is zero where the other piece
// stands. Each v is two bf16 that add up to it (16 bits of its mantissa); what they make is added up apart
// until all granules of a group are through: so sums are the same however many rows there are.

#pragma once

#if LORAPLEX_AMX

namespace {

constexpr int64_t kPieces = 2 * kTile;  // outputs of a tile of B

// Elements of A of so many inputs, or of B of so many outputs.
inline int64_t operand_size(int64_t features) { return kRank * round_up(features, kBlock); }

// A line of v.
struct Line {
    __m256i high, low;
    explicit Line(__m512 whole) {
        high = (__m256i)_mm512_cvtneps_pbh(whole);
        low = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(whole, first_of_pairs(_mm512_cvtepu16_epi32(high))));
    }
    explicit Line(const char* at) {
        high = _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
        low = _mm256_load_si256(reinterpret_cast<const __m256i*>(at) + 1);
    }
    void store(char* at) const { _mm512_store_si512(at, _mm512_inserti64x4(_mm512_castsi256_si512(high), low, 1)); }
};

// A row of a left operand that is zero but for one piece.
inline void store_piece(char* row, __m256i values, int piece) {
    const __m512i first = _mm512_zextsi256_si512(values);
    _mm512_store_si512(row, piece ? _mm512_shuffle_i64x2(first, first, 0x4e) : first);
}

// One granule's share of v, of some rows of the packed group `x` from `first` on: a line each. Even and odd
// steps have sums of their own, as a tile's next product has to wait for its last.
inline void shrink_in_tiles(const bf16* a, const bf16* x, int64_t k, float scale, int64_t first, int64_t rows,
                            char* lines, int64_t stride, Stream& stream) {
    alignas(64) float sums[2][kRank * kTile];
    written();
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t at = 0; at < operand_size(k); at += 2 * kTileElements) {
        _tile_loadd(4, x + at, 64);
        _tile_loadd(5, a + at, 64);
        _tile_dpbf16ps(0, 5, 4);
        _tile_loadd(6, x + at + kTileElements, 64);
        _tile_loadd(7, a + at + kTileElements, 64);
        _tile_dpbf16ps(1, 7, 6);
        stream.share(2);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    __m512i turned[kTile];  // [rank][row]
    for (int64_t r = 0; r < kRank; ++r) {
        const __m512 even = _mm512_load_ps(sums[0] + r * kTile), odd = _mm512_load_ps(sums[1] + r * kTile);
        turned[r] = _mm512_castps_si512(add_in_order(even, odd));
    }
    transpose(turned);
    for (int64_t j = 0; j < rows; ++j) {
        const __m512 whole = _mm512_castsi512_ps(turned[first + j]);
        Line(_mm512_mul_ps(whole, _mm512_set1_ps(scale))).store(lines + j * stride);
    }
}

// panel += B v, 32 outputs after 32. Their sums are added when the next ones are under way, as they have to
// leave the core in between. Tiles hold whole chunks; of what they give, only the segment's own rows are added.
class Expander {
  public:
    explicit Expander(Stream& stream) : stream_(stream) {}
    ~Expander() { add(); }
    void expand(const Granules& granules, const char* v, int64_t v_stride, int64_t rows, Target to) {
        for (int64_t lo = 0; lo < rows; lo += kLoraRows) {
            const int64_t count = std::min(kLoraRows, rows - lo);
            for (int64_t from = 0; from < granules.count; from += kGroup) {
                const int64_t group = std::min(kGroup, granules.count - from);
                const bf16* b[kGroup];
                for (int64_t g = 0; g < group; ++g) b[g] = granules.b<bf16>(from + g);
                const char* const lines = v + from * kLineBytes;
                const bool is_new = to.is_new && from == 0;
                if (count > kFewRows)
                    expand_many(b, group, lines, v_stride, count, to, is_new);
                else
                    expand_few(b, group, lines, v_stride, count, to, is_new);
            }
            v += kLoraRows * v_stride, to.panel += kLoraRows * to.stride;
        }
    }

  private:
    static_assert(kFewRows * 4 == kTile, "a tile holds few rows' operands");

    // Where the sums of 32 outputs go.
    struct Piece {
        float* panel;
        int64_t stride, rows;
        __mmask32 mask;
        bool is_new, is_few;
    };

    static Piece piece_at(int64_t n, int64_t rows, const Target& to, bool is_new, bool is_few) {
        const __mmask32 before = n >= to.lo ? 0 : first_of_32(to.lo - n);
        return {to.panel + n - to.lo, to.stride, rows, first_of_32(to.hi - n) & ~before, is_new, is_few};
    }

    // One tile has all operands of up to four rows: high and low, for either piece.
    void expand_few(const bf16* const* b, int64_t count, const char* v, int64_t v_stride, int64_t rows,
                    const Target& to, bool is_new) {
        alignas(64) char left[kGroup][kTile][64];
        for (int64_t g = 0; g < count; ++g)
            for (int64_t j = 0; j < rows; ++j) {
                const Line line(v + j * v_stride + g * kLineBytes);
                for (int piece = 0; piece < 2; ++piece) {
                    store_piece(left[g][kFewRows * piece + j], line.high, piece);
                    store_piece(left[g][kFewRows * (2 + piece) + j], line.low, piece);
                }
            }
        written();
        for (int64_t n = to.lo / kPieces * kPieces; n < to.hi; n += kPieces) {
            stream_.share(count);
            _tile_zero(0);
            for (int64_t g = 0; g < count; ++g) {
                _tile_loadd(4, left[g], 64);
                _tile_loadd(5, b[g] + n * kRank, 64);
                _tile_dpbf16ps(0, 4, 5);
            }
            _tile_stored(0, sums_[1 - slot_], 64);
            begin(piece_at(n, rows, to, is_new, true));
        }
    }

    void expand_many(const bf16* const* b, int64_t count, const char* v, int64_t v_stride, int64_t rows,
                     const Target& to, bool is_new) {
        const int first_piece = to.lo / kTile % 2;
        const bool is_short = ceil_div(to.hi, kTile) - to.lo / kTile == 1;  // one piece
        alignas(64) char left[kGroup][4][kTile][64];  // [granule][piece, high and low]
        for (int64_t g = 0; g < count; ++g)
            for (int64_t j = 0; j < rows; ++j) {
                const Line line(v + j * v_stride + g * kLineBytes);
                for (int piece = 0; piece < 2; ++piece) {
                    if (is_short && piece != first_piece) continue;
                    store_piece(left[g][2 * piece][j], line.high, piece);
                    store_piece(left[g][2 * piece + 1][j], line.low, piece);
                }
            }
        written();
        for (int64_t n = to.lo / kPieces * kPieces; n < to.hi; n += kPieces) {
            const Piece piece = piece_at(n, rows, to, is_new, false);
            stream_.share(count);
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t g = 0; g < count; ++g) {
                _tile_loadd(4, b[g] + n * kRank, 64);
                if (piece.mask & 0xffff) {
                    _tile_loadd(5, left[g][0], 64);
                    _tile_dpbf16ps(0, 5, 4);
                    _tile_loadd(6, left[g][1], 64);
                    _tile_dpbf16ps(1, 6, 4);
                }
                if (piece.mask >> kTile) {
                    _tile_loadd(7, left[g][2], 64);
                    _tile_dpbf16ps(2, 7, 4);
                    _tile_loadd(5, left[g][3], 64);
                    _tile_dpbf16ps(3, 5, 4);
                }
            }
            float* const sums = sums_[1 - slot_];
            _tile_stored(0, sums, 64);
            _tile_stored(1, sums + 256, 64);
            _tile_stored(2, sums + 512, 64);
            _tile_stored(3, sums + 768, 64);
            begin(piece);
        }
    }

    // The sums in the other slot are this piece's.
    void begin(const Piece& piece) {
        add();
        piece_ = piece, slot_ = 1 - slot_;
    }

    void add() {
        const Piece piece = piece_;
        const int64_t other = piece.is_few ? kFewRows * kTile : 2 * 256, low = piece.is_few ? 2 * kFewRows * kTile : 256;
        const float* sums = sums_[slot_];
        float* to = piece.panel;
        const auto add_half = [&](const float* from, float* at, __mmask16 mask) {
            const __m512 sum = add_in_order(_mm512_load_ps(from), _mm512_load_ps(from + low));
            const __m512 old = _mm512_maskz_loadu_ps(piece.is_new ? 0 : mask, at);
            _mm512_mask_storeu_ps(at, mask, add_in_order(old, sum));
        };
        for (int64_t j = 0; j < piece.rows; ++j, sums += kTile, to += piece.stride) {
            add_half(sums, to, static_cast<__mmask16>(piece.mask));
            add_half(sums + other, to + kTile, static_cast<__mmask16>(piece.mask >> kTile));
        }
        piece_.rows = 0;
    }

    alignas(64) float sums_[2][4 * 256];
    Piece piece_{};
    int64_t slot_ = 0;
    Stream& stream_;
};

}  // namespace

#endif
