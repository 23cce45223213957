// The CPU forms of the ops in ops.py, over plain pointers. reference.py says what each must compute.
//
// Activations (T) and cached or stored weights are bfloat16 or float; every sum is a float's. Loops
// are written for the compiler's vectoriser; work is split so that a row's result here never depends on
// which other rows share the batch. (Long LoRA segments are the caller's, as matrix products.)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Multiplications from which a second thread pays for being woken: 70 us (measured) under OpenMP's
// passive waiting, which leaves the cores to others.
constexpr int64_t kWorthWaking = 1'000'000;

int num_threads = 1;  // OpenMP's own setting is a thread's, and steps run on a thread of their own

struct bf16 {
    uint16_t bits;
};

inline float load(const float* p, int64_t i) { return p[i]; }

inline float load(const bf16* p, int64_t i) {
    uint32_t word = static_cast<uint32_t>(p[i].bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

inline void store(float* p, int64_t i, float value) { p[i] = value; }

inline void store(bf16* p, int64_t i, float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;  // to nearest, ties to even
    bool nan = (word & 0x7fffffffu) > 0x7f800000u;
    p[i].bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

// e^x to a few units in the last place, in operations that vectorise: e^x = 2^n e^r with |r| <= ln 2 / 2
// and a Taylor polynomial for e^r. Below -87 it gives about 1e-38 instead of a denormal.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.f), 88.f);
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float p = 1.f / 5040.f;
    p = p * r + 1.f / 720.f;
    p = p * r + 1.f / 120.f;
    p = p * r + 1.f / 24.f;
    p = p * r + 1.f / 6.f;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

// kLanes floats at once, whatever the processor's own vectors hold. Every row keeps the same order of
// additions in each lane and across lanes, however many rows share a pass.
constexpr int64_t kLanes = 16;
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
using Bits16 = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));
using Bits32 = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));

inline Lanes load_lanes(const float* p) {
    Lanes value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

inline Lanes load_lanes(const bf16* p) {
    Bits16 half;
    std::memcpy(&half, p, sizeof half);
    const Bits32 word = __builtin_convertvector(half, Bits32) << 16;
    Lanes value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

inline void store_lanes(float* p, Lanes value) { std::memcpy(p, &value, sizeof value); }

inline void store_lanes(bf16* p, Lanes value) {
    Bits32 word;
    std::memcpy(&word, &value, sizeof word);
    const Bits32 rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    const auto nan = (word & 0x7fffffffu) > 0x7f800000u;
    const Bits16 half = __builtin_convertvector(nan ? Bits32{} + 0x7fc0u : rounded, Bits16);
    std::memcpy(p, &half, sizeof half);
}

// Halves onto each other until four are left.
inline float sum_lanes(Lanes value) {
    using Half = float __attribute__((vector_size(sizeof(Lanes) / 2)));
    using Quarter = float __attribute__((vector_size(sizeof(Lanes) / 4)));
    Half half[2];
    std::memcpy(half, &value, sizeof value);
    half[0] += half[1];
    Quarter quarter[2];
    std::memcpy(quarter, half, sizeof half[0]);
    quarter[0] += quarter[1];
    return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

template <typename T>
void add_rms_norm(float* residual, const T* delta, const float* weight, T* out, int64_t rows, int64_t size,
                  float eps) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (4 * rows * size > kWorthWaking)
    for (int64_t row = 0; row < rows; ++row) {
        float* r = residual + row * size;
        float sum = 0.f;
        if (delta) {
            const T* d = delta + row * size;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) r[i] += load(d, i);
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; ++i) sum += r[i] * r[i];
        const float scale = 1.f / std::sqrt(sum / static_cast<float>(size) + eps);
        T* o = out + row * size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) store(o, i, r[i] * scale * weight[i]);
    }
}

template <typename T>
void silu_mul(const T* gate_up, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (16 * rows * size > kWorthWaking)
    for (int64_t row = 0; row < rows; ++row) {
        const T* gate = gate_up + row * 2 * size;
        const T* up = gate + size;
        T* o = out + row * size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            const float g = std::max(load(gate, i), -87.f);  // e^-g stays finite; silu is under 1e-35
            store(o, i, g / (1.f + exponential(-g)) * load(up, i));
        }
    }
}

struct Cache {
    int64_t stride_block, kv_heads, block_tokens, head_dim;  // elements
    int64_t at(int64_t slot, int64_t head) const {
        return slot / block_tokens * stride_block + (head * block_tokens + slot % block_tokens) * head_dim;
    }
};

template <typename T>
void rotary_and_cache(T* qkv, const float* cos, const float* sin, T* k_cache, T* v_cache,
                      const int64_t* slots, int64_t rows, int64_t heads, Cache cache) {
    const int64_t dim = cache.head_dim, half = dim / 2, width = (heads + 2 * cache.kv_heads) * dim;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (4 * rows * width > kWorthWaking)
    for (int64_t row = 0; row < rows; ++row) {
        const float* c = cos + row * half;
        const float* s = sin + row * half;
        for (int64_t h = 0; h < heads + cache.kv_heads; ++h) {
            T* x = qkv + row * width + h * dim;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const float low = load(x, i), high = load(x, i + half);
                store(x, i, low * c[i] - high * s[i]);
                store(x, i + half, high * c[i] + low * s[i]);
            }
        }
        if (slots[row] < 0) continue;
        const T* k = qkv + row * width + heads * dim;
        const T* v = k + cache.kv_heads * dim;
        for (int64_t h = 0; h < cache.kv_heads; ++h) {
            std::memcpy(k_cache + cache.at(slots[row], h), k + h * dim, dim * sizeof(T));
            std::memcpy(v_cache + cache.at(slots[row], h), v + h * dim, dim * sizeof(T));
        }
    }
}

template <typename T>
inline float dot(const float* query, const T* key, int64_t dim) {
    Lanes sum = {};
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) sum += load_lanes(query + i) * load_lanes(key + i);
    float total = sum_lanes(sum);
    for (; i < dim; ++i) total += query[i] * load(key, i);
    return total;
}

// In place; the sum is over all of `score`.
inline void softmax(float* score, int64_t size) {
    float top = score[0], total = 0.f;
#pragma omp simd reduction(max : top)
    for (int64_t t = 0; t < size; ++t) top = std::max(top, score[t]);
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < size; ++t) {
        score[t] = exponential(score[t] - top);
        total += score[t];
    }
    const float inverse = 1.f / total;
#pragma omp simd
    for (int64_t t = 0; t < size; ++t) score[t] *= inverse;
}

// One query row against one kv head: its group of heads, over the keys of a block table.
template <typename T>
void attend(const T* q, const T* k_cache, const T* v_cache, T* out, const int32_t* blocks, int64_t context,
            int64_t group, int64_t kv_head, const Cache& cache, std::vector<float>& scratch) {
    const int64_t dim = cache.head_dim;
    scratch.resize(group * (context + dim));
    float* queries = scratch.data();
    float* scores = queries + group * dim;  // [group][context]
    if (context == 0) {
        std::fill_n(out, group * dim, T{});
        return;
    }
    const float scale = 1.f / std::sqrt(static_cast<float>(dim));
    for (int64_t i = 0; i < group * dim; ++i) queries[i] = load(q, i) * scale;
    const auto row = [&](const T* base, int64_t t) {
        return base + blocks[t / cache.block_tokens] * cache.stride_block +
               (kv_head * cache.block_tokens + t % cache.block_tokens) * dim;
    };
    for (int64_t start = 0; start < context; start += cache.block_tokens) {
        const int64_t end = std::min(start + cache.block_tokens, context);
        const T* key = row(k_cache, start);
        for (int64_t t = start; t < end; ++t, key += dim)
            for (int64_t g = 0; g < group; ++g) scores[g * context + t] = dot(queries + g * dim, key, dim);
    }
    for (int64_t g = 0; g < group; ++g) softmax(scores + g * context, context);
    for (int64_t g = 0; g < group; ++g) {
        const float* score = scores + g * context;
        int64_t i = 0;
        for (; i + kLanes <= dim; i += kLanes) {
            Lanes sum = {};
            for (int64_t start = 0; start < context; start += cache.block_tokens) {
                const int64_t end = std::min(start + cache.block_tokens, context);
                const T* value = row(v_cache, start) + i;
                for (int64_t t = start; t < end; ++t, value += dim) sum += score[t] * load_lanes(value);
            }
            store_lanes(out + g * dim + i, sum);
        }
        for (; i < dim; ++i) {
            float sum = 0.f;
            for (int64_t t = 0; t < context; ++t) sum += score[t] * load(row(v_cache, t), i);
            store(out, g * dim + i, sum);
        }
    }
}

template <typename T>
void paged_attention(const T* qkv, const T* k_cache, const T* v_cache, T* out, const int32_t* block_tables,
                     int64_t max_blocks, const int32_t* contexts, int64_t rows, int64_t heads, Cache cache) {
    const int64_t group = heads / cache.kv_heads, dim = cache.head_dim;
    const int64_t width = (heads + 2 * cache.kv_heads) * dim;
    int64_t keys = 0;
    for (int64_t row = 0; row < rows; ++row) keys += contexts[row];
#pragma omp parallel num_threads(num_threads) if (keys * heads * dim > kWorthWaking)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic, 2) collapse(2)
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t h = 0; h < cache.kv_heads; ++h)
                attend(qkv + row * width + h * group * dim, k_cache, v_cache, out + (row * heads + h * group) * dim,
                       block_tables + row * max_blocks, contexts[row], group, h, cache, scratch);
    }
}

constexpr int64_t kRank = 16;  // GRANULE_RANK
constexpr int64_t kRows = 4;   // rows that share one pass over a granule

struct Tables {
    const int64_t* offset;
    const float* scale;
    const int32_t* num_granules;
    int64_t layers, modules, granules;
};

struct Projection {
    int64_t module, column, width;
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

// y[j][n] += sum over granules g and ranks r of v[g][j][r] B_g[r][n], rounded once.
template <int64_t Rows, typename T, typename W>
void expand(T* y, int64_t y_stride, const float (*v)[kRows][kRank], const W* const* b, int64_t granules,
            int64_t n_size) {
    int64_t n = 0;
    for (; n + kLanes <= n_size; n += kLanes) {
        Lanes sum[Rows];
        for (int64_t j = 0; j < Rows; ++j) sum[j] = load_lanes(y + j * y_stride + n);
        for (int64_t g = 0; g < granules; ++g)
            for (int64_t r = 0; r < kRank; ++r) {
                const Lanes weight = load_lanes(b[g] + r * n_size + n);
                for (int64_t j = 0; j < Rows; ++j) sum[j] += v[g][j][r] * weight;
            }
        for (int64_t j = 0; j < Rows; ++j) store_lanes(y + j * y_stride + n, sum[j]);
    }
    for (; n < n_size; ++n)
        for (int64_t j = 0; j < Rows; ++j) {
            float sum = load(y + j * y_stride, n);
            for (int64_t g = 0; g < granules; ++g)
                for (int64_t r = 0; r < kRank; ++r) sum += v[g][j][r] * load(b[g], r * n_size + n);
            store(y + j * y_stride, n, sum);
        }
}

template <typename W>
struct Scratch {
    std::vector<float> inputs;
    std::vector<float> shrunk;  // [granules][kRows][kRank]
    std::vector<const W*> b;
};

template <int64_t Rows, typename T, typename W>
void lora_rows(T* y, int64_t y_stride, const T* x, int64_t k_size, const uint8_t* arena, const Tables& tables,
               int64_t cell, int64_t width, Scratch<W>& scratch) {
    const int64_t count = tables.num_granules[cell];
    scratch.inputs.resize(Rows * k_size);
    scratch.shrunk.resize(count * kRows * kRank);
    scratch.b.resize(count);
    float* inputs = scratch.inputs.data();
    for (int64_t i = 0; i < Rows * k_size; ++i) inputs[i] = load(x, i);
    auto* v = reinterpret_cast<float(*)[kRows][kRank]>(scratch.shrunk.data());
    for (int64_t g = 0; g < count; ++g) {
        const int64_t entry = cell * tables.granules + g;
        const W* a = reinterpret_cast<const W*>(arena + tables.offset[2 * entry]);
        scratch.b[g] = reinterpret_cast<const W*>(arena + tables.offset[2 * entry + 1]);
        shrink<Rows>(inputs, a, tables.scale[entry], v[g], k_size);
    }
    expand<Rows>(y, y_stride, v, scratch.b.data(), count, width);
}

struct Task {
    int32_t slot;
    int64_t lo, rows, projection;
};

// Up to kRows rows of one segment through one projection.
template <typename T, typename W>
void lora_task(T* y, int64_t y_stride, const T* x, int64_t k_size, const uint8_t* arena, const Tables& tables,
               int64_t layer, const Task& task, const Projection& p, Scratch<W>& scratch) {
    const int64_t cell = (task.slot * tables.layers + layer) * tables.modules + p.module;
    if (tables.num_granules[cell] == 0) return;
    y += task.lo * y_stride + p.column;
    x += task.lo * k_size;
    switch (task.rows) {
        case 1: return lora_rows<1>(y, y_stride, x, k_size, arena, tables, cell, p.width, scratch);
        case 2: return lora_rows<2>(y, y_stride, x, k_size, arena, tables, cell, p.width, scratch);
        case 3: return lora_rows<3>(y, y_stride, x, k_size, arena, tables, cell, p.width, scratch);
        default: return lora_rows<kRows>(y, y_stride, x, k_size, arena, tables, cell, p.width, scratch);
    }
}

template <typename T, typename W>
void lora(T* y, int64_t y_stride, const T* x, int64_t k_size, const uint8_t* arena, const Tables& tables,
          const int32_t* segments, int64_t num_segments, int64_t long_segment, int64_t layer,
          const Projection* projections, int64_t num_projections) {
    std::vector<Task> tasks;
    int64_t elements = 0;
    for (int64_t s = 0; s < num_segments; ++s) {
        if (segments[3 * s + 2] - segments[3 * s + 1] >= long_segment) continue;  // the caller's
        for (int64_t lo = segments[3 * s + 1]; lo < segments[3 * s + 2]; lo += kRows)
            for (int64_t p = 0; p < num_projections; ++p) {
                tasks.push_back({segments[3 * s], lo, std::min<int64_t>(kRows, segments[3 * s + 2] - lo), p});
                elements += kRank * (k_size + projections[p].width);
            }
    }
    const int64_t num_tasks = static_cast<int64_t>(tasks.size());
#pragma omp parallel num_threads(num_threads) if (elements > kWorthWaking)
    {
        Scratch<W> scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_tasks; ++i)
            lora_task(y, y_stride, x, k_size, arena, tables, layer, tasks[i], projections[tasks[i].projection],
                      scratch);
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

extern "C" void loraplex_set_num_threads(int count) { num_threads = count; }

#define LORAPLEX_ACTIVATION(SUFFIX, T)                                                                       \
    extern "C" void loraplex_add_rms_norm_##SUFFIX(float* residual, const T* delta, const float* weight,     \
                                                   T* out, int64_t rows, int64_t size, float eps) {          \
        add_rms_norm<T>(residual, delta, weight, out, rows, size, eps);                                      \
    }                                                                                                        \
    extern "C" void loraplex_silu_mul_##SUFFIX(const T* gate_up, T* out, int64_t rows, int64_t size) {       \
        silu_mul<T>(gate_up, out, rows, size);                                                               \
    }                                                                                                        \
    extern "C" void loraplex_rotary_and_cache_##SUFFIX(                                                      \
        T* qkv, const float* cos, const float* sin, T* k_cache, T* v_cache, const int64_t* slots,            \
        int64_t rows, int64_t heads, int64_t stride_block, int64_t kv_heads, int64_t block_tokens,           \
        int64_t head_dim) {                                                                                  \
        rotary_and_cache<T>(qkv, cos, sin, k_cache, v_cache, slots, rows, heads,                             \
                            {stride_block, kv_heads, block_tokens, head_dim});                               \
    }                                                                                                        \
    extern "C" void loraplex_attention_##SUFFIX(                                                             \
        const T* qkv, const T* k_cache, const T* v_cache, T* out, const int32_t* block_tables,               \
        int64_t max_blocks, const int32_t* contexts, int64_t rows, int64_t heads, int64_t stride_block,      \
        int64_t kv_heads, int64_t block_tokens, int64_t head_dim) {                                          \
        paged_attention<T>(qkv, k_cache, v_cache, out, block_tables, max_blocks, contexts, rows, heads,      \
                           {stride_block, kv_heads, block_tokens, head_dim});                                \
    }                                                                                                        \
    extern "C" void loraplex_lora_##SUFFIX(                                                                  \
        T* y, int64_t y_stride, const T* x, int64_t k_size, const uint8_t* arena, const int64_t* offset,     \
        const float* scale, const int32_t* num_granules, int64_t layers, int64_t modules, int64_t granules,  \
        const int32_t* segments, int64_t num_segments, int64_t long_segment, int64_t layer,                  \
        const int64_t* projections, int64_t num_projections) {                                               \
        lora<T, T>(y, y_stride, x, k_size, arena, {offset, scale, num_granules, layers, modules, granules},  \
                   segments, num_segments, long_segment, layer,                                              \
                   reinterpret_cast<const Projection*>(projections), num_projections);                       \
    }                                                                                                        \
    extern "C" void loraplex_scale_output_##SUFFIX(                                                          \
        T* y, int64_t y_stride, const uint8_t* arena, const int64_t* offset, int64_t layers,                 \
        int64_t modules, const int32_t* segments, int64_t num_segments, int64_t layer,                       \
        const int64_t* projections, int64_t num_projections) {                                               \
        scale_output<T>(y, y_stride, arena, offset, layers, modules, segments, num_segments, layer,          \
                        reinterpret_cast<const Projection*>(projections), num_projections);                  \
    }

LORAPLEX_ACTIVATION(bf16, bf16)
LORAPLEX_ACTIVATION(f32, float)
