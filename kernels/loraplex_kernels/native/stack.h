// All layers of a step in one parallel region: the loop of Decoder.forward, phase by phase.
//
// Threads meet between phases and share each phase's tasks. What the loop rounds to bf16 between two of
// its ops stays fp32 where one phase does both: a linear with its low-rank update, output scale and bias;
// what is added to the residual; gate and up before SiLU.

#pragma once

#include <chrono>
#include <memory>
#include <type_traits>

#include "attention.h"
#include "elementwise.h"
#include "greedy.h"
#include "linear.h"
#include "lora.h"
#include "lora_chunks.h"
#include "lora_update.h"
#include "scratch.h"
#include "team.h"

#if LORAPLEX_AMX

namespace {

// These structs are filled in stack.py: fields of eight bytes, in this order.

struct StackedLinear {
    Weight weight;
    const bf16* bias;  // may be null
    const Projection* projections;
    int64_t num_projections;
};

struct Layer {
    const float* input_norm;
    StackedLinear qkv, o;
    const float* post_attention_norm;
    StackedLinear gate_up, down;
};

struct Model {
    const Layer* layers;
    int64_t num_layers, hidden, intermediate, heads, kv_heads, head_dim;
    double eps;
    const float* norm;
    Weight head;
};

enum Phase { kNorm, kShrink, kQkv, kAttention, kPack, kO, kGateUp, kDown, kHead, kNumPhases };

struct Step {
    int64_t rows, num_logits;
    float* residual;  // [rows, hidden], changed in place
    const float *cos, *sin;
    const int64_t* slots;
    const int64_t* logits_rows;
    bf16 *normed, *qkv, *attended, *last_normed;  // as in decoder.Activations
    float* logits;
    int64_t* tokens;  // instead of logits, where not null
    bf16* kv_cache;
    int64_t stride_block, block_tokens;
    const int32_t *block_tables, *contexts, *query_starts;
    int64_t max_blocks, num_sequences;
    const uint8_t* arena;
    const int64_t* offset;
    const float* scale;
    const int32_t* num_granules;
    int64_t table_layers, modules, granules;
    const int32_t* segments;
    int64_t num_segments;         // 0: no adapters
    const int64_t* output_scale;  // null: no row's output is scaled
    int64_t* nanoseconds;         // [kNumPhases], added to; may be null
};

struct StepLimits {
    int64_t rows, logits, sequences, context, granules;  // context: tokens of one sequence
};

// Memory that grows to what the largest step so far needed.
template <typename T>
class Buffer {
  public:
    T* at_least(int64_t count) {
        if (count > size_) {
            memory_.reset();
            memory_.reset(new char[count * sizeof(T) + 64]);
            size_ = count;
        }
        return aligned(reinterpret_cast<T*>(memory_.get()));
    }

  private:
    std::unique_ptr<char[]> memory_;
    int64_t size_ = 0;
};

class Stack {
  public:
    explicit Stack(const Model& model) : model_(model), byte_head_(model.head) {}

    void run(const Step& step);
    // What its memory comes to, at most, with steps within these limits.
    int64_t num_bytes(const StepLimits& most) const;

  private:
    static constexpr int64_t kMaxProjections = 3;
    static constexpr int64_t kMaxPhases = 16;  // of a layer

    int64_t widest() const { return std::max({model_.hidden, model_.intermediate, model_.heads * model_.head_dim}); }
    int64_t update_size() const {  // of a row
        const int64_t qkv = (model_.heads + 2 * model_.kv_heads) * model_.head_dim;
        return update_stride(std::max({qkv, model_.hidden, 2 * model_.intermediate}));
    }
    void plan_updates(const LoraStep& lora, const Step& step);
    int64_t num_phases() const { return kMaxPhases * model_.num_layers + 5; }

    Cache cache_of(const Step& step) const {
        return {step.stride_block, model_.kv_heads, step.block_tokens, model_.head_dim};
    }

    class Worker;

    const Model model_;
    const ByteHead byte_head_;
    GreedyRows greedy_;
    std::unique_ptr<PhaseState[]> phases_;
    Buffer<bf16> packed_memory_, gated_memory_, panel_memory_;
    Buffer<char> scratch_memory_, v_memory_, greedy_memory_;
    Buffer<float> update_memory_;
    bf16* packed_ = nullptr;   // rows that a linear reads
    bf16* gated_ = nullptr;    // those of down, packed too
    void* v_ = nullptr;        // what they were shrunk to
    float* update_ = nullptr;  // what that was expanded to, of the few rows an adapter
    AttentionPlan attention_;
    LoraPlan few_, rest_;  // of rows whose updates come ahead of the products, and beside them
};

// One thread's way through a step.
class Stack::Worker {
  public:
    Worker(Stack& stack, const Step& step, PhaseState* phases, int thread, bf16* panel, void* scratch)
        : stack_(stack), model_(stack.model_), step_(step), phase_(phases), thread_(thread), panel_(panel), scratch_(scratch),
          times_(thread == 0 ? step.nanoseconds : nullptr), rows_(step.rows), width_(model_.heads * model_.head_dim) {
        if (times_) last_ = now();
    }

    void run() {
        for (int64_t index = 0; index < model_.num_layers; ++index) layer(model_.layers[index], index);
        head();
    }

  private:
    using Next = std::atomic<int64_t>;

    void layer(const Layer& l, int64_t index) {
        const Step& s = step_;
        const int64_t hidden = model_.hidden, inter = model_.intermediate, half = model_.head_dim / 2;
        const Cache cache = stack_.cache_of(s);
        const int64_t side = cache.kv_heads * cache.block_tokens * cache.head_dim;
        bf16* const k_cache = s.kv_cache + 2 * index * side;

        const Panels qkv{l.qkv.weight.outputs, width_ + model_.kv_heads * model_.head_dim, half};
        const Panels gate_up{2 * inter, 2 * inter, inter};
        norm(l.input_norm, s.residual, nullptr, rows_, s.normed);
        const Turned turned{s.qkv, k_cache, k_cache + side, s.cos, s.sin, s.slots, model_.heads, cache};
        linear(kQkv, l.qkv, index, qkv, [&](const Result& result) { turned.store(result); });
        share(kAttention, [&](Next& next) {
            attention_tasks<bf16>(stack_.attention_, s.qkv, k_cache, k_cache + side, s.attended, next, scratch_);
        });
        pack(s.attended, rows_, width_);
        linear(kO, l.o, index, {hidden}, [&](const Result& result) { add_rows(result, s.residual, hidden); });

        norm(l.post_attention_norm, s.residual, nullptr, rows_, s.normed);
        linear(kGateUp, l.gate_up, index, gate_up,
               [&](const Sums& sums) { gate_and_pack(sums, stack_.gated_, inter); });
        right_ = stack_.gated_;
        linear(kDown, l.down, index, {hidden}, [&](const Result& result) { add_rows(result, s.residual, hidden); });
        right_ = stack_.packed_;
    }

    void head() {
        const Step& s = step_;
        if (s.num_logits == 0) return;
        norm(model_.norm, s.residual, s.logits_rows, s.num_logits, s.last_normed);
        if (s.tokens && stack_.byte_head_.is_usable() && choose()) return;
        const int64_t vocab = model_.head.outputs;
        share(kHead, [&](Next& next) {
            multiply({model_.head, stack_.packed_, s.num_logits}, {vocab}, panel_, next, kNothing,
                     [&](const Result& result) { write_rows(result, s.logits, vocab); });
        });
        if (!s.tokens) return;
        tasks(kHead, s.num_logits, [&](int64_t row) { s.tokens[row] = argmax(s.logits + row * vocab, vocab); });
    }

    // The tokens alone; false if a row needs all of its logits.
    bool choose() {
        const Step& s = step_;
        GreedyRows& rows = stack_.greedy_;
        tasks(kHead, ceil_div(s.num_logits, kTile), [&](int64_t group) { rows.add(s.last_normed, group); });
        share(kHead, [&](Next& next) { rows.screen(thread_, next); });
        if (rows.any_left()) return false;
        tasks(kHead, s.num_logits,
              [&](int64_t row) { s.tokens[row] = rows.choose(model_.head, stack_.packed_, row, panel_); });
        return true;
    }

    // Rows of the residual, all or chosen ones: normed into `out`, and packed.
    void norm(const float* weight, const float* residual, const int64_t* chosen, int64_t rows, bf16* out) {
        const int64_t size = model_.hidden;
        const Order order = chosen ? Order::kNatural : Order::kCodes;
        tasks(kNorm, ceil_div(rows, kTile), [&](int64_t group) {
            for (int64_t row = group * kTile; row < std::min(rows, (group + 1) * kTile); ++row)
                rms_norm(residual + (chosen ? chosen[row] : row) * size, weight, out + row * size, size,
                         static_cast<float>(model_.eps));
            pack_group(out, rows, size, group, stack_.packed_, order);
        });
    }

    void pack(const bf16* x, int64_t rows, int64_t k) {
        constexpr int64_t kShare = 4;  // blocks a task
        const int64_t shares = ceil_div(k / kBlock, kShare);
        tasks(kPack, ceil_div(rows, kTile) * shares, [&](int64_t task) {
            const int64_t lo = task / shares * kTile, first = task % shares * kShare * kBlock;
            const int64_t count = std::min(kTile, rows - lo), last = std::min(k, first + kShare * kBlock);
            for (int64_t at = first; at < last; at += kBlock)
                pack_block(x + lo * k + at, k, count, kBlock, stack_.packed_ + lo * k + at * kTile, Order::kCodes);
        });
    }

    // `finish` gets the whole result, as Result or as Sums: base, update, output scale and bias.
    template <typename Finish>
    void linear(Phase phase, const StackedLinear& l, int64_t layer, const Panels& panels, Finish&& finish) {
        const Projection* const p = l.projections;
        const int64_t count = l.num_projections;
        const LoraPlan &few = stack_.few_, &rest = stack_.rest_;
        float* const update = stack_.update_;
        const int64_t stride = update_stride(l.weight.outputs);
        const PhaseState* updates = nullptr;  // of the few: waited for where they are added
        if (!few.is_empty())
            updates = start(kShrink, [&](Next& next) {
                lora_update(few, layer, p, count, right_, l.weight.k, stack_.v_, update, stride, next);
            });
        if (!rest.is_empty())
            share(kShrink, [&](Next& next) {
                lora_shrink<bf16>(rest, layer, p, count, nullptr, right_, l.weight.k, stack_.v_, next);
            });
        constexpr bool of_rows = std::is_invocable_v<Finish, const Result&>;
        ChunkUpdate chunks(rest, layer, p, count, stack_.v_);
        const bool is_plain = !step_.output_scale && !l.bias;
        const bool by_chunks = is_plain && !rest.is_empty();
        const auto begin = [&](const Panel& panel, int64_t lo, int64_t hi, bool is_first) {
            if (!few.is_empty()) ask_for_update(few, update, stride, panel, lo, hi);
            if (by_chunks) chunks.multiply(panel, lo, hi, is_first);
        };
        const auto update_rows = [&](const Result& result) {
            for (const Run& run : result.panel.runs()) {
                if (run.lo == run.hi) continue;
                float* const y = result.y + run.place;
                if (!few.is_empty())
                    add_update(few, update, stride, y, kPanel, result.lo, result.hi, run.lo, run.hi);
                if (!rest.is_empty())
                    lora_expand<bf16>(rest, layer, p, count, stack_.v_, y, kPanel, result.lo, result.hi, run.lo,
                                      run.hi);
                for (const LoraPlan* plan : {&few, &rest})
                    if (step_.output_scale)
                        scale_output_panel(*plan, step_.output_scale, layer, p, count, y, kPanel, result.lo,
                                           result.hi, run.lo, run.hi);
                if (l.bias) add_bias(l.bias, y, result.hi - result.lo, run);
            }
        };
        const auto end = [&](const Sums& sums) {
            const bool has_few = !few.is_empty() && sums.lo < few.owned.back().hi;
            if (has_few) updates->wait();
            const bool is_updated = is_plain && !(of_rows && has_few) && (!by_chunks || chunks.add(sums));
            if (is_updated && has_few) add_update(few, update, stride, sums);
            if (of_rows || !is_updated) {
                alignas(64) float y[kChunk * kPanel];
                to_rows(sums, y);
                const Result result{sums.panel, sums.lo, sums.hi, y};
                if (!is_updated) update_rows(result);
                if constexpr (of_rows)
                    finish(result);
                else
                    from_rows(y, sums);
            }
            if constexpr (!of_rows) finish(sums);
        };
        share(phase, [&](Next& next) { multiply({l.weight, right_, rows_}, panels, panel_, next, begin, end); });
    }

    static void add_bias(const bf16* bias, float* y, int64_t rows, const Run& run) {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t n = run.lo; n < run.hi; ++n) y[row * kPanel + n - run.lo] += load(bias, n);
    }

    template <typename Work>
    void tasks(Phase phase, int64_t count, Work&& work) {
        share(phase, [&](Next& next) { each_task(next, count, is_from_back(thread_), work); });
    }

    template <typename Work>
    void share(Phase phase, Work&& work) {
        (phase_++)->share(work);
        count_time(phase);
    }

    // Returns what to wait on.
    template <typename Work>
    const PhaseState* start(Phase phase, Work&& work) {
        phase_->start(work);
        count_time(phase);
        return phase_++;
    }

    void count_time(Phase phase) {
        if (!times_) return;
        const int64_t time = now();
        times_[phase] += time - last_;
        last_ = time;
    }

    static int64_t now() {
        using namespace std::chrono;
        return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
    }

    Stack& stack_;
    const Model& model_;
    const Step& step_;
    PhaseState* phase_;  // the next
    const int thread_;
    bf16* const panel_;
    const bf16* right_ = stack_.packed_;  // what the next linear reads
    void* const scratch_;
    int64_t* const times_;  // of the thread that keeps time
    const int64_t rows_, width_;
    int64_t last_ = 0;
};

inline int64_t Stack::num_bytes(const StepLimits& most) const {
    const Model& m = model_;
    const int64_t columns = AttentionPlan::columns_of_item(m.heads / m.kv_heads), element = sizeof(bf16);
    const int64_t of_thread = panel_size(widest()) * element + AttentionPlan::scratch_size(m.head_dim, columns);
    const int64_t shared = packed_size(std::max(most.rows, most.logits), widest()) * element +
                           packed_size(most.rows, m.intermediate) * element +
                           std::min(most.rows, kMostFew) * update_size() * static_cast<int64_t>(sizeof(float)) +
                           LoraPlan::v_bytes(most.rows, kMaxProjections, most.granules) +
                           2 * LoraPlan::own_bytes(most.rows) + num_phases() * static_cast<int64_t>(sizeof(PhaseState)) +
                           AttentionPlan::own_bytes(m.heads, m.kv_heads, m.head_dim, most.rows, most.sequences,
                                                    most.context);
    return byte_head_.num_bytes() + GreedyRows::num_bytes(most.logits, m.hidden, num_threads) +
           num_threads * of_thread + shared + 8 * 64;  // and what aligns the buffers
}

// Rows that go on come first: where those have few an adapter, they are the few, whatever prompts come after.
inline void Stack::plan_updates(const LoraStep& lora, const Step& step) {
    int64_t going_on = 0;
    while (going_on < std::min(step.num_sequences, kMostFew) && step.query_starts[going_on + 1] == going_on + 1)
        ++going_on;
    int64_t num_few = 0;
    for (const int64_t rows : {step.rows, going_on}) {
        if (num_few || rows > kMostFew) continue;
        few_.build(lora, step.rows, 0, rows);
        if (are_few(few_)) num_few = rows;
    }
    if (!num_few) few_.build(lora, step.rows, 0, 0);
    rest_.build(lora, step.rows, num_few, step.rows);
}

inline void Stack::run(const Step& step) {
    const Model& m = model_;
    const int64_t threads = num_threads, widest = this->widest();
    packed_ = packed_memory_.at_least(packed_size(std::max(step.rows, step.num_logits), widest));
    bf16* const panels = panel_memory_.at_least(threads * panel_size(widest));
    attention_.build({step.block_tables, step.contexts, step.query_starts, step.max_blocks, step.num_sequences,
                      m.heads, cache_of(step), 0});
    const int64_t scratch_size = ceil_div(attention_.scratch_bytes, 64) * 64;
    char* const scratch = scratch_memory_.at_least(threads * scratch_size);
    gated_ = gated_memory_.at_least(packed_size(step.rows, m.intermediate));
    plan_updates({step.arena,
                  {step.offset, step.scale, step.num_granules, step.table_layers, step.modules, step.granules},
                  step.segments, step.num_segments},
                 step);
    update_ = few_.is_empty() ? nullptr : update_memory_.at_least(few_.owned.back().hi * update_size());
    if (step.num_segments) v_ = v_memory_.at_least(rest_.v_bytes(kMaxProjections));
    if (step.tokens && byte_head_.is_usable())
        greedy_.build(byte_head_, step.num_logits, threads,
                      greedy_memory_.at_least(GreedyRows::num_bytes(step.num_logits, m.hidden, threads)));
    if (!phases_) phases_.reset(new PhaseState[num_phases()]);
    for (int64_t i = 0; i < num_phases(); ++i) phases_[i].reset();
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        const int thread = omp_get_thread_num();
        Worker(*this, step, phases_.get(), thread, panels + thread * panel_size(widest), scratch + thread * scratch_size)
            .run();
    }
}

}  // namespace

#endif
