// The llama_memory_i that freezes: groups of layers, each with its own cells, pool, policy and host store, behind one
// attention input (patches/README.md). This is the only file that includes llama.cpp's own headers.
//
// A step (ubatch) is placed when it is applied, not when its batch is split: programs use batches of 2048 tokens on
// pools of that size. Placing a step is: fold the last scores in, decide, move, find slots. Everything that can fail
// comes before the first change of a group's books, so a token is always in exactly one state.
#include "cache.h"

#include "budgets.h"
#include "calibration.h"
#include "entropy.h"
#include "host_store.h"
#include "policy.h"
#include "relevance.h"
#include "row_mover.h"

#include "llama-context.h"
#include "llama-ext.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <optional>

namespace asrkf {

namespace {

thread_local std::optional<asrkf_config> next_config;
thread_local std::string                 last_error;
thread_local asrkf_status                last_status = ASRKF_OK;

struct stopwatch {
    explicit stopwatch(double & sum) : sum(sum), begin(std::chrono::steady_clock::now()) {}
    ~stopwatch() { sum += seconds(); }
    double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); }
    double &                                    sum;
    const std::chrono::steady_clock::time_point begin;
};

// One group's cells and tensors: upstream's cache, whose cells we may also empty and fill one by one.
class group_cache final : public llama_kv_cache {
public:
    using llama_kv_cache::llama_kv_cache;

    const llama_kv_cells & cells() const { return v_cells[0]; }

    // K and V of each layer; the order defines a token's bytes in the host store
    std::vector<ggml_tensor *> row_tensors() const {
        std::vector<ggml_tensor *> tensors;
        for (const auto & layer : layers) {
            tensors.push_back(layer.k);
            tensors.push_back(layer.v);
        }
        return tensors;
    }

    ggml_tensor * k_of(uint32_t il) const { return has_layer(il) ? layers[size_t(map_layer_ids.at(int32_t(il)))].k : nullptr; }
    ggml_tensor * v_of(uint32_t il) const { return has_layer(il) ? layers[size_t(map_layer_ids.at(int32_t(il)))].v : nullptr; }
    bool has_layer(uint32_t il) const { return map_layer_ids.count(int32_t(il)) > 0; }

    uint64_t device_bytes() const {
        uint64_t n_bytes = 0;
        for (const auto & [buft, size] : memory_breakdown()) {
            n_bytes += size;
        }
        return n_bytes;
    }

    void take_out(uint32_t cell) {
        v_cells[0].rm(cell);
        v_heads[0] = std::min(v_heads[0], cell); // the lowest free cell is used first: attention costs up to the highest
    }

    void put_back(uint32_t cell, llama_pos pos, const llama_kv_cell_ext & ext) {
        v_cells[0].pos_set(cell, pos);
        v_cells[0].ext_set(cell, ext);
        v_cells[0].seq_add(cell, 0);
    }

    std::vector<uint32_t> free_cells(size_t n) const {
        std::vector<uint32_t> result;
        for (uint32_t i = 0; i < v_cells[0].size() && result.size() < n; ++i) {
            if (v_cells[0].is_empty(i)) {
                result.push_back(i);
            }
        }
        return result;
    }
};

// Where a token is in one group. Active: cell >= 0. With a host copy: slot >= 0. Never neither.
struct place {
    int32_t cell = -1;
    int32_t slot = -1;
};

struct group {
    std::vector<uint32_t>        layers;
    std::unique_ptr<group_cache> cache;
    std::unique_ptr<policy>      rule;
    std::unique_ptr<row_mover>   mover;           // null in a context without memory (no_alloc)
    std::unique_ptr<host_store>  store;
    std::vector<place>           places;          // by token
    std::vector<int32_t>         token_of;        // by cell, -1: none
    uint32_t                     n_sealed = 0;    // tokens in sealed blocks (staged moves only)
};

class memory;
class memory_context;

// What the graph code sees of one group for the current step.
class group_context : public llama_kv_cache_context {
public:
    group_context(const memory_context & whole, group & g, std::vector<llama_ubatch> ubatches)
        : llama_kv_cache_context(g.cache.get(), {}, std::move(ubatches)), whole(whole) {
        sinfos.resize(this->ubatches.size()); // found when each step is placed
    }
    group_context(const memory_context & whole, group & g) : llama_kv_cache_context(g.cache.get()), whole(whole) {}

    void set_slot(llama_kv_cache::slot_info slot) {
        sinfos[i_cur] = std::move(slot);
        n_kv          = kv->get_n_kv(sinfos[i_cur]);
    }

    void build_side_branch(llm_graph_result & res, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k_cur, float kq_scale, int32_t il) const override;

protected:
    const memory_context & whole;
};

// The context of the whole memory; it is group 0's, and holds the others'.
class memory_context final : public group_context {
public:
    memory_context(memory & mem, std::vector<llama_ubatch> ubatches, bool rewalks, bool has_output);
    explicit memory_context(memory & mem); // worst case, for reserving compute buffers

    bool next() override;
    bool apply() override;
    void on_computed(llama_context & lctx, const llm_graph_result & res) override;

    uint32_t n_groups() const override { return 1 + uint32_t(others.size()); }
    uint32_t group_of(int32_t il) const override;
    const llama_kv_cache_context * get_group(uint32_t ig) const override { return ig == 0 ? this : others[ig - 1].get(); }

    group_context & at(uint32_t ig) { return ig == 0 ? *this : *others[ig - 1]; }

    bool is_first_step() const { return i_cur == 0; }
    bool is_rewalk() const { return rewalks && i_cur + 1 == ubatches.size(); }       // the last tokens of a prompt, computed again
    bool is_before_rewalk() const { return rewalks && i_cur + 2 == ubatches.size(); }

    memory &             mem;
    uint32_t             n_scored = 0; // index rows that this step's graph scores, 0: none
    uint32_t             first_token = 0; // of this step, and how many
    uint32_t             n_step_tokens = 0;
    bool                 scores_prompt_end = false;
    std::vector<int32_t> queries;      // which of them are kept, and where
    std::vector<int64_t> query_rows;

private:
    const bool rewalks;
    const bool has_output; // one whose entropy counts
    std::vector<std::unique_ptr<group_context>> others;
};

// The relevance branch of one graph.
class side_input final : public llm_graph_input_i {
public:
    side_input(const memory_context * mctx, uint32_t n_tokens, relevance::branch branch) : mctx(mctx), n_tokens(n_tokens), branch(std::move(branch)) {}
    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override {
        mctx = static_cast<const memory_context *>(params.mctx);
        return mctx->n_scored == branch.n_scored && mctx->scores_prompt_end == branch.prompt_end && n_tokens == params.ubatch.n_tokens;
    }

    const memory_context * mctx;
    const uint32_t         n_tokens;
    relevance::branch      branch;
};

class memory final : public llama_memory_i, public engine {
public:
    memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams, const asrkf_config & config);

    // llama_memory_i
    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override { return std::make_unique<memory_context>(*this); }
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override { return false; }

    void clear(bool data) override;
    bool seq_rm  (llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    void seq_add (llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override { return seq_id == 0 && n_tokens() > 0 ? first().rule->pos(0) : -1; }
    llama_pos seq_pos_max(llama_seq_id seq_id) const override { return seq_id == 0 && n_tokens() > 0 ? first().rule->pos(n_tokens() - 1) : -1; }

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id, llama_state_seq_flags flags) override;

    // engine
    uint64_t freeze_range (llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) override;
    uint64_t restore_range(llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) override;
    void     pin_range    (llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1, bool pinned) override;
    const asrkf_config & get_config() const override { return config; }
    asrkf_stats       get_stats(llama_context * ctx) const override;
    asrkf_group_stats get_group_stats(uint32_t index) const override;
    size_t get_tokens(uint32_t index, int32_t * out_pos, uint8_t * out_state, size_t capacity) const override;
    void   get_rows(llama_context * ctx, uint32_t index, int32_t pos, uint8_t * out, size_t size) override;
    void     set_trace(asrkf_step * buffer, size_t capacity) override { trace = buffer; trace_capacity = capacity; trace_count = 0; }
    uint64_t get_trace_count() const override { return trace_count; }

    void set_prompt_follows(bool follows) override { prompt_follows = follows; }

    // of the contexts
    bool place_step(memory_context & mctx, const llama_ubatch & ubatch);
    bool place_rewalk(memory_context & mctx, const llama_ubatch & ubatch);
    void build_side_branch(const memory_context & mctx, llm_graph_result & res, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k_cur, float kq_scale, int32_t il);
    void set_side_input(const memory_context & mctx, const relevance::branch & branch);
    void read_scores(llama_context & lctx, const memory_context & mctx);
    // Is a prompt's end scored, and by more queries than a step: the worst case.
    bool may_score_prompt_end() const { return config.rewalk_tokens >= 2 && first().rule->params.recall && config.score_queries < PROMPT_END_QUERIES; }
    void step_computed(bool output) { rewalk_begin = -1; output_pending = output; }

    const asrkf_config         config;
    std::vector<group>         groups;
    std::vector<uint32_t>      group_of_layer;
    std::unique_ptr<relevance> scorer;             // null if the policy asks for no scores

private:
    const group & first() const { return groups[0]; }
    // A figure of the groups as the mean over the layers, rounded up: bytes, as if all layers had the same cells.
    template <typename Cells> uint32_t mean_cells(Cells cells) const {
        uint64_t sum = 0, n = 0;
        for (const group & g : groups) {
            sum += uint64_t(cells(g))*g.layers.size();
            n   += g.layers.size();
        }
        return uint32_t((sum + n - 1) / n);
    }
    uint32_t n_tokens() const { return uint32_t(exts.size()); }
    uint32_t lower_bound(llama_pos pos) const;
    std::pair<uint32_t, uint32_t> token_range(int32_t seq_id, int32_t p0, int32_t p1) const;
    uint32_t n_pinned() const;
    bool     is_pinned(llama_pos pos) const;
    void     check_pool(const group & g, uint32_t n_ubatch, uint32_t pinned_tokens) const;
    void     make_groups(const std::vector<layer_budget> & layers);
    ggml_type index_type() const;
    uint32_t  index_tokens_per_row() const;
    uint32_t  n_index_rows() const;
    std::vector<uint32_t>      choose_scoring_layers(const std::vector<layer_budget> & layers, const std::vector<uint32_t> & measured) const;
    std::vector<scoring_layer> make_scoring_layers(bool offload) const;
    std::optional<llama_ubatch> rewalk_of(const std::vector<llama_ubatch> & ubatches) const;
    occasion read_entropy();
    void     check_host_limit(uint32_t n_new) const;

    void synchronize();
    void prepare_to_move();
    void decide_and_move(uint32_t n_new, llama_pos pos_new, occasion why);
    uint64_t n_restores() const;
    void record(asrkf_step step);
    void fold_scores_in();
    void point_at_rows(memory_context & mctx, uint32_t n, bool scoring);
    void reserve_host_room(group & g, const std::vector<uint32_t> & tokens);
    void copy_to_host(group & g, const std::vector<uint32_t> & tokens);
    void drop_cells(group & g, const std::vector<uint32_t> & tokens);
    std::vector<uint32_t> copy_to_device(group & g, const std::vector<uint32_t> & tokens);
    void fill_cells(group & g, const std::vector<uint32_t> & tokens, const std::vector<uint32_t> & cells);
    void carry_out(group & g, const plan & p);
    void seal(group & g, llama_pos pos_end);
    void forget(uint32_t begin, uint32_t end);
    struct row_part { const group * g; ggml_tensor * tensor; size_t row_bytes; size_t offset; }; // offset within a token's bytes
    std::vector<row_part> row_parts() const;
    void check_state(llama_seq_id seq_id, llama_state_seq_flags flags) const;
    void index_from_host();
    void refuse(const std::string & text, asrkf_status status = ASRKF_UNSUPPORTED);
    void refuse(const std::exception & e);

    const llama_model & model;
    const uint32_t      n_ctx;
    const uint32_t      n_ubatch;
    const bool          no_alloc;

    llama_context *                lctx = nullptr; // learnt at the first update, which every decode begins with
    std::vector<llama_kv_cell_ext> exts;           // by token: what a cell holds beside its position
    ranges                         pinned;

    // scores
    std::unique_ptr<index_rows> rows;                   // null without a scorer
    std::unique_ptr<query_rings> rings;
    side_input *              side           = nullptr; // of the graph that is being built
    const relevance::branch * scoring_branch = nullptr; // of the graph that runs
    std::vector<uint32_t>     scoring_layers;           // one ranking serves all groups
    ggml_backend_buffer_ptr   scores_buffer;            // means, then peaks, [n_scores] each, read back from the last scoring step:
    uint32_t                  n_scores       = 0;       // pinned where the device offers it, and never moved: it may still be written
    bool                      scores_pending = false;

    // calls
    recovery_trigger trigger;
    bool             output_pending = false;            // the last call had an output row
    occasion         next_occasion  = occasion::step;
    occasion         reset          = occasion::step;   // the last one that was not a step's, and where it came:
    llama_pos        reset_pos      = -1;               // who goes back behind it, no further than a rewalk, gets the same again
    bool             prompt_follows = false;            // the caller says that the next call continues the prompt
    llama_pos        call_begin     = -1;               // first position of the current call
    llama_pos        rewalk_begin   = -1;               // first position that is being computed again
    bool             keep_store     = false;            // a state is being loaded into it
    std::string      fault;                             // why the next decode must fail, until clear()

    host_budget  budget;
    asrkf_stats  counters = {};
    asrkf_step * trace          = nullptr;
    size_t       trace_capacity = 0;
    uint64_t     trace_count    = 0;
};

//
// group_context, memory_context
//

void group_context::build_side_branch(llm_graph_result & res, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k_cur, float kq_scale, int32_t il) const {
    whole.mem.build_side_branch(whole, res, gf, q, k_cur, kq_scale, il);
}

memory_context::memory_context(memory & mem, std::vector<llama_ubatch> ubatches, bool rewalks, bool has_output)
    : group_context(*this, mem.groups[0], ubatches), mem(mem), rewalks(rewalks), has_output(has_output) {
    for (size_t i = 1; i < mem.groups.size(); ++i) {
        others.push_back(std::make_unique<group_context>(*this, mem.groups[i], ubatches));
    }
}

memory_context::memory_context(memory & mem)
    : group_context(*this, mem.groups[0]), mem(mem), n_scored(mem.scorer ? mem.scorer->rows() : 0), scores_prompt_end(mem.may_score_prompt_end()), rewalks(false), has_output(false) {
    for (size_t i = 1; i < mem.groups.size(); ++i) {
        others.push_back(std::make_unique<group_context>(*this, mem.groups[i]));
    }
}

bool memory_context::next() {
    bool more = group_context::next();
    for (auto & other : others) {
        other->next();
    }
    return more;
}

bool memory_context::apply() { return is_rewalk() ? mem.place_rewalk(*this, ubatches[i_cur]) : mem.place_step(*this, ubatches[i_cur]); }

void memory_context::on_computed(llama_context & lctx, const llm_graph_result &) {
    if (n_scored > 0) {
        mem.read_scores(lctx, *this);
    }
    mem.step_computed(has_output && i_cur + 1 == ubatches.size());
}

uint32_t memory_context::group_of(int32_t il) const { return mem.group_of_layer[size_t(il)]; }

void side_input::set_input(const llama_ubatch *) { mctx->mem.set_side_input(*mctx, branch); }

//
// creation
//

[[noreturn]] void unsupported(const std::string & text) { throw error(ASRKF_UNSUPPORTED, text); }

// Why this context cannot be served. Everything that runs through llm_graph_input_attn_kv on a plain cache can.
void check_context(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    const auto & hparams = model.hparams;
    const std::string arch = model.arch_name();
    if (llm_arch_is_recurrent(model.arch)) {
        unsupported(format("%s is a recurrent model: it has no KV cache to freeze; use kv_policy=\"full\"", arch.c_str()));
    }
    if (llm_arch_is_hybrid(model.arch)) {
        unsupported(format("%s is a hybrid model (recurrent and attention layers), which the policy does not serve yet; use kv_policy=\"full\"", arch.c_str()));
    }
    if (llama_model_has_encoder(&model) || !llama_model_has_decoder(&model)) {
        unsupported(format("%s has an encoder, which the policy does not serve; use kv_policy=\"full\"", arch.c_str()));
    }
    if (!cparams.causal_attn) {
        unsupported(format("%s attends to later tokens too (encoder or diffusion model): a policy needs causal attention; use kv_policy=\"full\"", arch.c_str()));
    }
    if (hparams.is_mla()) {
        unsupported(format("%s uses multi-head latent attention (MLA), whose cache has no V rows; use kv_policy=\"full\"", arch.c_str()));
    }
    switch (model.arch) {
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_GLM5_NEXT:
            unsupported(format("%s has a sparse-attention cache of its own; use kv_policy=\"full\"", arch.c_str()));
        default:
            break;
    }
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE || hparams.is_swa_any()) {
        unsupported(format("%s has sliding-window layers, which the policy does not serve yet; use kv_policy=\"full\"", arch.c_str()));
    }
    if (hparams.use_alibi) {
        unsupported(format("%s uses ALiBi position biases; use kv_policy=\"full\"", arch.c_str()));
    }
    if (hparams.n_pos_per_embd() > 1 || hparams.ple_n_heads > 0) {
        unsupported(format("%s has more than one position per token or embeds its neighbours; use kv_policy=\"full\"", arch.c_str()));
    }
    if (cparams.embeddings) {
        unsupported("an embedding context has nothing to freeze: drop embedding=True, or use kv_policy=\"full\"");
    }
    if (cparams.n_seq_max > 1) {
        unsupported(format("n_seq_max = %u: the policy serves one sequence; pass -np 1 (n_seq_max=1)", cparams.n_seq_max));
    }
    if (!cparams.flash_attn) {
        unsupported("flash attention is off, and then V is stored transposed: pass flash_attn=True (-fa on)");
    }
    if (params.mem_other) {
        unsupported("a context that shares another context's cells cannot have a policy; use kv_policy=\"full\"");
    }
}

// The types that llama.cpp's programs offer for a cache; each is in the round-trip test.
constexpr ggml_type cache_types[] = { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0,
    GGML_TYPE_IQ4_NL, GGML_TYPE_F32 };

// What flash attention on the layer's device does not take is refused here, not computed on the CPU in silence.
void check_cache_types(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams, uint32_t il) {
    const auto & hparams = model.hparams;
    for (const auto & [type, n_head_dim, name] : { std::tuple(params.type_k, hparams.n_embd_head_k(il), "K"), std::tuple(params.type_v, hparams.n_embd_head_v(il), "V") }) {
        if (std::find(std::begin(cache_types), std::end(cache_types), type) == std::end(cache_types)) {
            unsupported(format("%s is not a type for a %s cache: use f16, q8_0 or q4_0", ggml_type_name(type), name));
        }
        if (n_head_dim % uint32_t(ggml_blck_size(type)) != 0) {
            unsupported(format("%s cache type %s has blocks of %d, which do not divide the head size %u", name, ggml_type_name(type), int(ggml_blck_size(type)), n_head_dim));
        }
    }
    ggml_backend_dev_t dev = cparams.offload_kqv ? model.dev_layer(int(il)) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_init_params init = { 8*ggml_tensor_overhead(), nullptr, true };
    ggml_context_ptr holder(ggml_init(init));
    ggml_context * ctx = holder.get();
    const int64_t n_kv = POOL_PAD_CELLS;
    ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, hparams.n_embd_head_k(il), 1, hparams.n_head(il));
    ggml_tensor * k = ggml_new_tensor_3d(ctx, params.type_k, hparams.n_embd_head_k(il), n_kv, hparams.n_head_kv(il));
    ggml_tensor * v = ggml_new_tensor_3d(ctx, params.type_v, hparams.n_embd_head_v(il), n_kv, hparams.n_head_kv(il));
    ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, 1);
    ggml_tensor * op = ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f, 0.0f, 0.0f);
    ggml_prec_set_acc(op, GGML_PREC_F32);
    if (dev && !ggml_backend_dev_supports_op(dev, op)) {
        unsupported(format("flash attention on %s does not take a K cache of type %s with a V cache of type %s: use f16, q8_0 or q4_0 for both",
                ggml_backend_dev_name(dev), ggml_type_name(params.type_k), ggml_type_name(params.type_v)));
    }
}

// What a calibration is for: shape, size and the norm weights, which no two trainings share.
std::string fingerprint(const llama_model & model) {
    uint64_t hash = 14695981039346656037ull; // FNV-1a
    const auto add = [&](const void * data, size_t n) {
        for (size_t i = 0; i < n; ++i) {
            hash = (hash ^ static_cast<const uint8_t *>(data)[i])*1099511628211ull;
        }
    };
    const std::string shape = format("%s %u %u", model.arch_name().c_str(), model.hparams.n_layer_all, model.hparams.n_embd);
    add(shape.data(), shape.size());
    std::vector<uint8_t> bytes;
    // by name and once each: their order, and a second copy of tied embeddings, depend on the devices
    const std::map<std::string, ggml_tensor *> tensors(model.tensors_by_name.begin(), model.tensors_by_name.end());
    for (const auto & [name, tensor] : tensors) {
        add(name.data(), name.size());
        add(&tensor->type, sizeof(tensor->type));
        if (name.find("_norm.weight") != std::string::npos && tensor->buffer) {
            bytes.resize(ggml_nbytes(tensor));
            ggml_backend_tensor_get(tensor, bytes.data(), 0, bytes.size());
            add(bytes.data(), bytes.size());
        }
    }
    return format("%s-%016llx", model.arch_name().c_str(), (unsigned long long) hash);
}

memory::memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams, const asrkf_config & config)
    : config(config), model(model), n_ctx(cparams.n_ctx_seq), n_ubatch(cparams.n_ubatch), no_alloc(model.hparams.no_alloc), pinned(parse_positions("pinned", config.pinned)),
      trigger(recovery_kind(config.recovery), trigger_kind(config.trigger), config.trigger_share, 2*config.interval, config.seed) {
    const auto & hparams = model.hparams;
    const uint32_t n_layer = hparams.n_layer_all;

    // layers of a draft head (NextN) are never attended by the main graph
    const bool has_draft_layers = hparams.n_layer_nextn > 0 && hparams.n_layer() > 0 && hparams.router_layer < 0;
    std::vector<uint32_t>     layers;
    std::vector<layer_budget> layer_budgets;
    for (uint32_t il = 0; il < (has_draft_layers ? hparams.n_layer() : n_layer); ++il) {
        if (hparams.has_kv(il)) {
            if (hparams.n_head(il) == 0 || hparams.n_head_kv(il) == 0) {
                unsupported(format("layer %u of this %s has no attention, which the policy does not serve yet; use kv_policy=\"full\"", il, model.arch_name().c_str()));
            }
            check_cache_types(model, params, cparams, il);
            layers.push_back(il);
            layer_budgets.push_back({ il, 0, ggml_row_size(params.type_k, hparams.n_embd_k_gqa(il)) + ggml_row_size(params.type_v, hparams.n_embd_v_gqa(il)) });
        }
    }
    if (layers.empty()) {
        unsupported("the model has no layer with a KV cache; use kv_policy=\"full\"");
    }
    std::vector<uint32_t> measured_scorers;
    if (*config.calibration) {
        const calibration found = read_calibration(config.calibration);
        const std::string own = no_alloc ? found.fingerprint : fingerprint(model); // a trial without memory has no weights to name
        if (found.fingerprint != own) {
            throw error(ASRKF_INVALID_ARGUMENT, format("calibration=%s was made for another model (%s, this one is %s): run asrkf calibrate on this model", config.calibration,
                    found.fingerprint.c_str(), own.c_str()));
        }
        if (found.sensitivities.size() != layers.size()) {
            throw error(ASRKF_INVALID_ARGUMENT, format("calibration=%s has %zu layers, the model has %zu", config.calibration, found.sensitivities.size(), layers.size()));
        }
        for (size_t i = 0; i < layers.size(); ++i) {
            layer_budgets[i].sensitivity = found.sensitivities[i];
        }
        measured_scorers = found.score_layers;
    } else {
        for (size_t i = 0; i < layers.size(); ++i) {
            layer_budgets[i].sensitivity = prior_sensitivity(layers.size() > 1 ? double(i) / double(layers.size() - 1) : 0);
        }
    }
    if (make_policy_params(config, 1).wants_scores()) {
        scoring_layers = choose_scoring_layers(layer_budgets, measured_scorers);
    }
    group_of_layer.assign(n_layer, 0);
    make_groups(layer_budgets);

    // refuse before anything is allocated
    for (const group & g : groups) {
        check_pool(g, n_ubatch, n_pinned());
    }

    budget.limit_bytes = config.host_limit;
    ggml_backend_buffer_type_t scores_buft = ggml_backend_cpu_buffer_type();
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        group & g = groups[ig];
        const uint32_t pool_cells = g.rule->params.pool_cells;
        const auto filter = [&](int32_t il) { return group_of_layer[size_t(il)] == ig; };
        const std::string tag = groups.size() == 1 ? "" : "g" + std::to_string(ig) + "_";
        g.cache = std::make_unique<group_cache>(model, hparams, params.type_k, params.type_v, /*v_trans*/ false, cparams.offload_kqv,
                /*unified*/ true, pool_cells, /*n_seq_max*/ 1, /*n_pad*/ 1, /*n_swa*/ 0, LLAMA_SWA_TYPE_NONE, nullptr, filter, nullptr, nullptr, tag.c_str());
        g.token_of.assign(pool_cells, -1);

        if (!no_alloc) {
            g.mover = std::make_unique<row_mover>(g.cache->row_tensors(), moves_kind(config.moves));
            ggml_backend_dev_t dev = g.mover->is_staged() ? model.dev_layer(int(g.layers[0])) : nullptr;
            ggml_backend_buffer_type_t buft = dev ? ggml_backend_dev_host_buffer_type(dev) : nullptr;
            scores_buft = buft = buft ? buft : ggml_backend_cpu_buffer_type();
            g.store = std::make_unique<host_store>(g.mover->token_bytes(), buft, budget);
        }
        LLAMA_LOG_INFO("%s: policy %s, group %zu: %zu layers, pool of %u cells for n_ctx %u, window %u, steps of at most %u tokens\n", __func__,
                policy_name(config.policy), ig, g.layers.size(), pool_cells, n_ctx, g.rule->params.window, g.rule->max_ubatch());
    }

    // a scoring layer adds up to 150 nodes to a graph that llama_context sizes by the model's tensors, with room to spare
    const size_t n_spare = std::max<size_t>(1024, 8*model.n_tensors())/2;
    if (150*scoring_layers.size() > n_spare) {
        throw error(ASRKF_INVALID_ARGUMENT, format("score_layers=%s: %zu layers are too many for this model's graph, %zu is the most", config.score_layers,
                scoring_layers.size(), n_spare/150));
    }
    if (!scoring_layers.empty()) {
        const uint32_t tokens_per_row = index_tokens_per_row(), n_rows = n_index_rows();
        rows   = std::make_unique<index_rows>(n_rows, tokens_per_row);
        scorer = std::make_unique<relevance>(make_scoring_layers(cparams.offload_kqv), n_rows, tokens_per_row, config.score_queries, index_type(), score_kind(config.score),
                hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f, no_alloc);
        rings  = std::make_unique<query_rings>(config.score_queries);
        scores_buffer.reset(ggml_backend_buft_alloc_buffer(scores_buft, 2*n_rows*sizeof(float)));
        if (!scores_buffer) {
            throw error(ASRKF_INTERNAL, "no host memory for the scores");
        }
    }
}

uint32_t memory::index_tokens_per_row() const { return recall_kind(config.recall) == RECALL_MEAN_KEY ? RECALL_BLOCK : 1; }
uint32_t memory::n_index_rows() const { return (n_ctx + index_tokens_per_row() - 1) / index_tokens_per_row(); }

// Rounding an index row costs rank, not content: the smallest type that divides a head. A mean is written many times, and
// would gather the rounding: F16.
ggml_type memory::index_type() const {
    if (index_tokens_per_row() > 1) {
        return GGML_TYPE_F16;
    }
    switch (index_kind(config.index)) {
        case INDEX_F16:  return GGML_TYPE_F16;
        case INDEX_Q8_0: return GGML_TYPE_Q8_0;
        case INDEX_Q4_0: return GGML_TYPE_Q4_0;
        case INDEX_AUTO: break;
    }
    for (uint32_t il = 0; il < model.hparams.n_layer_all; ++il) {
        if (model.hparams.has_kv(il) && model.hparams.n_embd_head_k(il) % uint32_t(ggml_blck_size(GGML_TYPE_Q4_0)) != 0) {
            return GGML_TYPE_F16;
        }
    }
    return GGML_TYPE_Q4_0;
}

void memory::make_groups(const std::vector<layer_budget> & layers) {
    uint64_t token_bytes = 0;
    for (const layer_budget & l : layers) {
        token_bytes += l.token_bytes;
    }
    const auto has_kv = [&](uint32_t il) { return std::any_of(layers.begin(), layers.end(), [&](const layer_budget & l) { return l.il == il; }); };
    const std::string mode = config.layers;
    std::vector<group_budget> plans;
    if (const auto specs = parse_groups(mode); !specs.empty()) {
        std::vector<bool> taken(group_of_layer.size(), false);
        for (const auto & spec : specs) {
            plans.emplace_back();
            for (const auto & [from, to] : spec.layers) {
                for (int32_t il = from; il <= to; ++il) {
                    const bool known = il < int32_t(taken.size());
                    if (!known || !has_kv(uint32_t(il)) || taken[size_t(il)]) {
                        throw error(ASRKF_INVALID_ARGUMENT, format("layers=%s: layer %d %s", config.layers, il,
                                known && taken[size_t(il)] ? "is in two groups" : "has no KV cache in this model"));
                    }
                    taken[size_t(il)] = true;
                    plans.back().layers.push_back(uint32_t(il));
                }
            }
            asrkf_config own = config;
            own.pool_cells = spec.pool_cells;
            plans.back().pool_cells = resolve_pool(own, n_ctx, token_bytes);
        }
        for (const layer_budget & l : layers) {
            if (!taken[l.il]) {
                throw error(ASRKF_INVALID_ARGUMENT, format("layers=%s: layer %u is in no group", config.layers, l.il));
            }
        }
    } else {
        asrkf_config whole = config;
        if (config.pool_bytes && !scoring_layers.empty()) { // the index is part of the bound
            const auto & hparams = model.hparams;
            const uint64_t layer_bytes = (n_index_rows() + 1)*ggml_row_size(index_type(), hparams.n_embd_k_gqa(layers[0].il)) // and the ring, and alignment
                + (config.score_queries + PROMPT_END_QUERIES)*hparams.n_embd_head_k(layers[0].il)*hparams.n_head(layers[0].il)*sizeof(float) + 1024;
            const uint64_t index_bytes = scoring_layers.size()*layer_bytes, least_bytes = index_bytes + POOL_PAD_CELLS*token_bytes;
            if (config.pool_bytes < least_bytes) {
                throw error(ASRKF_INVALID_ARGUMENT, format("pool of %llu bytes holds no index of %llu bytes and %u cells of %llu: raise kv_pool to at least %llu bytes",
                    (unsigned long long) config.pool_bytes, (unsigned long long) index_bytes, POOL_PAD_CELLS, (unsigned long long) token_bytes, (unsigned long long) least_bytes));
            }
            whole.pool_bytes = config.pool_bytes - index_bytes;
        }
        const uint32_t mean_cells = resolve_pool(whole, n_ctx, token_bytes);
        // the least that check_pool() takes, with a window of half a pool
        const uint32_t least = 2*(config.sinks + n_pinned() + std::min(n_ubatch, config.block) + 2*config.block) + config.window;
        if (mode == "shared" || mean_cells >= n_ctx || layers.size() == 1) {
            plans.push_back({ {}, mean_cells });
            for (const layer_budget & l : layers) {
                plans.back().layers.push_back(l.il);
            }
        } else {
            plans = mode == "two" ? split_two(layers, mean_cells, least, n_ctx) : split_each(layers, mean_cells, least, n_ctx);
        }
    }
    groups.resize(plans.size());
    for (size_t ig = 0; ig < plans.size(); ++ig) {
        groups[ig].layers = plans[ig].layers;
        groups[ig].rule   = std::make_unique<policy>(make_policy_params(config, plans[ig].pool_cells));
        for (const uint32_t il : plans[ig].layers) {
            group_of_layer[il] = uint32_t(ig);
        }
    }
}

// As asked for, as measured, or by depth. All groups share one ranking, so these serve them all.
std::vector<uint32_t> memory::choose_scoring_layers(const std::vector<layer_budget> & layers, const std::vector<uint32_t> & measured) const {
    std::vector<uint32_t> chosen = measured.empty() ? default_scoring_layers(layers) : measured;
    const char * source = "calibration", * text = config.calibration;
    if (std::strcmp(config.score_layers, "auto") != 0) {
        source = "score_layers", text = config.score_layers;
        chosen.clear();
        for (const auto & [from, to] : parse_layers(source, text)) {
            for (int32_t il = from; il <= to; ++il) {
                chosen.push_back(uint32_t(il));
            }
        }
    }
    for (const uint32_t il : chosen) {
        if (std::none_of(layers.begin(), layers.end(), [&](const layer_budget & l) { return l.il == il; })) {
            throw error(ASRKF_INVALID_ARGUMENT, format("%s=%s: the model has %zu layers with a KV cache, and %u is none of them", source, text, layers.size(), il));
        }
    }
    std::sort(chosen.begin(), chosen.end());
    chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
    return chosen;
}

std::vector<scoring_layer> memory::make_scoring_layers(bool offload) const {
    const auto & hparams = model.hparams;
    std::vector<scoring_layer> result;
    for (const uint32_t il : scoring_layers) {
        ggml_backend_dev_t dev = offload ? model.dev_layer(int(il)) : nullptr;
        result.push_back({ il, int64_t(hparams.n_embd_head_k(il)), int64_t(hparams.n_head(il)), int64_t(hparams.n_head_kv(il)),
            dev ? ggml_backend_dev_buffer_type(dev) : ggml_backend_cpu_buffer_type() });
    }
    return result;
}

void memory::check_pool(const group & g, uint32_t n_ubatch, uint32_t pinned_tokens) const {
    const policy_params & p = g.rule->params;
    const uint64_t required = policy::required_cells(p, n_ubatch, pinned_tokens);
    if (required > p.pool_cells) {
        // an automatic window is half of the pool, so the rest has to fit into the other half
        const uint64_t least = config.window ? required : 2*(required - p.window);
        const uint64_t least_padded = (least + POOL_PAD_CELLS - 1) / POOL_PAD_CELLS * POOL_PAD_CELLS;
        throw error(ASRKF_POOL_FULL, format("pool of %u cells cannot hold sinks %u + window %u + pinned %u + batch %u + two blocks of %u: raise kv_pool to at least %llu or lower %s",
                p.pool_cells, p.sinks, p.window, pinned_tokens, std::min(n_ubatch, p.block), p.block, (unsigned long long) least_padded, config.window ? "window" : "the pinned ranges"));
    }
}

llama_memory_i * create(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    try {
        if (params.mem_other && dynamic_cast<memory *>(params.mem_other)) {
            unsupported("a draft that shares the cells of its target cannot be used while the target has a policy; use kv_policy=\"full\"");
        }
        if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
            return nullptr; // not the user's context: the head of a draft
        }
        std::optional<asrkf_config> config = next_config;
        if (!model.hparams.no_alloc) {
            next_config.reset(); // consumed, whatever comes of it; a trial without memory only looks
        }
        if (!config) {
            const char * text = getenv("LLAMA_KV_POLICY");
            if (!text || !*text) {
                return nullptr;
            }
            config = config_parse(text);
        }
        if (config->policy == ASRKF_POLICY_FULL) {
            return nullptr;
        }
        check_context(model, params, cparams);
        return new memory(model, params, cparams, *config);
    } catch (const std::exception & e) {
        const auto * known = dynamic_cast<const error *>(&e);
        set_last_error(e.what(), known ? known->status : ASRKF_INTERNAL);
        throw;
    }
}

const bool registered = [] { llama_memory_factory_ext = create; return true; }();

//
// batches
//

llama_memory_context_ptr memory::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch_max, bool /*embd_all*/) {
    try {
        if (!fault.empty()) {
            unsupported(fault);
        }
        uint32_t n_step = n_ubatch_max;
        for (const group & g : groups) {
            n_step = std::min(n_step, g.rule->max_ubatch());
        }
        if (n_tokens() + balloc.get_n_tokens() > n_ctx) {
            throw error(ASRKF_POOL_FULL, format("context is full: %u tokens and %u new ones do not fit into n_ctx %u", n_tokens(), balloc.get_n_tokens(), n_ctx));
        }
        check_host_limit(balloc.get_n_tokens());

        balloc.split_reset();
        std::vector<llama_ubatch> ubatches;
        for (llama_ubatch ubatch = balloc.split_simple(n_step); ubatch.n_tokens > 0; ubatch = balloc.split_simple(n_step)) {
            for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
                if (ubatch.n_seq_id[i] != 1 || ubatch.seq_id[i][0] != 0) {
                    unsupported("a batch names a sequence other than 0: the policy serves one sequence; pass -np 1");
                }
            }
            ubatches.push_back(std::move(ubatch));
        }
        if (ubatches.empty()) {
            throw error(ASRKF_INTERNAL, "the batch could not be split");
        }
        next_occasion = read_entropy();
        call_begin    = ubatches[0].pos[0];
        const bool has_output = balloc.get_n_outputs() > 0 && !prompt_follows; // in the middle of a prompt there is one only by habit
        std::optional<llama_ubatch> again = prompt_follows ? std::nullopt : rewalk_of(ubatches);
        if (again) { // the outputs are those of the second time
            ubatches.back().output[ubatches.back().n_tokens - 1] = 0;
            ubatches.push_back(std::move(*again));
        }
        return std::make_unique<memory_context>(*this, std::move(ubatches), again.has_value(), has_output);
    } catch (const std::exception & e) {
        refuse(e);
        return std::make_unique<llama_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }
}

// The end of a prompt that will not fit its pool: its last tokens once more, as a step of their own, to be computed when
// the blocks that they ask for are back. Such an end is several tokens with one output, the last.
std::optional<llama_ubatch> memory::rewalk_of(const std::vector<llama_ubatch> & ubatches) const {
    uint32_t n_new = 0, n_outputs = 0, least_pool = n_ctx, n = config.rewalk_tokens;
    for (const llama_ubatch & u : ubatches) {
        if (!u.token) {
            return std::nullopt;
        }
        n_new += u.n_tokens;
        n_outputs += uint32_t(std::count_if(u.output, u.output + u.n_tokens, [](int8_t o) { return o != 0; }));
    }
    for (const group & g : groups) {
        least_pool = std::min(least_pool, g.rule->params.pool_cells);
        n = std::min({ n, g.rule->params.window, g.rule->max_ubatch(), n_ubatch });
    }
    const llama_ubatch & last = ubatches.back();
    n = std::min(n, n_tokens() + n_new);
    if (!scorer || !first().rule->params.recall || n_new < 2 || n_outputs != 1 || !last.output[last.n_tokens - 1] || n < 2 || n_tokens() + n_new <= least_pool) {
        return std::nullopt;
    }
    const auto & cparams = lctx->get_cparams();
    if (cparams.embeddings_nextn || std::count(cparams.embeddings_layer_inp.begin(), cparams.embeddings_layer_inp.end(), true)) {
        return std::nullopt; // a draft model reads every token's hidden state, once
    }
    auto data = std::make_shared<llama_ubatch::data_t>();
    std::vector<llama_token> tokens;
    std::vector<llama_pos>   positions;
    for (uint32_t i = n_tokens() - std::min(n_tokens(), n); i < n_tokens(); ++i) {
        tokens.push_back(exts[i].tok);
        positions.push_back(first().rule->pos(i));
    }
    for (const llama_ubatch & u : ubatches) {
        tokens.insert(tokens.end(), u.token, u.token + u.n_tokens);
        positions.insert(positions.end(), u.pos, u.pos + u.n_tokens);
    }
    uint32_t least_window = n_ctx;
    for (const group & g : groups) {
        least_window = std::min(least_window, g.rule->params.window);
    }
    while (n > 0 && positions[positions.size() - n] <= positions.back() - llama_pos(least_window)) {
        n--; // positions may have holes, and only the window is sure to be in the pool
    }
    if (n < 2) {
        return std::nullopt;
    }
    data->token.assign(tokens.end() - n, tokens.end());
    data->pos.assign(positions.end() - n, positions.end());
    if (std::count(data->token.begin(), data->token.end(), LLAMA_TOKEN_NULL)) {
        return std::nullopt; // it came as an embedding, or from a state that does not hold it
    }
    data->n_seq_id.assign(n, 1);
    data->seq_id_data.assign(n, 0);
    for (uint32_t i = 0; i < n; ++i) {
        data->seq_id.push_back(&data->seq_id_data[i]);
    }
    data->seq_id_unq = { 0 };
    data->seq_idx.assign(LLAMA_MAX_SEQ, -1);
    data->seq_idx[0] = 0;
    data->output.assign(n, 0);
    data->output[n - 1] = 1;
    data->batch_idxs.assign(n, -1);
    return llama_ubatch { 0, n, 1, n, 1, 1, data->token.data(), nullptr, data->pos.data(), data->n_seq_id.data(), data->seq_id.data(), data->seq_id_unq.data(),
        data->seq_idx.data(), data->output.data(), data };
}

// The entropy of the last call's last output, which the caller has had by now, and what it calls for.
occasion memory::read_entropy() {
    if (!std::exchange(output_pending, false) || (config.recovery == RECOVERY_OFF && !trace)) {
        return occasion::step;
    }
    stopwatch watch(counters.policy_seconds);
    synchronize();
    const float * logits = lctx->get_logits_ith(-1);
    if (!logits || n_tokens() == 0) {
        return occasion::step;
    }
    switch (trigger.observe(entropy_of(logits, size_t(model.vocab.n_tokens())), exts.back().tok)) {
        case RECOVERY_SOFT:   counters.recoveries_soft_total++;   return occasion::soft_reset;
        case RECOVERY_WINDOW: counters.recoveries_window_total++; return occasion::window_reset;
        case RECOVERY_FULL:   counters.recoveries_full_total++;   return occasion::full_reset;
        default:              return occasion::step;
    }
}

llama_memory_context_ptr memory::init_update(llama_context * ctx, bool /*optimize*/) {
    lctx = ctx;
    if (!ctx->get_cparams().flash_attn) { // "auto" has been resolved by now
        fault = "flash attention resolved to off on this device: use a cache type that it supports, or kv_policy=\"full\"";
    }
    return std::make_unique<llama_kv_cache_context>(LLAMA_MEMORY_STATUS_NO_UPDATE);
}

// Refuse a batch that cannot end within host_limit before its first step: the store needs at least this much.
void memory::check_host_limit(uint32_t n_new) const {
    if (!budget.limit_bytes || no_alloc) {
        return;
    }
    uint64_t needed_bytes = 0;
    for (const group & g : groups) {
        const uint64_t total = uint64_t(n_tokens()) + n_new, pool_cells = g.rule->params.pool_cells;
        needed_bytes += (total > pool_cells ? total - pool_cells : 0)*g.mover->token_bytes();
    }
    if (needed_bytes > budget.limit_bytes) {
        throw error(ASRKF_HOST_LIMIT, format("host_limit of %llu bytes cannot hold what must be frozen for %u more tokens (at least %llu bytes): "
                "raise host_limit, raise kv_pool, or remove tokens", (unsigned long long) budget.limit_bytes, n_new, (unsigned long long) needed_bytes));
    }
}

void memory::decide_and_move(uint32_t n_new, llama_pos pos_new, occasion why) {
    fold_scores_in();
    std::vector<plan> plans;
    for (const bool frugal : { false, true }) {
        plans.clear();
        {
            stopwatch watch(counters.policy_seconds);
            for (const group & g : groups) {
                plans.push_back(g.rule->decide(n_new, pos_new, why, frugal));
            }
        }
        try {
            for (size_t ig = 0; ig < groups.size(); ++ig) { // all host room first: only then does anything change
                reserve_host_room(groups[ig], plans[ig].freeze);
            }
            break;
        } catch (const error & e) { // an exchange needs more room than it leaves taken: near the limit, only what must be
            if (e.status != ASRKF_HOST_LIMIT || frugal) {
                throw;
            }
        }
    }
    stopwatch watch(counters.moves_seconds);
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        carry_out(groups[ig], plans[ig]);
        seal(groups[ig], pos_new + llama_pos(n_new));
    }
}

uint64_t memory::n_restores() const {
    return counters.restores_timer_total + counters.restores_window_total + counters.restores_refill_total + counters.restores_recall_total + counters.restores_recovery_total;
}

bool memory::place_step(memory_context & mctx, const llama_ubatch & ubatch) {
    try {
        const uint32_t  n       = ubatch.n_tokens;
        const llama_pos pos_new = ubatch.pos[0];
        const uint64_t  freezes = counters.freezes_total, restores = n_restores();
        const double policy_before = counters.policy_seconds, moves_before = counters.moves_seconds;

        occasion why = std::exchange(next_occasion, occasion::step);
        if (why == occasion::step && pos_new < reset_pos && pos_new >= reset_pos - llama_pos(config.rewalk_tokens)) {
            why = reset;
        }
        decide_and_move(n, pos_new, why);
        if (why != occasion::step) {
            reset     = why;
            reset_pos = pos_new;
        }

        std::vector<llama_kv_cache::slot_info> slots;
        for (const group & g : groups) {
            slots.push_back(g.cache->find_slot(ubatch, false));
            if (slots.back().empty()) {
                throw error(ASRKF_INTERNAL, format("no %u free cells after a decision (%u of %u used)", n, g.cache->cells().get_used(), g.cache->get_size()));
            }
        }

        bool scoring = mctx.is_before_rewalk();
        for (const group & g : groups) {
            scoring |= g.rule->scores_due(n);
        }
        for (uint32_t i = 0; i < n; ++i) {
            llama_kv_cell_ext ext;
            ext.tok = ubatch.token ? ubatch.token[i] : LLAMA_TOKEN_NULL;
            exts.push_back(ext);
            if (rows) {
                rows->append();
            }
        }
        for (uint32_t ig = 0; ig < groups.size(); ++ig) {
            group & g = groups[ig];
            g.cache->apply_ubatch(slots[ig], ubatch);
            for (uint32_t i = 0; i < n; ++i) {
                const uint32_t cell = slots[ig].idxs[0][i];
                g.token_of[cell] = int32_t(g.places.size());
                g.places.push_back({ int32_t(cell), -1 });
                g.rule->append(ubatch.pos[i]);
                if (is_pinned(ubatch.pos[i])) {
                    g.rule->set_pinned(g.rule->n_tokens() - 1, true);
                }
            }
            g.rule->advance(n, scoring);
            mctx.at(ig).set_slot(std::move(slots[ig]));
        }
        point_at_rows(mctx, n, scoring);

        counters.scoring_steps_total += scoring;
        record({ 0, pos_new, n, 0, 0, uint32_t(counters.freezes_total - freezes), uint32_t(n_restores() - restores), scoring, uint32_t(why),
            mctx.is_first_step() ? float(trigger.last()) : 0, float(counters.policy_seconds - policy_before), float(counters.moves_seconds - moves_before) });
        counters.steps_total++;
        return true;
    } catch (const std::exception & e) {
        refuse(e);
        return false;
    }
}

void memory::record(asrkf_step step) {
    if (trace) {
        step.index        = counters.steps_total;
        step.active_cells = mean_cells([](const group & g) { return g.rule->n_active(); });
        step.frozen_cells = n_tokens() - step.active_cells;
        trace[trace_count++ % trace_capacity] = step;
    }
}

// The last tokens again, in the cells that they have: their rows are overwritten, no token is added.
bool memory::place_rewalk(memory_context & mctx, const llama_ubatch & ubatch) {
    try {
        const uint32_t n = ubatch.n_tokens, begin = n_tokens() - n;
        rewalk_begin = ubatch.pos[0]; // from here on a failure takes back this call's tokens only: see seq_rm()
        const uint64_t freezes = counters.freezes_total, restores = n_restores();
        const double policy_before = counters.policy_seconds, moves_before = counters.moves_seconds;
        decide_and_move(0, first().rule->pos(n_tokens() - 1) + 1, occasion::prompt_end);
        for (uint32_t ig = 0; ig < groups.size(); ++ig) {
            group & g = groups[ig];
            llama_kv_cache::slot_info slot = { 0, 0, { 0 }, { {} } };
            for (uint32_t i = begin; i < n_tokens(); ++i) {
                if (g.places[i].cell < 0) {
                    throw error(ASRKF_INTERNAL, format("position %d of the window is not in the pool", g.rule->pos(i)));
                }
            }
            for (uint32_t i = begin; i < n_tokens(); ++i) {
                place & p = g.places[i];
                slot.idxs[0].push_back(uint32_t(p.cell));
                if (p.slot >= 0) {
                    g.store->release(uint32_t(p.slot));
                    p.slot = -1;
                }
            }
            g.n_sealed = std::min(g.n_sealed, begin / g.rule->params.block * g.rule->params.block);
            mctx.at(ig).set_slot(std::move(slot));
        }
        point_at_rows(mctx, n, false);
        counters.rewalks_total++;
        counters.rewalked_tokens_total += n;
        record({ 0, ubatch.pos[0], n, 0, 0, uint32_t(counters.freezes_total - freezes), uint32_t(n_restores() - restores), 0, uint32_t(occasion::prompt_end), 0,
            float(counters.policy_seconds - policy_before), float(counters.moves_seconds - moves_before) });
        counters.steps_total++;
        return true;
    } catch (const std::exception & e) {
        refuse(e);
        return false;
    }
}

//
// scores
//

// The step's tokens are the last n: where the graph writes their K rows and queries, and how many rows it scores.
void memory::point_at_rows(memory_context & mctx, uint32_t n, bool scoring) {
    if (!scorer) {
        return;
    }
    mctx.first_token   = n_tokens() - n;
    mctx.n_step_tokens = n;
    std::vector<llama_pos> step_pos;
    for (uint32_t i = n_tokens() - n; i < n_tokens(); ++i) {
        step_pos.push_back(first().rule->pos(i));
    }
    rings->keep(step_pos, mctx.queries, mctx.query_rows);
    mctx.scores_prompt_end = scoring && mctx.is_before_rewalk();
    mctx.n_scored = 0;
    if (scoring) {
        mctx.n_scored = std::min(scorer->rows(), (rows->n_used() + POOL_PAD_CELLS - 1) / POOL_PAD_CELLS * POOL_PAD_CELLS);
    }
}

void memory::build_side_branch(const memory_context & mctx, llm_graph_result & res, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k_cur, float kq_scale, int32_t il) {
    if (!scorer) {
        return;
    }
    const auto & layers = scorer->layers();
    const auto found = std::find_if(layers.begin(), layers.end(), [&](const scoring_layer & l) { return l.il == uint32_t(il); });
    if (found == layers.end()) {
        return;
    }
    if (found == layers.begin()) { // a new graph
        side = static_cast<side_input *>(res.add_input(std::make_unique<side_input>(&mctx, uint32_t(k_cur->ne[2]), scorer->new_branch(res.get_ctx(), uint32_t(k_cur->ne[2]), mctx.n_scored, mctx.scores_prompt_end))));
    }
    scorer->build(res.get_ctx(), gf, side->branch, size_t(found - layers.begin()), q, k_cur, kq_scale);
}

void memory::set_side_input(const memory_context & mctx, const relevance::branch & branch) {
    scorer->set_written(branch, *rows, mctx.first_token, mctx.n_step_tokens);
    ggml_backend_tensor_set(branch.queries, mctx.queries.data(), 0, ggml_nbytes(branch.queries));
    ggml_backend_tensor_set(branch.query_rows, mctx.query_rows.data(), 0, ggml_nbytes(branch.query_rows));
    std::vector<llama_pos> token_pos;
    for (uint32_t i = 0; branch.mask && i < n_tokens(); ++i) {
        token_pos.push_back(first().rule->pos(i));
    }
    scorer->set_mask(branch, *rows, token_pos, rings->positions(branch.prompt_end));
    scoring_branch = &branch;
}

void memory::read_scores(llama_context & ctx, const memory_context & mctx) {
    stopwatch watch(counters.scoring_seconds);
    ggml_backend_sched_t sched = ctx.get_sched();
    auto * out = static_cast<float *>(ggml_backend_buffer_get_base(scores_buffer.get()));
    n_scores = mctx.n_scored;
    for (ggml_tensor * scores : { scoring_branch->mean, scoring_branch->peak }) {
        ggml_backend_tensor_get_async(ggml_backend_sched_get_tensor_backend(sched, scores), scores, out, 0, n_scores*sizeof(float));
        out += n_scores;
    }
    scores_pending = true;
}

// The scores arrive with the logits of their step; by the next one the caller has usually waited for those.
void memory::fold_scores_in() {
    if (!scores_pending) {
        return;
    }
    stopwatch watch(counters.scoring_seconds);
    scores_pending = false;
    synchronize();
    const auto * means = static_cast<const float *>(ggml_backend_buffer_get_base(scores_buffer.get()));
    const float * peaks = means + n_scores;
    for (group & g : groups) {
        const float keep = g.rule->average_weight();
        for (uint32_t i = 0; i < n_tokens(); ++i) {
            const uint32_t row = (*rows)[i];
            if (row < n_scores) { // a token of this very call may be newer
                const float share = 1.0f / float(rows->tokens_of(row));
                g.rule->observe(i, means[row]*share, peaks[row]*share, keep);
            }
        }
    }
}

//
// moves
//

// Not llama_synchronize(): that one counts tokens. CUDA's set and get use another stream than compute.
void memory::synchronize() { ggml_backend_sched_synchronize(lctx->get_sched()); }

// Moves run on the backends that compute the graphs, but not through their scheduler.
void memory::prepare_to_move() {
    synchronize();
    ggml_backend_sched_t sched = lctx->get_sched();
    for (group & g : groups) {
        if (!g.mover->is_attached()) {
            std::vector<ggml_backend_t> backends;
            for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
                backends.push_back(ggml_backend_sched_get_backend(sched, i));
            }
            g.mover->attach(backends);
        }
    }
}

// Room for the host copies that these tokens do not have yet. Copies of other active tokens only save time: near the
// limit they make way. Throws with no state changed but those.
void memory::reserve_host_room(group & g, const std::vector<uint32_t> & tokens) {
    const size_t n = size_t(std::count_if(tokens.begin(), tokens.end(), [&](uint32_t i) { return g.places[i].slot < 0; }));
    if (n == 0) {
        return;
    }
    try {
        g.store->reserve(n);
    } catch (const error & e) {
        if (e.status != ASRKF_HOST_LIMIT) {
            throw;
        }
        std::vector<bool> wanted(g.places.size(), false);
        for (const uint32_t i : tokens) {
            wanted[i] = true;
        }
        for (size_t i = 0; i < g.places.size(); ++i) {
            if (g.places[i].cell >= 0 && g.places[i].slot >= 0 && !wanted[i]) {
                g.store->release(uint32_t(g.places[i].slot));
                g.places[i].slot = -1;
            }
        }
        g.store->reserve(n);
    }
}

// Give every one of these active tokens a host copy; throws with nothing changed.
void memory::copy_to_host(group & g, const std::vector<uint32_t> & tokens) {
    std::vector<uint32_t> wanted, cells, slots;
    for (const uint32_t i : tokens) {
        if (g.places[i].slot < 0) {
            wanted.push_back(i);
            cells.push_back(uint32_t(g.places[i].cell));
        }
    }
    if (wanted.empty()) {
        return;
    }
    g.store->reserve(wanted.size());
    std::vector<uint8_t *> hosts;
    for (size_t i = 0; i < wanted.size(); ++i) {
        slots.push_back(g.store->acquire());
        hosts.push_back(g.store->data(slots.back()));
    }
    try {
        g.mover->get(cells.data(), hosts.data(), cells.size());
    } catch (...) {
        for (const uint32_t slot : slots) {
            g.store->release(slot);
        }
        throw;
    }
    for (size_t i = 0; i < wanted.size(); ++i) {
        g.places[wanted[i]].slot = int32_t(slots[i]);
    }
    counters.moved_to_host_bytes += wanted.size()*g.mover->token_bytes();
    counters.moves_to_host_total++;
}

void memory::drop_cells(group & g, const std::vector<uint32_t> & tokens) {
    for (const uint32_t i : tokens) {
        const uint32_t cell = uint32_t(g.places[i].cell);
        g.cache->take_out(cell);
        g.token_of[cell]  = -1;
        g.places[i].cell = -1;
    }
    counters.freezes_total += tokens.size();
}

// The bytes of these frozen tokens into free cells, which are returned; fill_cells() then makes them active.
std::vector<uint32_t> memory::copy_to_device(group & g, const std::vector<uint32_t> & tokens) {
    const std::vector<uint32_t> cells = g.cache->free_cells(tokens.size());
    if (cells.size() < tokens.size()) {
        throw error(ASRKF_POOL_FULL, format("pool of %u cells has %zu free, %zu tokens are to be restored: freeze others first, or raise kv_pool",
                g.cache->get_size(), cells.size(), tokens.size()));
    }
    std::vector<const uint8_t *> hosts;
    for (const uint32_t i : tokens) {
        hosts.push_back(g.store->data(uint32_t(g.places[i].slot)));
    }
    g.mover->set(cells.data(), hosts.data(), cells.size());
    if (!cells.empty()) {
        counters.moved_to_device_bytes += cells.size()*g.mover->token_bytes();
        counters.moves_to_device_total++;
    }
    return cells;
}

void memory::fill_cells(group & g, const std::vector<uint32_t> & tokens, const std::vector<uint32_t> & cells) {
    for (size_t i = 0; i < tokens.size(); ++i) {
        place & p = g.places[tokens[i]];
        g.cache->put_back(cells[i], g.rule->pos(tokens[i]), exts[tokens[i]]);
        g.token_of[cells[i]] = int32_t(tokens[i]);
        p.cell = int32_t(cells[i]);
        if (!g.mover->is_staged()) { // host memory on both sides: a second copy would only cost RAM
            g.store->release(uint32_t(p.slot));
            p.slot = -1;
        }
    }
}

void memory::carry_out(group & g, const plan & p) {
    if (!p.decided) {
        return;
    }
    if (!p.freeze.empty() || !p.restore.empty()) {
        prepare_to_move();
        std::vector<uint32_t> back;
        for (const restoration & r : p.restore) {
            back.push_back(r.token);
        }
        copy_to_host(g, p.freeze);
        drop_cells(g, p.freeze);
        try {
            fill_cells(g, back, copy_to_device(g, back));
        } catch (...) { // what was frozen is safe on the host: book it, and leave the rest for the next step
            plan frozen_only = p;
            frozen_only.restore.clear();
            g.rule->commit(frozen_only);
            g.rule->recheck();
            throw;
        }
        for (const restoration & r : p.restore) {
            switch (r.why) {
                case cause::timer:    counters.restores_timer_total++;    break;
                case cause::window:   counters.restores_window_total++;   break;
                case cause::refill:   counters.restores_refill_total++;   break;
                case cause::recall:   counters.restores_recall_total++;   break;
                case cause::recovery: counters.restores_recovery_total++; break;
            }
        }
    }
    g.rule->commit(p);
    counters.decisions_total++;
}

// Where rows have to cross to another memory, a block is copied once, when it leaves the window and its bytes cannot
// change any more; freezing its tokens later moves nothing.
void memory::seal(group & g, llama_pos pos_end) {
    if (!g.mover->is_staged() || n_ctx <= g.rule->params.pool_cells) {
        return;
    }
    const uint32_t block = g.rule->params.block;
    const llama_pos window_start = pos_end - llama_pos(g.rule->params.window);
    std::vector<uint32_t> tokens;
    uint32_t end = g.n_sealed;
    for (; end + block <= n_tokens() && g.rule->pos(end + block - 1) < window_start; end += block) {
        for (uint32_t i = end; i < end + block; ++i) {
            if (g.places[i].slot < 0) {
                tokens.push_back(i);
            }
        }
    }
    if (!tokens.empty()) {
        try {
            prepare_to_move();
            copy_to_host(g, tokens);
        } catch (const error & e) {
            if (e.status != ASRKF_HOST_LIMIT) {
                throw;
            }
            return; // no room for copies ahead of time: what is frozen is copied then
        }
    }
    g.n_sealed = end;
}

//
// explicit requests
//

uint32_t memory::lower_bound(llama_pos pos) const {
    uint32_t begin = 0, end = n_tokens();
    while (begin < end) {
        const uint32_t middle = begin + (end - begin)/2;
        if (first().rule->pos(middle) < pos) {
            begin = middle + 1;
        } else {
            end = middle;
        }
    }
    return begin;
}

std::pair<uint32_t, uint32_t> memory::token_range(int32_t seq_id, int32_t p0, int32_t p1) const {
    if (seq_id != 0) {
        throw error(ASRKF_INVALID_ARGUMENT, format("sequence %d: the policy serves sequence 0 only", seq_id));
    }
    p1 = p1 < 0 ? std::numeric_limits<int32_t>::max() : p1;
    if (p0 < 0 || p0 > p1) {
        throw error(ASRKF_INVALID_ARGUMENT, format("[%d, %d) is not a range of positions", p0, p1));
    }
    return { lower_bound(p0), lower_bound(p1) };
}

uint64_t memory::freeze_range(llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) {
    const auto [begin, end] = token_range(seq_id, p0, p1);
    lctx = ctx;
    const llama_pos pos_end = seq_pos_max(0) + 1;
    for (const group & g : groups) {
        for (uint32_t i = begin; i < end; ++i) {
            if (g.rule->is_protected(i, pos_end)) {
                throw error(ASRKF_PROTECTED, format("position %d is protected (sinks %u, window from %d on, or pinned): freeze less, unpin it, or lower window",
                        g.rule->pos(i), g.rule->params.sinks, pos_end - llama_pos(g.rule->params.window)));
            }
        }
    }
    fold_scores_in();
    prepare_to_move();
    stopwatch watch(counters.moves_seconds);
    std::vector<std::vector<uint32_t>> chosen(groups.size()), copied(groups.size());
    uint64_t n = 0;
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        for (uint32_t i = begin; i < end; ++i) {
            if (groups[ig].places[i].cell >= 0) {
                chosen[ig].push_back(i);
                if (groups[ig].places[i].slot < 0) {
                    copied[ig].push_back(i);
                }
            }
        }
        n += chosen[ig].size();
    }
    try {
        for (size_t ig = 0; ig < groups.size(); ++ig) {
            reserve_host_room(groups[ig], chosen[ig]);
        }
        for (size_t ig = 0; ig < groups.size(); ++ig) {
            copy_to_host(groups[ig], chosen[ig]);
        }
    } catch (...) {
        for (size_t ig = 0; ig < groups.size(); ++ig) {
            for (const uint32_t i : copied[ig]) {
                int32_t & slot = groups[ig].places[i].slot;
                if (slot >= 0) {
                    groups[ig].store->release(uint32_t(slot));
                    slot = -1;
                }
            }
        }
        throw;
    }
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        drop_cells(groups[ig], chosen[ig]);
        for (uint32_t i = begin; i < end; ++i) {
            groups[ig].rule->set_frozen(i, true, true);
        }
    }
    return n;
}

uint64_t memory::restore_range(llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) {
    const auto [begin, end] = token_range(seq_id, p0, p1);
    lctx = ctx;
    fold_scores_in();
    prepare_to_move();
    stopwatch watch(counters.moves_seconds);
    std::vector<std::vector<uint32_t>> chosen(groups.size()), cells(groups.size());
    uint64_t n = 0;
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        for (uint32_t i = begin; i < end; ++i) {
            if (groups[ig].places[i].cell < 0) {
                chosen[ig].push_back(i);
            }
        }
        cells[ig] = copy_to_device(groups[ig], chosen[ig]);
        n += chosen[ig].size();
    }
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        fill_cells(groups[ig], chosen[ig], cells[ig]);
        for (const uint32_t i : chosen[ig]) {
            groups[ig].rule->set_frozen(i, false, false);
        }
    }
    counters.restores_request_total += n;
    return n;
}

uint32_t memory::n_pinned() const {
    ranges sorted = pinned; // they may overlap
    std::sort(sorted.begin(), sorted.end());
    uint32_t n = 0;
    int32_t  counted_to = 0;
    for (const auto & [from, to] : sorted) {
        n += uint32_t(std::max(0, to - std::max(from, counted_to)));
        counted_to = std::max(counted_to, to);
    }
    return n;
}

bool memory::is_pinned(llama_pos pos) const {
    return std::any_of(pinned.begin(), pinned.end(), [&](const auto & range) { return pos >= range.first && pos < range.second; });
}

void memory::pin_range(llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1, bool pin) {
    token_range(seq_id, p0, p1); // checks
    lctx = ctx;
    if (p1 < 0) { // to the end: of what is there to pin, of everything to unpin
        p1 = pin ? std::max(p0, seq_pos_max(0) + 1) : std::numeric_limits<int32_t>::max();
    }
    ranges before = pinned, after;
    for (const auto & [from, to] : pinned) { // what remains of the ranges outside [p0, p1)
        if (from < p0) {
            after.emplace_back(from, std::min(to, p0));
        }
        if (to > p1) {
            after.emplace_back(std::max(from, p1), to);
        }
    }
    if (pin && p1 > p0) {
        after.emplace_back(p0, p1);
    }
    pinned = after;
    try {
        for (const group & g : groups) {
            if (pin) {
                check_pool(g, n_ubatch, n_pinned());
            }
        }
    } catch (...) {
        pinned = before;
        throw;
    }
    for (group & g : groups) {
        for (uint32_t i = lower_bound(p0); i < lower_bound(p1); ++i) {
            g.rule->set_pinned(i, pin);
        }
    }
}

//
// sequence operations: frozen tokens are part of the sequence
//

void memory::forget(uint32_t begin, uint32_t end) {
    scores_pending = false; // they belong to rows that may change hands
    output_pending = false;
    if (rings) {
        rings->forget_from(first().rule->pos(begin)); // queries of what goes, or of what would have seen it
    }
    for (group & g : groups) {
        for (uint32_t i = begin; i < end; ++i) {
            const place & p = g.places[i];
            if (p.cell >= 0) {
                g.cache->take_out(uint32_t(p.cell));
                g.token_of[size_t(p.cell)] = -1;
            }
            if (p.slot >= 0) {
                g.store->release(uint32_t(p.slot));
            }
        }
        g.places.erase(g.places.begin() + begin, g.places.begin() + end);
        g.rule->erase(begin, end);
        g.n_sealed = std::min(g.n_sealed, begin / g.rule->params.block * g.rule->params.block);
        for (uint32_t i = begin; i < g.places.size(); ++i) {
            if (g.places[i].cell >= 0) {
                g.token_of[size_t(g.places[i].cell)] = int32_t(i);
            }
        }
        if (g.places.empty()) { // timers and host memory of a sequence that is gone
            g.rule->clear();
            if (g.store && !keep_store) {
                g.store->clear();
            }
        }
    }
    exts.erase(exts.begin() + begin, exts.begin() + end);
    if (rows) {
        rows->erase(begin, end);
    }
}

bool memory::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;
    if (seq_id > 0 || n_tokens() == 0 || p0 > seq_pos_max(0)) { // llama-cpp-python asks before every token
        return true;
    }
    if (rewalk_begin >= 0 && p0 == rewalk_begin) {
        // llama_decode() takes a step that failed back by its positions; those of earlier calls were only computed again
        p0 = std::max(p0, call_begin);
        rewalk_begin = -1;
    }
    const uint32_t begin = lower_bound(p0), end = lower_bound(p1);
    if (begin < end) {
        forget(begin, end);
    }
    return true;
}

void memory::seq_keep(llama_seq_id seq_id) {
    if (seq_id != 0) {
        seq_rm(-1, -1, -1);
    }
}

// These return nothing, so the next decode says it; clear() takes it back. Never a cache that is silently wrong.
void memory::seq_cp(llama_seq_id src, llama_seq_id dst, llama_pos, llama_pos) {
    if (src != dst) {
        refuse(fault = "a sequence was copied: the policy serves one sequence; pass -np 1, or use kv_policy=\"full\"");
    }
}

void memory::seq_add(llama_seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    if (shift != 0 && p0 != p1) {
        refuse(fault = "positions were shifted (context shift), which the policy does not serve yet: turn context shift off, or use kv_policy=\"full\"");
    }
}

void memory::seq_div(llama_seq_id, llama_pos p0, llama_pos p1, int d) {
    if (d != 1 && p0 != p1) {
        refuse(fault = "positions were divided (self-extend), which the policy does not serve: use kv_policy=\"full\"");
    }
}

void memory::clear(bool data) {
    if (n_tokens() > 0) {
        forget(0, n_tokens());
    }
    for (group & g : groups) {
        g.cache->clear(data);
        g.rule->clear();
    }
    if (rings) {
        rings->forget_from(0);
    }
    trigger.clear();
    output_pending    = false;
    next_occasion     = occasion::step;
    reset_pos         = -1;
    counters          = {};
    budget.peak_bytes = budget.used_bytes;
    fault.clear();
}

std::map<ggml_backend_buffer_type_t, size_t> memory::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> sum;
    for (const group & g : groups) {
        for (const auto & [buft, size] : g.cache->memory_breakdown()) {
            sum[buft] += size;
        }
    }
    if (scorer) {
        for (const auto & [buft, size] : scorer->breakdown()) {
            sum[buft] += size;
        }
    }
    return sum;
}

//
// state: the whole sequence in upstream's own format, wherever its rows are. What is not in it: scores, timers and what
// was frozen; a loaded sequence begins anew with those.
//

void memory::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    check_state(seq_id, flags);
    const uint32_t n_stream = 1, n = seq_id <= 0 ? n_tokens() : 0;
    io.write(&n_stream, sizeof(n_stream));
    io.write(&n, sizeof(n));
    if (n == 0) {
        return;
    }
    for (uint32_t i = 0; i < n; ++i) {
        const llama_pos    pos = first().rule->pos(i);
        const uint32_t     n_seq_id = 1;
        const llama_seq_id id = 0;
        io.write(&pos, sizeof(pos));
        io.write(&n_seq_id, sizeof(n_seq_id));
        io.write(&id, sizeof(id));
    }
    const uint32_t v_trans = 0, n_layer = uint32_t(row_parts().size() / 2);
    io.write(&v_trans, sizeof(v_trans));
    io.write(&n_layer, sizeof(n_layer));
    for (const row_part & part : row_parts()) {
        const int32_t  type = int32_t(part.tensor->type);
        const uint64_t row_bytes = part.row_bytes;
        io.write(&type, sizeof(type));
        io.write(&row_bytes, sizeof(row_bytes));
        for (uint32_t i = 0; i < n; ) {
            const place & p = part.g->places[i];
            if (p.cell < 0) {
                io.write(part.g->store->data(uint32_t(p.slot)) + part.offset, row_bytes);
                i++;
                continue;
            }
            uint32_t run = 1; // cells beside each other go together
            while (i + run < n && part.g->places[i + run].cell == p.cell + int32_t(run)) {
                run++;
            }
            io.write_tensor(part.tensor, size_t(p.cell)*row_bytes, run*row_bytes);
            i += run;
        }
    }
}

// Everything is read to the host first; only then is the old sequence given up.
void memory::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    std::vector<std::vector<uint32_t>> slots(groups.size());
    try {
        check_state(seq_id, flags);
        const auto corrupt = [](const char * what) { throw error(ASRKF_INVALID_ARGUMENT, format("the state does not fit this context: %s", what)); };
        uint32_t n_stream, n;
        io.read(&n_stream, sizeof(n_stream));
        io.read(&n, sizeof(n));
        if (n_stream != 1) {
            corrupt("it is of several streams");
        }
        if (n > n_ctx) {
            throw error(ASRKF_POOL_FULL, format("the state has %u tokens, n_ctx is %u: raise n_ctx", n, n_ctx));
        }
        std::vector<std::pair<llama_pos, uint32_t>> order; // tokens come in the order of cells
        for (uint32_t i = 0; i < n; ++i) {
            llama_pos pos;
            uint32_t n_seq_id;
            io.read(&pos, sizeof(pos));
            io.read(&n_seq_id, sizeof(n_seq_id));
            if (n_seq_id != 1 || pos < 0) {
                corrupt("a cell belongs to several sequences or has no position");
            }
            llama_seq_id id;
            io.read(&id, sizeof(id));
            if (seq_id < 0 && id != 0) {
                corrupt("it holds a sequence other than 0");
            }
            order.emplace_back(pos, i);
        }
        std::sort(order.begin(), order.end());
        for (uint32_t i = 1; i < n; ++i) {
            if (order[i].first == order[i - 1].first) {
                corrupt("two cells have the same position");
            }
        }
        if (n > 0) {
            uint32_t v_trans, n_layer;
            io.read(&v_trans, sizeof(v_trans));
            io.read(&n_layer, sizeof(n_layer));
            if (v_trans != 0 || n_layer != row_parts().size() / 2) {
                corrupt(v_trans ? "its V is transposed (flash attention was off)" : "it has another number of layers");
            }
            for (size_t ig = 0; ig < groups.size(); ++ig) {
                groups[ig].store->reserve(n);
                for (uint32_t i = 0; i < n; ++i) {
                    slots[ig].push_back(groups[ig].store->acquire());
                }
            }
            for (const row_part & part : row_parts()) {
                int32_t  type;
                uint64_t row_bytes;
                io.read(&type, sizeof(type));
                io.read(&row_bytes, sizeof(row_bytes));
                if (type != int32_t(part.tensor->type) || row_bytes != part.row_bytes) {
                    corrupt("its cache type or row size is another one");
                }
                for (uint32_t i = 0; i < n; ++i) {
                    io.read(part.g->store->data(slots[size_t(part.g - groups.data())][i]) + part.offset, row_bytes);
                }
            }
        }

        // from here on nothing fails
        if (n_tokens() > 0) {
            for (group & g : groups) { // forget() gives the arenas of an empty store back: not now
                for (place & p : g.places) {
                    if (p.slot >= 0) {
                        g.store->release(uint32_t(p.slot));
                        p.slot = -1;
                    }
                }
            }
            keep_store = true;
            forget(0, n_tokens());
            keep_store = false;
        }
        next_occasion = occasion::step;
        reset_pos     = -1;
        trigger.clear();
        for (const auto & [pos, from] : order) {
            exts.emplace_back();
            exts.back().tok = LLAMA_TOKEN_NULL; // a state does not say
            if (rows) {
                rows->append();
            }
            for (size_t ig = 0; ig < groups.size(); ++ig) {
                group & g = groups[ig];
                g.places.push_back({ -1, int32_t(slots[ig][from]) });
                g.rule->append(pos);
                g.rule->set_pinned(g.rule->n_tokens() - 1, is_pinned(pos));
                g.rule->set_frozen(g.rule->n_tokens() - 1, true, false);
            }
        }
        slots.clear();
        index_from_host();
        for (group & g : groups) {
            g.rule->recheck(); // the next step brings back what the pool holds
        }
    } catch (const std::exception & e) {
        for (size_t ig = 0; ig < slots.size(); ++ig) {
            for (const uint32_t slot : slots[ig]) {
                groups[ig].store->release(slot);
            }
        }
        refuse(e);
        throw;
    }
}

void memory::check_state(llama_seq_id seq_id, llama_state_seq_flags flags) const {
    std::string text;
    if (seq_id > 0) {
        text = format("sequence %d: the policy serves sequence 0 only", seq_id);
    } else if (flags != 0) {
        text = "the policy serves whole states only (no LLAMA_STATE_SEQ_FLAGS)";
    } else if (no_alloc) {
        text = "a context without memory has no state";
    }
    if (!text.empty()) {
        set_last_error(text, ASRKF_UNSUPPORTED);
        unsupported(text);
    }
}

// K of all layers, then V of all layers: upstream's order, over all groups.
std::vector<memory::row_part> memory::row_parts() const {
    std::vector<row_part> k, v;
    for (uint32_t il = 0; il < group_of_layer.size(); ++il) {
        const group & g = groups[group_of_layer[il]];
        size_t offset = 0;
        for (ggml_tensor * tensor : g.cache->row_tensors()) {
            const size_t row_bytes = ggml_row_size(tensor->type, tensor->ne[0]);
            if (tensor == g.cache->k_of(il)) {
                k.push_back({ &g, tensor, row_bytes, offset });
            } else if (tensor == g.cache->v_of(il)) {
                v.push_back({ &g, tensor, row_bytes, offset });
            }
            offset += row_bytes;
        }
    }
    k.insert(k.end(), v.begin(), v.end());
    return k;
}

// A loaded state brings K rows that no graph of ours has seen: write them into the index here.
void memory::index_from_host() {
    if (!scorer) {
        return;
    }
    const ggml_type type = index_type();
    const auto parts = row_parts();
    for (size_t s = 0; s < scorer->layers().size(); ++s) {
        const ggml_tensor * k = groups[group_of_layer[scoring_layers[s]]].cache->k_of(scoring_layers[s]);
        const row_part & part = *std::find_if(parts.begin(), parts.end(), [&](const row_part & p) { return p.tensor == k; });
        std::vector<uint8_t> indexed(ggml_row_size(type, k->ne[0]));
        std::vector<float>   values(size_t(k->ne[0])), sum(size_t(k->ne[0]), 0);
        for (uint32_t i = 0; i < n_tokens(); ++i) {
            const uint8_t * stored = part.g->store->data(uint32_t(part.g->places[i].slot)) + part.offset;
            if (k->type == GGML_TYPE_F32) {
                std::memcpy(values.data(), stored, part.row_bytes);
            } else {
                ggml_get_type_traits(k->type)->to_float(stored, values.data(), k->ne[0]);
            }
            const uint32_t row = (*rows)[i];
            for (size_t d = 0; d < sum.size(); ++d) {
                sum[d] += values[d] / float(rows->tokens_of(row));
            }
            if (i + 1 == n_tokens() || (*rows)[i + 1] != row) {
                ggml_quantize_chunk(type, sum.data(), indexed.data(), 0, 1, k->ne[0], nullptr);
                scorer->set_row(s, row, indexed.data());
                std::fill(sum.begin(), sum.end(), 0.0f);
            }
        }
    }
}

//
// what can be seen
//

void memory::refuse(const std::string & text, asrkf_status status) {
    set_last_error(text, status);
    LLAMA_LOG_ERROR("asrkf: %s\n", text.c_str());
}

void memory::refuse(const std::exception & e) {
    const auto * known = dynamic_cast<const error *>(&e);
    refuse(e.what(), known ? known->status : ASRKF_INTERNAL);
}

asrkf_stats memory::get_stats(llama_context * ctx) const {
    asrkf_stats s = counters;
    s.struct_size        = sizeof(s);
    s.policy             = config.policy;
    s.n_groups           = uint32_t(groups.size());
    s.pool_cells         = mean_cells([](const group & g) { return g.rule->params.pool_cells; });
    s.active_cells       = mean_cells([](const group & g) { return g.rule->n_active(); });
    s.frozen_cells       = n_tokens() - s.active_cells;
    s.tokens             = n_tokens();
    s.device_index_bytes = scorer ? scorer->device_bytes() : 0;
    s.outputs_total      = trigger.count();
    s.entropy            = float(trigger.last());
    s.entropy_mean       = float(trigger.mean());
    s.entropy_deviation  = float(trigger.deviation());
    s.host_kv_bytes      = budget.used_bytes;
    s.host_kv_peak_bytes = budget.peak_bytes;
    for (const group & g : groups) {
        s.device_kv_bytes      += g.cache->device_bytes();
        s.device_staging_bytes += g.mover ? g.mover->staging_bytes() : 0;
        s.restores_redundant_total += g.rule->n_redundant();
    }
    for (const auto & [buft, data] : ctx->memory_breakdown()) {
        s.device_compute_bytes += data.context > 0 ? data.compute : 0;
    }
    return s;
}

asrkf_group_stats memory::get_group_stats(uint32_t index) const {
    if (index >= groups.size()) {
        throw error(ASRKF_INVALID_ARGUMENT, format("group %u: there are %zu", index, groups.size()));
    }
    const group & g = groups[index];
    asrkf_group_stats s = {};
    s.struct_size         = sizeof(s);
    s.n_layers            = uint32_t(g.layers.size());
    s.pool_cells          = g.rule->params.pool_cells;
    s.window              = g.rule->params.window;
    s.max_ubatch          = g.rule->max_ubatch();
    s.active_cells        = g.cache->cells().get_used();
    s.active_copied_cells = uint32_t(std::count_if(g.places.begin(), g.places.end(), [](const place & p) { return p.cell >= 0 && p.slot >= 0; }));
    s.frozen_cells        = uint32_t(std::count_if(g.places.begin(), g.places.end(), [](const place & p) { return p.cell < 0 && p.slot >= 0; }));
    s.token_bytes         = g.mover ? g.mover->token_bytes() : 0;
    s.device_kv_bytes     = g.cache->device_bytes();
    return s;
}

size_t memory::get_tokens(uint32_t index, int32_t * out_pos, uint8_t * out_state, size_t capacity) const {
    if (index >= groups.size()) {
        throw error(ASRKF_INVALID_ARGUMENT, format("group %u: there are %zu", index, groups.size()));
    }
    const group & g = groups[index];
    for (size_t i = 0; i < std::min<size_t>(capacity, n_tokens()); ++i) {
        if (out_pos) {
            out_pos[i] = g.rule->pos(uint32_t(i));
        }
        if (out_state) {
            out_state[i] = g.places[i].cell < 0 ? ASRKF_TOKEN_FROZEN : g.places[i].slot < 0 ? ASRKF_TOKEN_ACTIVE : ASRKF_TOKEN_ACTIVE_COPIED;
        }
    }
    return n_tokens();
}

void memory::get_rows(llama_context * ctx, uint32_t index, int32_t pos, uint8_t * out, size_t size) {
    if (index >= groups.size()) {
        throw error(ASRKF_INVALID_ARGUMENT, format("group %u: there are %zu", index, groups.size()));
    }
    group & g = groups[index];
    const uint32_t i = lower_bound(pos);
    if (i == n_tokens() || g.rule->pos(i) != pos) {
        throw error(ASRKF_INVALID_ARGUMENT, format("the sequence has no position %d", pos));
    }
    if (size != g.mover->token_bytes()) {
        throw error(ASRKF_INVALID_ARGUMENT, format("size is %zu, a token has %zu bytes in group %u", size, g.mover->token_bytes(), index));
    }
    lctx = ctx;
    prepare_to_move();
    if (g.places[i].cell < 0) {
        std::memcpy(out, g.store->data(uint32_t(g.places[i].slot)), size);
        return;
    }
    const uint32_t cell = uint32_t(g.places[i].cell);
    g.mover->get(&cell, &out, 1);
}

} // namespace

std::string model_fingerprint(const llama_model * model) { return fingerprint(*model); }

engine * engine_of(llama_context * ctx) { return dynamic_cast<memory *>(llama_get_memory(ctx)); }

asrkf_stats upstream_stats(llama_context * ctx) {
    asrkf_stats s = {};
    s.struct_size = sizeof(s);
    s.policy      = ASRKF_POLICY_FULL;
    s.n_groups    = 1;
    s.pool_cells  = llama_n_ctx(ctx);
    if (llama_memory_t mem = llama_get_memory(ctx)) {
        const llama_pos pos_max = mem->seq_pos_max(0);
        s.tokens       = pos_max < 0 ? 0 : uint64_t(pos_max - mem->seq_pos_min(0) + 1);
        s.active_cells = uint32_t(s.tokens);
    }
    for (const auto & [buft, data] : ctx->memory_breakdown()) {
        s.device_kv_bytes      += data.context;
        s.device_compute_bytes += data.context > 0 ? data.compute : 0;
    }
    return s;
}

void set_next_config(const asrkf_config * config) {
    if (config) {
        next_config = *config;
    } else {
        next_config.reset();
    }
}

void set_last_error(const std::string & text, asrkf_status status) {
    last_error  = text;
    last_status = status;
}
const char * get_last_error() { return last_error.c_str(); }
asrkf_status get_last_status() { return last_status; }

} // namespace asrkf
