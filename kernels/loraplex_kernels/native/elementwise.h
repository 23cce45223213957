// RMSNorm, SiLU times up, rotary embedding with the cache write.

#pragma once

#include "lanes.h"

namespace {

// out = weight * r / sqrt(mean(r^2) + eps).
template <typename T>
inline void rms_norm(const float* r, const float* weight, T* out, int64_t size, float eps) {
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += r[i] * r[i];
    const float scale = 1.f / std::sqrt(sum / static_cast<float>(size) + eps);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) store(out, i, r[i] * scale * weight[i]);
}

template <typename T>
void add_rms_norm(float* residual, const T* delta, const float* weight, T* out, int64_t rows, int64_t size,
                  float eps) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (4 * rows * size > kWorthWaking)
    for (int64_t row = 0; row < rows; ++row) {
        float* r = residual + row * size;
        if (delta) {
            const T* d = delta + row * size;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) r[i] += load(d, i);
        }
        rms_norm(r, weight, out + row * size, size, eps);
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

// One row's q and k turned in place, its k and v written to their slot.
template <typename T>
inline void rotary_and_cache_row(T* qkv, const float* c, const float* s, T* k_cache, T* v_cache, int64_t slot,
                                 int64_t heads, const Cache& cache) {
    const int64_t dim = cache.head_dim, half = dim / 2;
    for (int64_t h = 0; h < heads + cache.kv_heads; ++h) {
        T* x = qkv + h * dim;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
            const float low = load(x, i), high = load(x, i + half);
            store(x, i, low * c[i] - high * s[i]);
            store(x, i + half, high * c[i] + low * s[i]);
        }
    }
    if (slot < 0) return;
    const T* k = qkv + heads * dim;
    const T* v = k + cache.kv_heads * dim;
    for (int64_t h = 0; h < cache.kv_heads; ++h) {
        std::memcpy(k_cache + cache.at(slot, h), k + h * dim, dim * sizeof(T));
        std::memcpy(v_cache + cache.at(slot, h), v + h * dim, dim * sizeof(T));
    }
}

template <typename T>
void rotary_and_cache(T* qkv, const float* cos, const float* sin, T* k_cache, T* v_cache,
                      const int64_t* slots, int64_t rows, int64_t heads, Cache cache) {
    const int64_t half = cache.head_dim / 2, width = (heads + 2 * cache.kv_heads) * cache.head_dim;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (4 * rows * width > kWorthWaking)
    for (int64_t row = 0; row < rows; ++row)
        rotary_and_cache_row(qkv + row * width, cos + row * half, sin + row * half, k_cache, v_cache, slots[row],
                             heads, cache);
}

}  // namespace
