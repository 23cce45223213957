// The CPU forms of the ops in ops.py, over plain pointers. reference.py says what each must compute.
//
// Activations (T) and cached or stored weights are bfloat16 or float; every sum is a float's. Loops
// are written for the compiler's vectoriser; work is split so that a row's result here never depends on
// which other rows share the batch.
//
// Compiled in two parts, with LORAPLEX_BF16 and with LORAPLEX_F32: by what type they are for.

#include "attention.h"
#include "elementwise.h"
#include "lanes.h"
#include "linear.h"
#include "lora.h"
#include "stack.h"

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
        int64_t max_blocks, const int32_t* contexts, const int32_t* query_starts, int64_t num_sequences,     \
        int64_t heads, int64_t window, int64_t stride_block, int64_t kv_heads, int64_t block_tokens,         \
        int64_t head_dim) {                                                                                  \
        paged_attention<T>({block_tables, contexts, query_starts, max_blocks, num_sequences, heads,          \
                            {stride_block, kv_heads, block_tokens, head_dim}, window},                       \
                           qkv, k_cache, v_cache, out);                                                      \
    }                                                                                                        \
    extern "C" void loraplex_lora_##SUFFIX(                                                                  \
        T* y, int64_t y_stride, const T* x, int64_t k_size, const uint8_t* arena, const int64_t* offset,     \
        const float* scale, const int32_t* num_granules, int64_t layers, int64_t modules, int64_t granules,  \
        const int32_t* segments, int64_t num_segments, int64_t layer, const int64_t* projections,            \
        int64_t num_projections) {                                                                           \
        lora<T>(y, y_stride, x, k_size,                                                                      \
                {arena, {offset, scale, num_granules, layers, modules, granules}, segments, num_segments}, layer,\
                reinterpret_cast<const Projection*>(projections), num_projections);                          \
    }                                                                                                        \
    extern "C" void loraplex_scale_output_##SUFFIX(                                                          \
        T* y, int64_t y_stride, const uint8_t* arena, const int64_t* offset, int64_t layers,                 \
        int64_t modules, const int32_t* segments, int64_t num_segments, int64_t layer,                       \
        const int64_t* projections, int64_t num_projections) {                                               \
        scale_output<T>(y, y_stride, arena, offset, layers, modules, segments, num_segments, layer,          \
                        reinterpret_cast<const Projection*>(projections), num_projections);                  \
    }

#ifdef LORAPLEX_F32
LORAPLEX_ACTIVATION(f32, float)
#endif

#ifdef LORAPLEX_BF16
LORAPLEX_ACTIVATION(bf16, bf16)

extern "C" void loraplex_set_num_threads(int count) { num_threads = count; }

// Whether `loraplex_nf4_linear` may be called.
extern "C" int loraplex_has_amx() { return LORAPLEX_AMX && amx_is_permitted(); }

#if LORAPLEX_AMX
extern "C" void loraplex_nf4_linear(const bf16* x, const uint8_t* codes, const float* absmax, const float* levels,
                                    bf16* out, int64_t rows, int64_t outputs, int64_t k) {
    linear({codes, absmax, levels, nullptr, outputs, k}, x, rows, out);
}

extern "C" void* loraplex_stack_new(const Model* model) { return new Stack(*model); }
extern "C" void loraplex_stack_delete(void* stack) { delete static_cast<Stack*>(stack); }
extern "C" int64_t loraplex_stack_bytes(const void* stack, int64_t rows, int64_t logits, int64_t sequences,
                                        int64_t context, int64_t granules) {
    return static_cast<const Stack*>(stack)->num_bytes({rows, logits, sequences, context, granules});
}
extern "C" void loraplex_stack_run(void* stack, const Step* step) { static_cast<Stack*>(stack)->run(*step); }
#endif
#endif
