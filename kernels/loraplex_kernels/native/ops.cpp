// The CPU forms of the ops in ops.py, over plain pointers. reference.py says what each must compute.
//
// Activations (T) and cached or stored weights are bfloat16 or float; every sum is a float's. Loops
// are written for the compiler's vectoriser; work is split so that a row's result never depends on
// which other rows share the batch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

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

template <typename T>
void add_rms_norm(float* residual, const T* delta, const float* weight, T* out, int64_t rows, int64_t size,
                  float eps) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows > 1)
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
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows > 1)
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
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows > 1)
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
        const T* k = qkv + row * width + heads * dim;
        const T* v = k + cache.kv_heads * dim;
        for (int64_t h = 0; h < cache.kv_heads; ++h) {
            std::memcpy(k_cache + cache.at(slots[row], h), k + h * dim, dim * sizeof(T));
            std::memcpy(v_cache + cache.at(slots[row], h), v + h * dim, dim * sizeof(T));
        }
    }
}

// One query row against one kv head: its group of heads, over the keys of a block table.
template <typename T>
void attend(const T* q, const T* k_cache, const T* v_cache, T* out, const int32_t* blocks, int64_t context,
            int64_t group, int64_t kv_head, const Cache& cache, std::vector<float>& scratch) {
    const int64_t dim = cache.head_dim;
    scratch.resize(group * (context + 2 * dim));
    float* queries = scratch.data();
    float* sums = queries + group * dim;
    float* scores = sums + group * dim;
    const float scale = 1.f / std::sqrt(static_cast<float>(dim));
    for (int64_t i = 0; i < group * dim; ++i) queries[i] = load(q, i) * scale, sums[i] = 0.f;
    for (int64_t start = 0; start < context; start += cache.block_tokens) {
        const int64_t count = std::min(cache.block_tokens, context - start);
        const int64_t base = blocks[start / cache.block_tokens] * cache.stride_block +
                             kv_head * cache.block_tokens * dim;
        for (int64_t t = 0; t < count; ++t) {
            const T* key = k_cache + base + t * dim;
            for (int64_t g = 0; g < group; ++g) {
                const float* query = queries + g * dim;
                float dot = 0.f;
#pragma omp simd reduction(+ : dot)
                for (int64_t i = 0; i < dim; ++i) dot += query[i] * load(key, i);
                scores[g * context + start + t] = dot;
            }
        }
    }
    for (int64_t g = 0; g < group; ++g) {
        float* score = scores + g * context;
        float top = score[0], total = 0.f;
#pragma omp simd reduction(max : top)
        for (int64_t t = 0; t < context; ++t) top = std::max(top, score[t]);
#pragma omp simd reduction(+ : total)
        for (int64_t t = 0; t < context; ++t) {
            score[t] = exponential(score[t] - top);
            total += score[t];
        }
        const float inverse = 1.f / total;
#pragma omp simd
        for (int64_t t = 0; t < context; ++t) score[t] *= inverse;
    }
    for (int64_t start = 0; start < context; start += cache.block_tokens) {
        const int64_t count = std::min(cache.block_tokens, context - start);
        const int64_t base = blocks[start / cache.block_tokens] * cache.stride_block +
                             kv_head * cache.block_tokens * dim;
        for (int64_t t = 0; t < count; ++t) {
            const T* value = v_cache + base + t * dim;
            for (int64_t g = 0; g < group; ++g) {
                const float weight = scores[g * context + start + t];
                float* sum = sums + g * dim;
#pragma omp simd
                for (int64_t i = 0; i < dim; ++i) sum[i] += weight * load(value, i);
            }
        }
    }
    for (int64_t i = 0; i < group * dim; ++i) store(out, i, sums[i]);
}

template <typename T>
void paged_attention(const T* qkv, const T* k_cache, const T* v_cache, T* out, const int32_t* block_tables,
                     int64_t max_blocks, const int32_t* contexts, int64_t rows, int64_t heads, Cache cache) {
    const int64_t group = heads / cache.kv_heads, dim = cache.head_dim;
    const int64_t width = (heads + 2 * cache.kv_heads) * dim;
#pragma omp parallel num_threads(num_threads)
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

// v[j][r] = sum_k x[j][k] A[r][k] for up to kRows rows at once.
template <typename W>
void shrink(const float* x, const W* a, float v[kRows][kRank], int64_t k_size) {
    for (int64_t r = 0; r < kRank; ++r) {
        const W* weight = a + r * k_size;
        const float *x0 = x, *x1 = x + k_size, *x2 = x + 2 * k_size, *x3 = x + 3 * k_size;
        float s0 = 0.f, s1 = 0.f, s2 = 0.f, s3 = 0.f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int64_t k = 0; k < k_size; ++k) {
            const float w = load(weight, k);
            s0 += x0[k] * w, s1 += x1[k] * w, s2 += x2[k] * w, s3 += x3[k] * w;
        }
        v[0][r] = s0, v[1][r] = s1, v[2][r] = s2, v[3][r] = s3;
    }
}

// sum[j][n] += v[j][r] B[r][n], four ranks a pass.
template <typename W>
void expand(const float v[kRows][kRank], const W* b, float* sum, int64_t rows, int64_t n_size) {
    for (int64_t r = 0; r < kRank; r += 4) {
        const W *b0 = b + r * n_size, *b1 = b0 + n_size, *b2 = b1 + n_size, *b3 = b2 + n_size;
        for (int64_t j = 0; j < rows; ++j) {
            const float v0 = v[j][r], v1 = v[j][r + 1], v2 = v[j][r + 2], v3 = v[j][r + 3];
            float* out = sum + j * n_size;
#pragma omp simd
            for (int64_t n = 0; n < n_size; ++n)
                out[n] += v0 * load(b0, n) + v1 * load(b1, n) + v2 * load(b2, n) + v3 * load(b3, n);
        }
    }
}

template <typename T, typename W>
void lora_rows(T* y, int64_t y_stride, const T* x, int64_t k_size, const uint8_t* arena, const Tables& tables,
               int64_t cell, int64_t rows, const Projection& p, std::vector<float>& scratch) {
    const int64_t count = tables.num_granules[cell];
    if (count == 0) return;
    scratch.assign(kRows * (k_size + p.width), 0.f);
    float* inputs = scratch.data();
    float* sum = inputs + kRows * k_size;
    for (int64_t j = 0; j < rows; ++j)
        for (int64_t k = 0; k < k_size; ++k) inputs[j * k_size + k] = load(x + j * k_size, k);
    for (int64_t g = 0; g < count; ++g) {
        const int64_t entry = cell * tables.granules + g;
        float v[kRows][kRank];
        shrink(inputs, reinterpret_cast<const W*>(arena + tables.offset[2 * entry]), v, k_size);
        for (int64_t j = 0; j < rows; ++j)
            for (int64_t r = 0; r < kRank; ++r) v[j][r] *= tables.scale[entry];
        expand(v, reinterpret_cast<const W*>(arena + tables.offset[2 * entry + 1]), sum, rows, p.width);
    }
    for (int64_t j = 0; j < rows; ++j) {
        T* out = y + j * y_stride + p.column;
#pragma omp simd
        for (int64_t n = 0; n < p.width; ++n) store(out, n, load(out, n) + sum[j * p.width + n]);
    }
}

struct Task {
    int32_t slot;
    int64_t lo, rows, projection;
};

template <typename T, typename W>
void lora(T* y, int64_t y_stride, const T* x, int64_t k_size, const uint8_t* arena, const Tables& tables,
          const int32_t* segments, int64_t num_segments, int64_t long_segment, int64_t layer,
          const Projection* projections, int64_t num_projections) {
    std::vector<Task> tasks;
    for (int64_t s = 0; s < num_segments; ++s) {
        if (segments[3 * s + 2] - segments[3 * s + 1] >= long_segment) continue;  // the caller's
        for (int64_t lo = segments[3 * s + 1]; lo < segments[3 * s + 2]; lo += kRows)
            for (int64_t p = 0; p < num_projections; ++p)
                tasks.push_back({segments[3 * s], lo, std::min<int64_t>(kRows, segments[3 * s + 2] - lo), p});
    }
    const int64_t num_tasks = static_cast<int64_t>(tasks.size());
#pragma omp parallel num_threads(num_threads) if (num_tasks > 1)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_tasks; ++i) {
            const Task& task = tasks[i];
            const Projection& p = projections[task.projection];
            const int64_t cell = (task.slot * tables.layers + layer) * tables.modules + p.module;
            lora_rows<T, W>(y + task.lo * y_stride, y_stride, x + task.lo * k_size, k_size, arena, tables, cell,
                            task.rows, p, scratch);
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
    }

LORAPLEX_ACTIVATION(bf16, bf16)
LORAPLEX_ACTIVATION(f32, float)
