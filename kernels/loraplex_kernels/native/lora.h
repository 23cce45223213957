// The rows' own low-rank updates, through the adapter tables, and their output scales.
//
// v = s A x goes to memory, a line of 16 ranks a row, projection and granule; B v is added to fp32 panels
// of the output. Every row's sums are the same however many rows its adapter has in the batch.
//
// Granules lie as granules.py says: as operands where there are tiles and they are bf16, else in rows.

#pragma once

#include <atomic>
#include <type_traits>
#include <utility>
#include <vector>

#include "amx.h"
#include "lanes.h"
#include "packed.h"
#include "scratch.h"
#include "stream.h"

namespace {

constexpr int64_t kRank = 16;       // GRANULE_RANK
constexpr int64_t kRows = 4;        // rows that share one pass over a granule in plain vectors
constexpr int64_t kLoraRows = 16;   // rows of the batch that share one pass in tiles
constexpr int64_t kFewRows = 4;     // up to which one tile holds all that B v needs of them
constexpr int64_t kGroup = 4;       // granules whose sums are added up before they meet others
constexpr int64_t kLineBytes = 64;  // of v: 16 floats, or two times 16 bf16 that add up to them (in tiles)
static_assert(kRows == 4, "each count up to 4 is named where it is chosen");
static_assert(kLoraRows == kTile && kRank == kTile, "rows and ranks fill a tile");

struct Tables {
    const int64_t* offset;
    const float* scale;
    const int32_t* num_granules;
    int64_t layers, modules, granules;
};

struct Projection {
    int64_t module, column, width;
};

struct LoraStep {
    const uint8_t* arena;
    Tables tables;
    const int32_t* segments;  // [num_segments][3]: slot, lo, hi
    int64_t num_segments;
};

struct Segment {
    int64_t slot, lo, hi;
};

// One module of one layer of one adapter.
struct Granules {
    const uint8_t* arena;
    const int64_t* offset;
    const float* scales;
    int64_t count;
    template <typename W>
    const W* a(int64_t g) const {
        return reinterpret_cast<const W*>(arena + offset[2 * g]);
    }
    template <typename W>
    const W* b(int64_t g) const {
        return reinterpret_cast<const W*>(arena + offset[2 * g + 1]);
    }
};

// What the updates of a step share; keeps its memory from step to step.
struct LoraPlan {
    LoraStep step;
    int64_t num_rows;
    std::vector<Segment> segments;
    std::vector<Segment> chunks;  // parts of segments, each of rows within one of the batch's groups of kLoraRows
    std::vector<Segment> owned;   // runs of rows with an adapter, whichever
    int64_t num_owned, num_slots;  // rows with an adapter, and different adapters

    // For those of so many rows that lie in [from, to).
    void build(const LoraStep& given, int64_t rows, int64_t from, int64_t to) {
        step = given, num_rows = rows;
        segments.clear(), chunks.clear(), owned.clear();
        num_owned = num_slots = 0;
        for (int64_t s = 0; s < step.num_segments; ++s) {
            const Segment all{step.segments[3 * s], std::max<int64_t>(from, step.segments[3 * s + 1]),
                              std::min<int64_t>(to, step.segments[3 * s + 2])};
            if (all.lo >= all.hi) continue;
            num_owned += all.hi - all.lo;
            num_slots += std::none_of(segments.begin(), segments.end(),
                                      [&](const Segment& other) { return other.slot == all.slot; });
            segments.push_back(all);
            if (owned.empty() || owned.back().hi != all.lo)
                owned.push_back(all);
            else
                owned.back().hi = all.hi;
            for (int64_t lo = all.lo, hi; lo < all.hi; lo = hi) {
                hi = std::min(all.hi, round_up(lo + 1, kLoraRows));
                chunks.push_back({all.slot, lo, hi});
            }
        }
    }
    bool is_empty() const { return segments.empty(); }
    // Of a linear's first phase: every chunk, for each projection.
    int64_t num_tasks(int64_t num_projections) const { return static_cast<int64_t>(chunks.size()) * num_projections; }
    std::pair<Segment, int64_t> task(int64_t index) const {  // the chunk, and which projection
        const int64_t count = static_cast<int64_t>(chunks.size());
        return {chunks[index % count], index / count};
    }
    Granules granules(int64_t slot, int64_t layer, int64_t module) const {
        const Tables& t = step.tables;
        const int64_t cell = (slot * t.layers + layer) * t.modules + module, entry = cell * t.granules;
        return {step.arena, t.offset + 2 * entry, t.scale + entry, t.num_granules[cell]};
    }
    // Whole chunks are read, past the last row too.
    static int64_t v_bytes(int64_t rows, int64_t num_projections, int64_t granules) {
        return (rows + kLoraRows) * num_projections * granules * kLineBytes;
    }
    int64_t v_bytes(int64_t num_projections) const { return v_bytes(num_rows, num_projections, step.tables.granules); }
    int64_t row_bytes(int64_t num_projections) const { return num_projections * step.tables.granules * kLineBytes; }
    // At most, of its own lists.
    static int64_t own_bytes(int64_t rows) { return 3 * kGrowth * rows * static_cast<int64_t>(sizeof(Segment)); }
    char* line(void* v, int64_t row, int64_t projection, int64_t num_projections) const {
        return static_cast<char*>(v) + row * row_bytes(num_projections) +
               projection * step.tables.granules * kLineBytes;
    }
    const char* line(const void* v, int64_t row, int64_t projection, int64_t num_projections) const {
        return line(const_cast<void*>(v), row, projection, num_projections);
    }
};

// Outputs [lo, hi) of one projection, and the fp32 they are added to: the first row's output lo.
struct Target {
    float* panel;
    int64_t stride, lo, hi, width;  // width: of the projection
    bool is_new = false;            // nothing is there yet: it is written
};

// v[j][r] = scale * sum_k x[j][k] A[r][k], two ranks a pass.
template <int64_t Rows, typename W>
void shrink(const float* x, const W* a, float scale, float (*v)[kRank], int64_t k_size) {
    for (int64_t r = 0; r < kRank; r += 2) {
        const W *a0 = a + r * k_size, *a1 = a0 + k_size;
        Lanes sum0[Rows] = {}, sum1[Rows] = {};
        int64_t k = 0;
        for (; k + kLanes <= k_size; k += kLanes) {
            const Lanes w0 = load_lanes(a0 + k), w1 = load_lanes(a1 + k);
            for (int64_t j = 0; j < Rows; ++j) {
                const Lanes input = load_lanes(x + j * k_size + k);
                sum0[j] += input * w0;
                sum1[j] += input * w1;
            }
        }
        for (int64_t j = 0; j < Rows; ++j) {
            float total0 = sum_lanes(sum0[j]), total1 = sum_lanes(sum1[j]);
            for (int64_t i = k; i < k_size; ++i) {
                total0 += x[j * k_size + i] * load(a0, i);
                total1 += x[j * k_size + i] * load(a1, i);
            }
            v[j][r] = scale * total0;
            v[j][r + 1] = scale * total1;
        }
    }
}

// v of up to kLoraRows rows of x, without tiles.
template <typename T>
void shrink_rows(const Granules& granules, const T* x, int64_t k_size, int64_t rows, char* v, int64_t v_stride) {
    static thread_local std::vector<float> inputs;
    inputs.resize(std::max<size_t>(inputs.size(), kRows * k_size));
    for (int64_t lo = 0; lo < rows; lo += kRows) {
        const int64_t count = std::min(kRows, rows - lo);
        for (int64_t i = 0; i < count * k_size; ++i) inputs[i] = load(x + lo * k_size, i);
        for (int64_t g = 0; g < granules.count; ++g) {
            float shrunk[kRows][kRank];
            const T* a = granules.a<T>(g);
            switch (count) {
                case 1: shrink<1>(inputs.data(), a, granules.scales[g], shrunk, k_size); break;
                case 2: shrink<2>(inputs.data(), a, granules.scales[g], shrunk, k_size); break;
                case 3: shrink<3>(inputs.data(), a, granules.scales[g], shrunk, k_size); break;
                default: shrink<kRows>(inputs.data(), a, granules.scales[g], shrunk, k_size);
            }
            for (int64_t j = 0; j < count; ++j)
                std::memcpy(v + (lo + j) * v_stride + g * kLineBytes, shrunk[j], sizeof(shrunk[j]));
        }
    }
}

// panel += B v of some rows, without tiles.
template <int64_t Rows, typename W>
void expand(const Granules& granules, const char* v, int64_t v_stride, const Target& to) {
    const auto ranks = [&](int64_t row, int64_t g) {
        return reinterpret_cast<const float*>(v + row * v_stride + g * kLineBytes);
    };
    int64_t n = to.lo;
    for (; n + kLanes <= to.hi; n += kLanes) {
        Lanes sum[Rows];
        for (int64_t j = 0; j < Rows; ++j) sum[j] = load_lanes(to.panel + j * to.stride + n - to.lo);
        for (int64_t g = 0; g < granules.count; ++g)
#pragma GCC unroll 1  // or the compiler may add up in another order for another number of rows
            for (int64_t r = 0; r < kRank; ++r) {
                const Lanes weight = load_lanes(granules.b<W>(g) + r * to.width + n);
                for (int64_t j = 0; j < Rows; ++j) sum[j] += ranks(j, g)[r] * weight;
            }
        for (int64_t j = 0; j < Rows; ++j) store_lanes(to.panel + j * to.stride + n - to.lo, sum[j]);
    }
    for (; n < to.hi; ++n)
        for (int64_t j = 0; j < Rows; ++j) {
            float sum = to.panel[j * to.stride + n - to.lo];
            for (int64_t g = 0; g < granules.count; ++g)
                for (int64_t r = 0; r < kRank; ++r) sum += ranks(j, g)[r] * load(granules.b<W>(g), r * to.width + n);
            to.panel[j * to.stride + n - to.lo] = sum;
        }
}

template <typename W>
void expand_rows(const Granules& granules, const char* v, int64_t v_stride, int64_t rows, Target to) {
    for (int64_t lo = 0; lo < rows; lo += kRows) {
        switch (rows - lo) {
            case 1: expand<1, W>(granules, v, v_stride, to); break;
            case 2: expand<2, W>(granules, v, v_stride, to); break;
            case 3: expand<3, W>(granules, v, v_stride, to); break;
            default: expand<kRows, W>(granules, v, v_stride, to);
        }
        v += kRows * v_stride;
        to.panel += kRows * to.stride;
    }
}

}  // namespace

#include "lora_tiles.h"

namespace {

template <typename T>
inline bool in_tiles() {
    return std::is_same_v<T, bf16> && amx_is_permitted();
}

#if LORAPLEX_AMX
inline void shrink_chunk(const Granules& granules, const Segment& chunk, const bf16* packed, int64_t k, char* lines,
                         int64_t stride, Stream& stream) {
    const int64_t first = chunk.lo % kLoraRows;
    const bf16* const rows = packed + (chunk.lo - first) * round_up(k, kBlock);
    for (int64_t g = 0; g < granules.count; ++g)
        shrink_in_tiles(granules.a<bf16>(g), rows, k, granules.scales[g], first, chunk.hi - chunk.lo,
                        lines + g * kLineBytes, stride, stream);
}
#endif

// The first phase of a linear's updates. Every thread of a team calls it, with a counter that starts at 0
// and v of `plan.v_bytes(num_p)`, 64 bytes aligned. With tiles, `packed` holds x in Order::kCodes.
template <typename T>
void lora_shrink(const LoraPlan& plan, int64_t layer, const Projection* p, int64_t num_p, const T* x,
                 [[maybe_unused]] const bf16* packed, int64_t k, void* v, std::atomic<int64_t>& next) {
    const int64_t stride = plan.row_bytes(num_p), count = plan.num_tasks(num_p);
    for (int64_t task = next++; task < count; task = next++) {
        const auto [chunk, i] = plan.task(task);
        const Granules granules = plan.granules(chunk.slot, layer, p[i].module);
        char* const lines = plan.line(v, chunk.lo, i, num_p);
#if LORAPLEX_AMX
        if constexpr (std::is_same_v<T, bf16>)
            if (in_tiles<T>()) {
                Stream nothing;
                shrink_chunk(granules, chunk, packed, k, lines, stride, nothing);
                continue;
            }
#endif
        shrink_rows(granules, x + chunk.lo * k, k, chunk.hi - chunk.lo, lines, stride);
    }
}

// Calls `visit(segment, projection's index, first row, last row + 1, first output, last + 1)` for what of an
// update falls into a panel; outputs count from the projection's first.
template <typename Visit>
void each_overlap(const LoraPlan& plan, const Projection* p, int64_t num_p, int64_t row_lo, int64_t row_hi,
                  int64_t n_lo, int64_t n_hi, Visit&& visit) {
    for (int64_t i = 0; i < num_p; ++i) {
        const int64_t lo = std::max(n_lo, p[i].column) - p[i].column;
        const int64_t hi = std::min(n_hi, p[i].column + p[i].width) - p[i].column;
        if (lo >= hi) continue;
        for (const Segment& s : plan.segments)
            if (s.lo < row_hi && row_lo < s.hi) visit(s, i, std::max(row_lo, s.lo), std::min(row_hi, s.hi), lo, hi);
    }
}

// `visit(expand)`: what `expand(granules, v, v_stride, rows, target)` was asked for is done when this returns.
template <typename T, typename Visit>
void expanding(Visit&& visit) {
#if LORAPLEX_AMX
    if constexpr (std::is_same_v<T, bf16>)
        if (in_tiles<T>()) {
            Stream nothing;
            Expander expander(nothing);
            return visit([&](auto&&... update) { expander.expand(update...); });
        }
#endif
    visit([](auto&&... update) { expand_rows<T>(update...); });
}

// The second: panel[row - row_lo][n - n_lo] += update, fp32; n counts the stacked linear's outputs.
template <typename T>
void lora_expand(const LoraPlan& plan, int64_t layer, const Projection* p, int64_t num_p, const void* v, float* panel,
                 int64_t stride, int64_t row_lo, int64_t row_hi, int64_t n_lo, int64_t n_hi) {
    expanding<T>([&](auto&& expand) {
        each_overlap(plan, p, num_p, row_lo, row_hi, n_lo, n_hi,
                     [&](const Segment& s, int64_t i, int64_t first, int64_t last, int64_t lo, int64_t hi) {
                         float* at = panel + (first - row_lo) * stride + p[i].column + lo - n_lo;
                         expand(plan.granules(s.slot, layer, p[i].module), plan.line(v, first, i, num_p),
                                plan.row_bytes(num_p), last - first, Target{at, stride, lo, hi, p[i].width});
                     });
    });
}

// panel[row - row_lo][n - n_lo] *= c[n] for the rows of adapters that have a c, fp32, at this layer.
inline void scale_output_panel(const LoraPlan& plan, const int64_t* offset, int64_t layer, const Projection* p,
                               int64_t num_p, float* panel, int64_t stride, int64_t row_lo, int64_t row_hi,
                               int64_t n_lo, int64_t n_hi) {
    each_overlap(plan, p, num_p, row_lo, row_hi, n_lo, n_hi,
                 [&](const Segment& s, int64_t i, int64_t first, int64_t last, int64_t lo, int64_t hi) {
                     const Tables& t = plan.step.tables;
                     const int64_t at = offset[(s.slot * t.layers + layer) * t.modules + p[i].module];
                     if (at < 0) return;
                     const float* c = reinterpret_cast<const float*>(plan.step.arena + at) + lo;
                     for (int64_t row = first; row < last; ++row) {
                         float* y = panel + (row - row_lo) * stride + p[i].column + lo - n_lo;
                         for (int64_t n = 0; n < hi - lo; ++n) y[n] *= c[n];
                     }
                 });
}

constexpr int64_t kPanelRows = 64, kPanelColumns = 64;

// One segment's update of up to kPanelRows rows and kPanelColumns outputs of a projection, rounded once.
template <typename T>
void lora_panel(const LoraPlan& plan, int64_t layer, const Projection* p, int64_t num_p, const void* v, int64_t i,
                const Segment& rows, int64_t lo, int64_t hi, T* y, int64_t y_stride) {
    const Granules granules = plan.granules(rows.slot, layer, p[i].module);
    const char* lines = plan.line(v, rows.lo, i, num_p);
    const int64_t count = rows.hi - rows.lo;
    y += rows.lo * y_stride + p[i].column + lo;
    if constexpr (std::is_same_v<T, float>) {
        expanding<T>([&](auto&& expand) {
            expand(granules, lines, plan.row_bytes(num_p), count, Target{y, y_stride, lo, hi, p[i].width});
        });
    } else {
        alignas(64) float panel[kPanelRows * kPanelColumns];
        for (int64_t j = 0; j < count; ++j)
            for (int64_t n = 0; n < hi - lo; ++n) panel[j * kPanelColumns + n] = load(y + j * y_stride, n);
        expanding<T>([&](auto&& expand) {
            expand(granules, lines, plan.row_bytes(num_p), count, Target{panel, kPanelColumns, lo, hi, p[i].width});
        });
        for (int64_t j = 0; j < count; ++j)
            for (int64_t n = 0; n < hi - lo; ++n) store(y + j * y_stride, n, panel[j * kPanelColumns + n]);
    }
}

// Both phases over a whole output.
template <typename T>
void lora(T* y, int64_t y_stride, const T* x, int64_t k_size, const LoraStep& step, int64_t layer,
          const Projection* p, int64_t num_p) {
    static thread_local LoraPlan plan;
    static thread_local std::vector<char> memory, rows_memory;
    struct Task {
        int64_t projection, lo, hi;
    };
    static thread_local std::vector<Task> panels;
    int64_t num_rows = 0, weights = 0;
    for (int64_t s = 0; s < step.num_segments; ++s) {
        const int64_t lo = step.segments[3 * s + 1], hi = step.segments[3 * s + 2];
        num_rows = std::max(num_rows, hi);
        weights += (hi - lo + kRows - 1) / kRows * kRank;
    }
    plan.build(step, num_rows, 0, num_rows);
    panels.clear();
    int64_t elements = 0;
    for (int64_t i = 0; i < num_p; ++i) {
        elements += weights * (k_size + p[i].width);
        for (int64_t lo = 0; lo < p[i].width; lo += kPanelColumns)
            panels.push_back({i, lo, std::min(lo + kPanelColumns, p[i].width)});
    }
    memory.resize(std::max<size_t>(memory.size(), plan.v_bytes(num_p) + 64));
    void* const v = aligned(memory.data());
    if (in_tiles<T>())
        rows_memory.resize(std::max<size_t>(rows_memory.size(), packed_size(num_rows, k_size) * sizeof(bf16) + 64));
    bf16* const packed = aligned(reinterpret_cast<bf16*>(rows_memory.data()));
    const LoraPlan& planned = plan;  // the caller's, for all threads
    const std::vector<Task>& tasks = panels;
    const int64_t num_tasks = static_cast<int64_t>(tasks.size());
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(num_threads) if (elements > kWorthWaking)
    {
        const TileScope tiles;
#if LORAPLEX_AMX
        if constexpr (std::is_same_v<T, bf16>)
            if (in_tiles<T>()) {
#pragma omp for schedule(static)
                for (int64_t group = 0; group < ceil_div(num_rows, kLoraRows); ++group)
                    pack_group(x, num_rows, k_size, group, packed, Order::kCodes);
            }
#endif
        lora_shrink(planned, layer, p, num_p, x, packed, k_size, v, next);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < num_tasks; ++t) {
            const auto [i, lo, hi] = tasks[t];
            for (const Segment& s : planned.segments) {
                if (planned.granules(s.slot, layer, p[i].module).count == 0) continue;
                for (int64_t row = s.lo; row < s.hi; row += kPanelRows)
                    lora_panel(planned, layer, p, num_p, v, i, {s.slot, row, std::min(row + kPanelRows, s.hi)}, lo, hi,
                               y, y_stride);
            }
        }
    }
}

// y[row][column + n] *= c[n] for the rows of adapters that have a c, fp32, at this layer and module.
template <typename T>
void scale_output(T* y, int64_t y_stride, const uint8_t* arena, const int64_t* offset, int64_t layers,
                  int64_t modules, const int32_t* segments, int64_t num_segments, int64_t layer,
                  const Projection* projections, int64_t num_projections) {
    for (int64_t s = 0; s < num_segments; ++s) {
        const int64_t slot = segments[3 * s], lo = segments[3 * s + 1], hi = segments[3 * s + 2];
        for (int64_t p = 0; p < num_projections; ++p) {
            const Projection projection = projections[p];
            const int64_t at = offset[(slot * layers + layer) * modules + projection.module];
            if (at < 0) continue;
            const float* c = reinterpret_cast<const float*>(arena + at);
            const int64_t width = projection.width;
#pragma omp parallel for schedule(static) num_threads(num_threads) if ((hi - lo) * width > kWorthWaking)
            for (int64_t row = lo; row < hi; ++row) {
                T* o = y + row * y_stride + projection.column;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) store(o, i, load(o, i) * c[i]);
            }
        }
    }
}

}  // namespace
