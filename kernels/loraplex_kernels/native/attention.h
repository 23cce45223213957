// Attention over the paged cache: rows of one query and of many, planned once a step as work items.
//
// An item is a tile of a sequence's queries with the heads that share one kv head ("columns"), against
// some or all of its keys. Keys are summed up a segment of kSegment at a time, each as in online softmax
// (Milakov & Gimelshein 2018; Dao et al. 2022), and the segments merged in their order; whether one thread
// computes them all or several do (Flash-Decoding's split), a row's sums are the same.

#pragma once

#include <atomic>
#include <cfloat>
#include <tuple>
#include <type_traits>
#include <vector>

#include "amx.h"
#include "elementwise.h"
#include "lanes.h"
#include "scratch.h"
#include "stream.h"

namespace {

constexpr int64_t kSegment = 512;       // keys
constexpr int64_t kColumns = 192;       // of an item, unless one query has more
constexpr int64_t kSplitColumns = 32;   // up to which a sequence's segments are items of their own
constexpr int64_t kKeyBlock = 128;         // keys of one softmax update in tiles
constexpr int64_t kFewColumns = 4;      // up to which vectors take over from tiles once there are scores
constexpr int64_t kClaimedUntil = 8;    // items before the end that a thread claims one at a time
constexpr int64_t kTaskBytes = 512 << 10;  // of keys and values, at most, that items of one task read
constexpr int64_t kWide = 4;            // columns that share a load of a key without tiles
static_assert(kFewColumns == 4 && kWide == 4, "each count up to 4 is named where it is chosen");

struct AttentionStep {
    const int32_t *block_tables, *contexts;
    const int32_t* query_starts;  // null: row i is sequence i
    int64_t max_blocks, num_sequences, heads;
    Cache cache;
    int64_t window;  // 0: none
};

struct AttentionItem {
    int64_t sequence, row, queries;  // row: of the batch, the first of `queries`
    int64_t visible;                 // keys that the first query sees the end of
    int64_t kv_head, lo, hi;         // keys; lo is a multiple of kSegment
    int64_t split, splits, partial, counter;  // `splits` partials lie together, from `partial` on
};

// Unnormalised output, the largest score and the sum of exponentials of each column.
struct Partial {
    float *sums, *top, *total;  // [columns][padded dim], [columns], [columns]
};

// What attention needs of a step besides the layer's tensors; keeps its memory from step to step.
struct AttentionPlan {
    AttentionStep step;
    std::vector<AttentionItem> items;
    std::vector<int64_t> tasks;  // the first item of each, and where the last one ends
    int64_t group, dim, padded, columns;  // columns: the most an item has, a multiple of kTile
    int64_t multiplications, scratch_bytes;
    bool with_tiles;  // head_dim and block_tokens allow them

    void build(const AttentionStep& given);
    // So little to compute that its time is that of its keys and values.
    bool is_few(const AttentionItem& item) const { return with_tiles && item.queries * group <= kFewColumns; }
    static int64_t columns_of_item(int64_t group) { return round_up(std::max(kColumns, group), kTile); }
    // Bytes of one thread's scratch memory.
    static int64_t scratch_size(int64_t dim, int64_t columns);
    // At most, of its own lists and partials.
    static int64_t own_bytes(int64_t heads, int64_t kv_heads, int64_t dim, int64_t rows, int64_t sequences,
                             int64_t context);
    Partial partial(int64_t index) const {
        return cut(partials_.data() + index * partial_floats(kSplitColumns), kSplitColumns);
    }
    Partial cut(float* at, int64_t columns) const { return {at, at + columns * padded, at + columns * (padded + 1)}; }
    int64_t partial_floats(int64_t columns) const { return columns * (padded + 2); }
    // Whether the caller has finished the last of a row's splits; the count starts over.
    bool is_last(const AttentionItem& item) const {
        int32_t& count = finished_[item.counter];
        if (__atomic_add_fetch(&count, 1, __ATOMIC_ACQ_REL) < item.splits) return false;
        __atomic_store_n(&count, 0, __ATOMIC_RELAXED);
        return true;
    }

  private:
    mutable std::vector<float> partials_;
    mutable std::vector<int32_t> finished_;

    void add_tile(int64_t sequence, int64_t row, int64_t queries, int64_t visible, bool split);
    int64_t end_of_task(int64_t first) const;
    int64_t num_partials_, num_counters_;
};

inline void AttentionPlan::build(const AttentionStep& given) {
    step = given;
    items.clear();
    num_partials_ = num_counters_ = multiplications = 0;
    group = step.heads / step.cache.kv_heads, dim = step.cache.head_dim, padded = round_up(dim, kTile);
    columns = columns_of_item(group);
    const int64_t tile = std::max<int64_t>(1, kColumns / group);
    for (int64_t sequence = 0; sequence < step.num_sequences; ++sequence) {
        const int64_t row = step.query_starts ? step.query_starts[sequence] : sequence;
        const int64_t queries = step.query_starts ? step.query_starts[sequence + 1] - row : 1;
        const int64_t visible = step.contexts[sequence] - queries + 1;  // by the first query
        for (int64_t first = 0; first < queries; first += tile)
            add_tile(sequence, row + first, std::min(tile, queries - first), visible + first,
                     queries * group <= kSplitColumns);
    }
    // Long ones first, so that none is left for the end; what lies together, or is read again, in one go.
    const auto order = [&](const AttentionItem& item) {
        return std::make_tuple(-step.contexts[item.sequence], item.sequence, item.lo, item.kv_head, item.row);
    };
    std::sort(items.begin(), items.end(), [&](const auto& a, const auto& b) { return order(a) < order(b); });
    with_tiles = amx_is_permitted() && dim % kTile == 0 && step.cache.block_tokens % kTile == 0;
    tasks.assign(1, 0);
    while (tasks.back() < static_cast<int64_t>(items.size())) tasks.push_back(end_of_task(tasks.back()));
    if (const size_t floats = num_partials_ * partial_floats(kSplitColumns); floats > partials_.size()) {
        std::vector<float>().swap(partials_);  // not while the larger one is made
        partials_.resize(floats);
    }
    finished_.assign(num_counters_, 0);
    scratch_bytes = scratch_size(dim, columns);
}

// Heads of a few columns go together: what they read lies together. Not at the end, where it might keep
// another thread idle.
inline int64_t AttentionPlan::end_of_task(int64_t first) const {
    const AttentionItem& item = items[first];
    const int64_t count = static_cast<int64_t>(items.size());
    const int64_t bytes = 2 * (item.hi - item.lo) * dim * static_cast<int64_t>(sizeof(bf16));
    int64_t end = first + 1;
    if (!is_few(item) || first + kClaimedUntil >= count) return end;
    while (end < count && items[end].sequence == item.sequence && items[end].row == item.row &&
           items[end].lo == item.lo && (end + 1 - first) * bytes <= kTaskBytes)
        ++end;
    return end;
}

inline int64_t AttentionPlan::scratch_size(int64_t dim, int64_t columns) {
    const int64_t padded = round_up(dim, kTile), deep = round_up(dim, 32);
    const int64_t floats = 2 * columns * (padded + 2) + 2 * columns +           // partials, limits
                           columns * deep + kKeyBlock * deep +                  // queries, padded keys
                           4 * kKeyBlock * kTile + kKeyBlock * padded + kWide * kSegment;  // scores, weights, values
    return round_up(floats * sizeof(float), 64) + 64 * 16;
}

inline int64_t AttentionPlan::own_bytes(int64_t heads, int64_t kv_heads, int64_t dim, int64_t rows, int64_t sequences,
                                        int64_t context) {
    const int64_t splits = sequences * kv_heads * ((context + kSegment - 1) / kSegment);
    const int64_t tiles = kv_heads * (rows / std::max<int64_t>(1, kColumns * kv_heads / heads) + sequences);
    const int64_t partial = kSplitColumns * (round_up(dim, kTile) + 2) * static_cast<int64_t>(sizeof(float));
    const int64_t item = sizeof(AttentionItem), start = sizeof(int64_t), counter = sizeof(int32_t);
    return splits * partial + kGrowth * ((splits + tiles) * (item + start) + sequences * kv_heads * counter);
}

inline void AttentionPlan::add_tile(int64_t sequence, int64_t row, int64_t queries, int64_t visible, bool split) {
    const bool is_padding = step.contexts[sequence] == 0;
    const int64_t hi = is_padding ? 0 : visible + queries - 1;
    const int64_t seen = step.window ? std::max<int64_t>(0, visible - step.window) : 0;
    const int64_t lo = is_padding ? 0 : seen / kSegment * kSegment;
    const int64_t splits = split ? std::max<int64_t>(1, (hi - lo + kSegment - 1) / kSegment) : 1;
    multiplications += queries * step.heads * (hi - lo) * dim * 2;
    for (int64_t kv_head = 0; kv_head < step.cache.kv_heads; ++kv_head) {
        AttentionItem item{sequence, row, queries, visible, kv_head, lo, hi, 0, splits, num_partials_, num_counters_};
        if (splits == 1) {
            items.push_back(item);
            continue;
        }
        for (int64_t s = 0; s < splits; ++s) {
            item.split = s;
            item.lo = lo + s * kSegment;
            item.hi = std::min(item.lo + kSegment, hi);
            items.push_back(item);
        }
        num_partials_ += splits;
        ++num_counters_;
    }
}

// One item as the sums over its keys see it.
template <typename T>
struct Tile {
    const AttentionPlan& plan;
    const AttentionItem& item;
    const AttentionItem* ahead;  // what this thread does next, if known
    const T *qkv, *k_cache, *v_cache;
    Stream* stream;  // of few columns: what comes next

    int64_t columns() const { return item.queries * plan.group; }
    const T* query(int64_t column) const {
        const int64_t width = plan.step.heads + 2 * plan.step.cache.kv_heads;
        return qkv + ((item.row + column / plan.group) * width + item.kv_head * plan.group + column % plan.group) *
                         plan.dim;
    }
    const T* at(const T* base, int64_t key) const { return at(item, base, key); }
    const T* at(const AttentionItem& item, const T* base, int64_t key) const {
        const Cache& cache = plan.step.cache;
        const int32_t* blocks = plan.step.block_tables + item.sequence * plan.step.max_blocks;
        return base + blocks[key / cache.block_tokens] * cache.stride_block +
               (item.kv_head * cache.block_tokens + key % cache.block_tokens) * cache.head_dim;
    }
    // Keys [first, limit) are those that a column sees.
    int64_t limit(int64_t column) const { return item.visible + column / plan.group; }
    int64_t first(int64_t column) const {
        return plan.step.window ? std::max<int64_t>(0, limit(column) - plan.step.window) : 0;
    }
};

}  // namespace

#include "attention_tiles.h"

namespace {

// Sums over keys [lo, hi), at most kSegment of them, of Count columns at once.
template <int64_t Count, typename T>
void attend_columns(const Tile<T>& tile, int64_t from, int64_t lo, int64_t hi, const float* queries, float* scores,
                    const Partial& out) {
    const int64_t dim = tile.plan.dim, padded = tile.plan.padded, unit = tile.plan.step.cache.block_tokens;
    hi = std::min(hi, tile.limit(from + Count - 1));
    lo = std::max(lo, tile.first(from));
    const int64_t size = std::max<int64_t>(0, hi - lo);
    const auto each_run = [&](const T* base, auto&& visit) {  // of keys that lie together
        for (int64_t start = lo; start < hi;) {
            const int64_t end = std::min(start / unit * unit + unit, hi);
            visit(start, end, tile.at(base, start));
            start = end;
        }
    };
    each_run(tile.k_cache, [&](int64_t start, int64_t end, const T* key) {
        for (int64_t t = start; t < end; ++t, key += dim) {
            Lanes sum[Count] = {};
            int64_t i = 0;
            for (; i + kLanes <= dim; i += kLanes) {
                const Lanes k = load_lanes(key + i);
                for (int64_t c = 0; c < Count; ++c) sum[c] += load_lanes(queries + (from + c) * padded + i) * k;
            }
            for (int64_t c = 0; c < Count; ++c) {
                float total = sum_lanes(sum[c]);
                for (int64_t j = i; j < dim; ++j) total += queries[(from + c) * padded + j] * load(key, j);
                scores[c * kSegment + t - lo] = total;
            }
        }
    });
    for (int64_t c = 0; c < Count; ++c) {
        float* score = scores + c * kSegment;
        const int64_t begin = std::min(std::max(tile.first(from + c) - lo, int64_t{0}), size);
        const int64_t end = std::min(std::max(tile.limit(from + c) - lo, begin), size);
        float top = -FLT_MAX, total = 0.f;
#pragma omp simd reduction(max : top)
        for (int64_t t = begin; t < end; ++t) top = std::max(top, score[t]);
#pragma omp simd reduction(+ : total)
        for (int64_t t = begin; t < end; ++t) {
            score[t] = exponential(score[t] - top);
            total += score[t];
        }
        std::fill(score, score + begin, 0.f);
        std::fill(score + end, score + size, 0.f);
        out.top[from + c] = top;
        out.total[from + c] = total;
    }
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) {
        Lanes sum[Count] = {};
        each_run(tile.v_cache, [&](int64_t start, int64_t end, const T* value) {
            for (int64_t t = start - lo; t < end - lo; ++t, value += dim) {
                const Lanes v = load_lanes(value + i);
                for (int64_t c = 0; c < Count; ++c) sum[c] += scores[c * kSegment + t] * v;
            }
        });
        for (int64_t c = 0; c < Count; ++c) store_lanes(out.sums + (from + c) * padded + i, sum[c]);
    }
    for (; i < dim; ++i) {
        float sum[Count] = {};
        each_run(tile.v_cache, [&](int64_t start, int64_t end, const T* value) {
            for (int64_t t = start - lo; t < end - lo; ++t, value += dim)
                for (int64_t c = 0; c < Count; ++c) sum[c] += scores[c * kSegment + t] * load(value, i);
        });
        for (int64_t c = 0; c < Count; ++c) out.sums[(from + c) * padded + i] = sum[c];
    }
}

// The same for all columns of an item, in plain vectors.
template <typename T>
class Plain {
  public:
    Plain(const Tile<T>& tile, Carver& scratch) : tile_(tile) {
        const int64_t dim = tile.plan.dim, padded = tile.plan.padded;
        queries_ = scratch.take<float>(tile.plan.columns * padded);
        scores_ = scratch.take<float>(kWide * kSegment);
        const float scale = 1.f / std::sqrt(static_cast<float>(dim));
        for (int64_t c = 0; c < tile.columns(); ++c)
            for (int64_t i = 0; i < dim; ++i) queries_[c * padded + i] = load(tile.query(c), i) * scale;
    }
    void add(int64_t lo, int64_t hi, const Partial& out) {
        const int64_t columns = tile_.columns();
        for (int64_t c = 0; c < columns; c += kWide) switch (columns - c) {
                case 1: attend_columns<1>(tile_, c, lo, hi, queries_, scores_, out); break;
                case 2: attend_columns<2>(tile_, c, lo, hi, queries_, scores_, out); break;
                case 3: attend_columns<3>(tile_, c, lo, hi, queries_, scores_, out); break;
                default: attend_columns<kWide>(tile_, c, lo, hi, queries_, scores_, out);
            }
    }

  private:
    const Tile<T>& tile_;
    float *queries_, *scores_;
};

// `into` becomes the sums over the keys of both. One copy of it, so that whoever calls rounds alike.
[[gnu::noinline, gnu::noclone]] void merge(const AttentionPlan& plan, int64_t columns, const Partial& into, const Partial& from) {
    for (int64_t c = 0; c < columns; ++c) {
        const float top = std::max(into.top[c], from.top[c]);
        const float kept = exponential(into.top[c] - top), added = exponential(from.top[c] - top);
        into.top[c] = top;
        into.total[c] = into.total[c] * kept + from.total[c] * added;
        float* sums = into.sums + c * plan.padded;
        const float* more = from.sums + c * plan.padded;
        for (int64_t i = 0; i < plan.padded; i += kLanes)
            store_lanes(sums + i, load_lanes(sums + i) * kept + load_lanes(more + i) * added);
    }
}

template <typename T>
void finish(const Tile<T>& tile, const Partial& sums, T* out) {
    const AttentionPlan& plan = tile.plan;
    const float* sum = sums.sums;
    for (int64_t c = 0; c < tile.columns(); c += plan.group) {  // a row's heads lie together
        T* target = out + ((tile.item.row + c / plan.group) * plan.step.heads + tile.item.kv_head * plan.group) * plan.dim;
        for (int64_t head = 0; head < plan.group; ++head, target += plan.dim, sum += plan.padded) {
            const float inverse = 1.f / sums.total[c + head];
            int64_t i = 0;
            for (; i + kLanes <= plan.dim; i += kLanes) store_lanes(target + i, load_lanes(sum + i) * inverse);
            for (; i < plan.dim; ++i) store(target, i, sum[i] * inverse);
        }
    }
}

// One item; a row in splits is finished by the thread that ends the last of them.
template <typename Sums, typename T>
void attend(const Tile<T>& tile, T* out, void* memory) {
    const AttentionPlan& plan = tile.plan;
    const AttentionItem& item = tile.item;
    Carver scratch(memory);
    Partial all = plan.cut(scratch.take<float>(plan.partial_floats(plan.columns)), plan.columns);
    const Partial more = plan.cut(scratch.take<float>(plan.partial_floats(plan.columns)), plan.columns);
    if (item.lo == item.hi) {  // padding
        std::fill_n(all.sums, plan.columns * plan.padded, 0.f);
        std::fill_n(all.total, plan.columns, 1.f);
        return finish(tile, all, out);
    }
    if (item.splits > 1) all = plan.partial(item.partial + item.split);
    Sums sums(tile, scratch);
    for (int64_t lo = item.lo; lo < item.hi; lo += kSegment) {
        const Partial& here = lo == item.lo ? all : more;
        sums.add(lo, std::min(lo + kSegment, item.hi), here);
        if (lo > item.lo) merge(plan, tile.columns(), all, here);
    }
    if (item.splits > 1) {
        if (!plan.is_last(item)) return;
        all = plan.partial(item.partial);
        for (int64_t s = 1; s < item.splits; ++s) merge(plan, tile.columns(), all, plan.partial(item.partial + s));
    }
    finish(tile, all, out);
}

template <typename T>
void attend(const Tile<T>& tile, T* out, void* scratch) {
#if LORAPLEX_AMX
    if constexpr (std::is_same_v<T, bf16>)
        if (tile.plan.with_tiles) return attend<InTiles>(tile, out, scratch);
#endif
    attend<Plain<T>>(tile, out, scratch);
}

// Asks for what a task reads, if it is one of few columns.
template <typename T>
void push_task(const AttentionPlan& plan, int64_t task, const T* k_cache, const T* v_cache, Stream& stream) {
    if (task < 0 || task + 1 >= static_cast<int64_t>(plan.tasks.size())) return;
    const AttentionItem& item = plan.items[plan.tasks[task]];
    if (!plan.is_few(item)) return;
    const Cache& cache = plan.step.cache;
    const int64_t side = cache.block_tokens * cache.head_dim, heads = plan.tasks[task + 1] - plan.tasks[task];
    const int32_t* blocks = plan.step.block_tables + item.sequence * plan.step.max_blocks;
    for (int64_t key = item.lo; key < item.hi; key += cache.block_tokens)
        for (const T* base : {k_cache, v_cache})
            stream.push(base + blocks[key / cache.block_tokens] * cache.stride_block + item.kv_head * side,
                        heads * side);
}

// Does items until none is left. Every thread of a team calls it, with a counter that starts at 0 and
// `plan.scratch_bytes` of its own, 64 bytes aligned; with tiles configured where they are permitted.
template <typename T>
void attention_tasks(const AttentionPlan& plan, const T* qkv, const T* k_cache, const T* v_cache, T* out,
                     std::atomic<int64_t>& next, void* scratch) {
    const int64_t count = static_cast<int64_t>(plan.tasks.size()) - 1;
    const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
    Stream stream;
    int64_t i = take();
    push_task(plan, i, k_cache, v_cache, stream);
    while (i < count) {
        const AttentionItem* item = &plan.items[plan.tasks[i]];
        const AttentionItem* const end = item + plan.tasks[i + 1] - plan.tasks[i];
        const bool few = plan.is_few(*item);
        // Known early, the next task's keys can be fetched during this one; not at the end, where it might
        // keep another thread idle for long.
        const int64_t claimed = few || i + kClaimedUntil < count ? take() : -1;
        const AttentionItem* ahead = claimed >= 0 && claimed < count ? &plan.items[plan.tasks[claimed]] : nullptr;
        push_task(plan, claimed, k_cache, v_cache, stream);
        stream.over((end - item) * round_up(item->hi - item->lo, 32) / 8);
        for (; item < end; ++item)
            attend({plan, *item, ahead, qkv, k_cache, v_cache, few ? &stream : nullptr}, out, scratch);
        stream.rest();
        i = claimed >= 0 ? claimed : take();
    }
}

template <typename T>
void paged_attention(const AttentionStep& step, const T* qkv, const T* k_cache, const T* v_cache, T* out) {
    static thread_local AttentionPlan plan;
    plan.build(step);
    const AttentionPlan& planned = plan;  // the caller's, for all threads
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(num_threads) if (planned.multiplications > kWorthWaking)
    {
        static thread_local std::vector<char> memory;
        memory.resize(std::max<size_t>(memory.size(), planned.scratch_bytes + 64));
        const TileScope tiles;
        attention_tasks(planned, qkv, k_cache, v_cache, out, next, aligned(memory.data()));
    }
}

}  // namespace
