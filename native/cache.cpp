// The llama_memory_i that freezes: groups of layers, each with its own cells, pool, policies and host store, behind one
// attention input (patches/README.md). This is the only file that includes llama.cpp's own headers.
//
// A token's K and V rows are a record; sequences that share a prefix share its records. A record's bytes are in a cell, in
// a slot of the host store, or both, and that is all that exists once: whether a token is active is a matter of each
// sequence, and stands in the cell's own set of sequences. A frozen token's record always has a slot.
//
// A step (ubatch) is placed when it is applied, not when its batch is split: programs use batches of 2048 tokens on
// pools of that size. Placing a step is: fold the last scores in, decide, move, find slots. What can fail comes before the
// books are changed, or leaves them as far as it came, so a token is always in exactly one state.
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
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
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

    // Cells are numbered over all streams: tensors hold one stream's cells after the other's.
    uint32_t n_cells() const { return get_size()*n_stream; }
    uint32_t n_used() const {
        uint32_t n = 0;
        for (const auto & cells : v_cells) {
            n += cells.get_used();
        }
        return n;
    }
    uint32_t first_cell_of(uint32_t seq) const { return seq_to_stream[seq]*get_size(); }
    uint32_t cell_at(const slot_info & slot, uint32_t i) const { return slot.strm[i / slot.size()]*get_size() + slot.idxs[i / slot.size()][i % slot.size()]; }

    bool     is_active(uint32_t cell, uint32_t seq) const { return v_cells[cell / get_size()].seq_has(cell % get_size(), llama_seq_id(seq)); }
    uint32_t n_active(uint32_t cell) const { return uint32_t(v_cells[cell / get_size()].seq_count(cell % get_size())); }

    // Out of a sequence's attention; true if no other has it active, so that the cell is free.
    bool take_out(uint32_t cell, uint32_t seq) {
        const uint32_t stream = cell / get_size(), i = cell % get_size();
        if (!v_cells[stream].seq_rm(i, llama_seq_id(seq))) {
            return false;
        }
        v_heads[stream] = std::min(v_heads[stream], i); // the lowest free cell is used first: attention costs up to the highest
        return true;
    }

    void put_in(uint32_t cell, llama_pos pos, llama_token token) {
        llama_kv_cell_ext ext;
        ext.tok = token;
        v_cells[cell / get_size()].pos_set(cell % get_size(), pos);
        v_cells[cell / get_size()].ext_set(cell % get_size(), ext);
    }
    void activate(uint32_t cell, uint32_t seq) { v_cells[cell / get_size()].seq_add(cell % get_size(), llama_seq_id(seq)); }

    void move_to(uint32_t cell, llama_pos pos) { // the row has been rotated already: see rotate()
        auto & cells = v_cells[cell / get_size()];
        const uint32_t i = cell % get_size();
        const auto sequences = cells.seq_get_all(i);
        const auto ext = cells.ext_get(i);
        cells.rm(i);
        cells.pos_set(i, pos);
        cells.ext_set(i, ext);
        for (uint32_t seq = 0; seq < sequences.size(); ++seq) {
            if (sequences.test(seq)) {
                cells.seq_add(i, llama_seq_id(seq));
            }
        }
    }

    // n free cells where this sequence may have them, or fewer.
    std::vector<uint32_t> free_cells(size_t n, uint32_t seq) const {
        std::vector<uint32_t> result;
        const uint32_t first = first_cell_of(seq);
        const auto & cells = v_cells[seq_to_stream[seq]];
        for (uint32_t i = 0; i < cells.size() && result.size() < n; ++i) {
            if (cells.is_empty(i)) {
                result.push_back(first + i);
            }
        }
        return result;
    }

    // find_slot(), but never a cell that is taken: with a sliding window that one gives away what is masked.
    slot_info find_free(const llama_ubatch & ubatch) const {
        if (swa_type == LLAMA_SWA_TYPE_NONE) {
            return find_slot(ubatch, false);
        }
        const uint32_t n_seqs = n_stream > 1 ? ubatch.n_seqs_unq : 1, n = ubatch.n_tokens / n_seqs;
        slot_info slot = { LLAMA_MAX_SEQ, 0, {}, {} };
        for (uint32_t i = 0; i < n_seqs; ++i) {
            const uint32_t seq = uint32_t(ubatch.seq_id_unq[i]), stream = seq_to_stream[seq];
            slot.s0 = std::min(slot.s0, stream);
            slot.s1 = std::max(slot.s1, stream);
            slot.strm.push_back(llama_seq_id(stream));
            slot.idxs.emplace_back();
            for (const uint32_t cell : free_cells(n, seq)) {
                slot.idxs.back().push_back(cell % get_size());
            }
            if (slot.idxs.back().size() < n) {
                return {};
            }
        }
        return slot;
    }

    void rotate(const llama_cparams & cparams, ggml_backend_t cpu, uint32_t il, std::vector<uint8_t> & rows, const std::vector<int32_t> & shifts) const;
};

// Where a record is in one group. On the device: cell >= 0. With a host copy: slot >= 0. Never neither.
struct place {
    int32_t cell = -1;
    int32_t slot = -1;
};

struct group {
    std::vector<uint32_t>        layers;
    uint32_t                     pool_cells = 0;  // all sequences together
    std::unique_ptr<group_cache> cache;
    std::vector<policy>          rules;           // by sequence
    std::unique_ptr<row_mover>   mover;           // null in a context without memory (no_alloc)
    std::unique_ptr<host_store>  store;
    std::vector<place>           places;          // by record
    std::vector<uint32_t>        n_sealed;        // by sequence: tokens in sealed blocks (staged moves only)
};

// A token's K and V rows, in all groups. No bytes: where those are, each group knows.
struct record {
    llama_pos                 pos   = -1;
    llama_token               token = LLAMA_TOKEN_NULL; // null: it came as an embedding, or from a state that does not say
    llama_kv_cells::seq_set_t users;                    // the sequences that have it, active or frozen
};

// Positions of ranges that may overlap, each once.
uint32_t count_positions(ranges sorted) {
    std::sort(sorted.begin(), sorted.end());
    uint32_t n = 0;
    int32_t  counted_to = 0;
    for (const auto & [from, to] : sorted) {
        n += uint32_t(std::max(0, to - std::max(from, counted_to)));
        counted_to = std::max(counted_to, to);
    }
    return n;
}

bool contains(const ranges & set, llama_pos pos) {
    return std::any_of(set.begin(), set.end(), [&](const auto & range) { return pos >= range.first && pos < range.second; });
}

struct sequence {
    sequence(const asrkf_config & config, uint32_t id, const ranges & pinned)
        : rings(config.score_queries, id*(config.score_queries + PROMPT_END_QUERIES)),
          trigger(recovery_kind(config.recovery), trigger_kind(config.trigger), config.trigger_share, 2*config.interval, config.seed), pinned(pinned) {}

    uint32_t n_tokens() const { return uint32_t(records.size()); }

    std::vector<uint32_t> records;                      // by token, in order of position
    query_rings           rings;
    recovery_trigger      trigger;
    ranges                pinned;
    int32_t               output        = 0;            // the last call's last output, counted from the end: -1, -2, ...; 0: none
    occasion              next_occasion = occasion::step;
    occasion              reset         = occasion::step; // the last one that was not a step's, and where it came:
    llama_pos             reset_pos     = -1;           // who goes back behind it, no further than a rewalk, gets the same again
    llama_pos             call_begin    = -1;           // first position of the current call
    std::string           fault;                        // why the next decode must fail, until it is emptied
};

// What a step brings one sequence.
struct part {
    uint32_t              seq;
    std::vector<uint32_t> tokens; // of the ubatch
    llama_pos             pos_end;
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

    memory &              mem;
    branch_shape          shape;      // of this step's side branch
    std::vector<uint32_t> records;    // of its tokens
    std::vector<int32_t>  queries;    // which tokens' queries are kept, and where
    std::vector<int64_t>  query_rows;
    std::vector<uint32_t> scored;     // the sequences whose queries score
    const bool            is_worst_case;

private:
    const bool rewalks;
    const bool has_output; // one whose entropy counts
    std::vector<std::unique_ptr<group_context>> others;
};

// The same for a model with sliding windows, whose graph asks for two caches: the layers that see everything are group 0,
// those with a window the last one.
class windowed_context final : public llama_kv_cache_iswa_context {
public:
    explicit windowed_context(std::unique_ptr<memory_context> context)
        : llama_kv_cache_iswa_context(LLAMA_MEMORY_STATUS_SUCCESS), whole(std::move(context)) {}

    bool next() override { return whole->next(); }
    bool apply() override { return whole->apply(); }
    llama_memory_status  get_status() const override { return whole->get_status(); }
    const llama_ubatch & get_ubatch() const override { return whole->get_ubatch(); }
    void on_computed(llama_context & lctx, const llm_graph_result & res) override { whole->on_computed(lctx, res); }
    const llama_kv_cache_context * get_base() const override { return whole->get_group(0); }
    const llama_kv_cache_context * get_swa()  const override { return whole->get_group(whole->n_groups() - 1); }

    const std::unique_ptr<memory_context> whole;
};

const memory_context & whole_of(const llama_memory_context_i * mctx) {
    const auto * windowed = dynamic_cast<const windowed_context *>(mctx);
    return windowed ? *windowed->whole : static_cast<const memory_context &>(*mctx);
}

// The relevance branch of one graph.
class side_input final : public llm_graph_input_i {
public:
    side_input(const memory_context * mctx, relevance::branch branch) : mctx(mctx), branch(std::move(branch)) {}
    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override {
        mctx = &whole_of(params.mctx);
        return mctx->shape == branch.shape;
    }

    const memory_context * mctx;
    relevance::branch      branch;
};

class memory final : public llama_memory_i, public engine {
public:
    memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams, const asrkf_config & config);

    // llama_memory_i
    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override { return wrapped(std::make_unique<memory_context>(*this)); }
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override { return first().cache->get_can_shift(); }

    void clear(bool data) override;
    bool seq_rm  (llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    void seq_add (llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override { return has_tokens(seq_id) ? records[sequences[size_t(seq_id)].records.front()].pos : -1; }
    llama_pos seq_pos_max(llama_seq_id seq_id) const override { return has_tokens(seq_id) ? records[sequences[size_t(seq_id)].records.back()].pos : -1; }

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id, llama_state_seq_flags flags) override;

    // engine
    uint64_t freeze_range (llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) override;
    uint64_t restore_range(llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) override;
    void     pin_range    (llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1, bool pinned) override;
    asrkf_config      get_config() const override;
    asrkf_stats       get_stats(llama_context * ctx) const override;
    asrkf_group_stats get_group_stats(uint32_t index) const override;
    size_t get_tokens(int32_t seq_id, uint32_t index, int32_t * out_pos, uint8_t * out_state, size_t capacity) const override;
    void   get_rows(llama_context * ctx, int32_t seq_id, uint32_t index, int32_t pos, uint8_t * out, size_t size) override;
    void     set_trace(asrkf_step * buffer, size_t capacity) override { trace = buffer; trace_capacity = capacity; trace_count = 0; }
    uint64_t get_trace_count() const override { return trace_count; }

    void set_prompt_follows(bool follows) override { prompt_follows = follows; }
    void set_host_limit(uint64_t limit_bytes) override;

    // of the contexts
    bool place_step(memory_context & mctx, const llama_ubatch & ubatch);
    bool place_rewalk(memory_context & mctx, const llama_ubatch & ubatch);
    void build_side_branch(const memory_context & mctx, llm_graph_result & res, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k_cur, float kq_scale, int32_t il);
    void set_side_input(const memory_context & mctx, const relevance::branch & branch);
    void read_scores(llama_context & lctx, const memory_context & mctx);
    branch_shape worst_shape(uint32_t n_tokens) const;
    void step_computed(bool output);

    const asrkf_config         config;
    const uint32_t             n_seq_max;
    std::vector<group>         groups;
    std::vector<uint32_t>      group_of_layer;
    std::unique_ptr<relevance> scorer;             // null if the policy asks for no scores

private:
    const group & first() const { return groups[0]; }
    // A figure of the groups as the mean over the layers that the policy serves, rounded up: bytes, as if all had the same cells.
    template <typename Cells> uint32_t mean_cells(Cells cells) const {
        uint64_t sum = 0, n = 0;
        for (const group & g : groups) {
            if (!is_window_of_layers(g)) {
                sum += uint64_t(cells(g))*g.layers.size();
                n   += g.layers.size();
            }
        }
        return uint32_t((sum + n - 1) / n);
    }
    llama_memory_context_ptr wrapped(std::unique_ptr<memory_context> context) const {
        return is_windowed ? llama_memory_context_ptr(std::make_unique<windowed_context>(std::move(context))) : std::move(context);
    }
    bool     has_tokens(llama_seq_id seq_id) const { return seq_id >= 0 && uint32_t(seq_id) < n_seq_max && sequences[size_t(seq_id)].n_tokens() > 0; }
    uint32_t n_records() const { return uint32_t(records.size() - free_records.size()); }
    uint32_t lower_bound(const sequence & s, llama_pos pos) const;
    sequence & named(int32_t seq_id);
    const sequence & named(int32_t seq_id) const { return const_cast<memory *>(this)->named(seq_id); }
    std::pair<uint32_t, uint32_t> token_range(int32_t seq_id, int32_t p0, int32_t p1) const;
    uint32_t id_of(const sequence & s) const { return uint32_t(&s - sequences.data()); }
    std::vector<llama_pos> positions_of(const sequence & s) const;

    bool     is_window_of_layers(const group & g) const { return is_windowed && &g == &groups.back(); }
    void     add_windowed_group(const std::vector<uint32_t> & layers);
    uint32_t floor_cells(const group & g) const { return g.pool_cells / n_seq_max; } // a sequence's share when all are there
    void     share_pools(const std::vector<uint32_t> & n_new, uint32_t n_batch_tokens);
    void     check_pool(const group & g, uint32_t n_ubatch, uint32_t pinned_tokens) const;
    void     make_groups(const std::vector<layer_budget> & layers);
    ggml_type index_type() const;
    uint32_t  index_tokens_per_row() const;
    uint32_t  n_index_rows() const;
    uint32_t  n_ring_rows() const { return n_seq_max*(config.score_queries + PROMPT_END_QUERIES); }
    std::vector<uint32_t>      choose_scoring_layers(const std::vector<layer_budget> & layers, const std::vector<uint32_t> & measured) const;
    std::vector<scoring_layer> make_scoring_layers(bool offload) const;
    std::optional<llama_ubatch> rewalk_of(const std::vector<llama_ubatch> & ubatches) const;
    void     read_entropy();
    void     check_host_limit(uint32_t n_new) const;
    std::vector<part> parts_of(const llama_ubatch & ubatch) const;

    struct demand { uint32_t seq; uint32_t n_new; llama_pos pos_end; occasion why; }; // room for n_new tokens before pos_end
    void synchronize();
    void prepare_to_move();
    void decide_and_move(const std::vector<demand> & demands);
    uint64_t n_restores() const;
    void record_step(asrkf_step step);
    void fold_scores_in();
    void prepare_side(memory_context & mctx, const std::vector<part> & parts, const std::vector<uint32_t> & scored, bool prompt_end);
    void reserve_host_room(group & g, const std::vector<uint32_t> & ids);
    void copy_to_host(group & g, const std::vector<uint32_t> & ids);
    void carry_out(group & g, const std::vector<demand> & demands, const std::vector<plan> & plans);
    void freeze_tokens(group & g, uint32_t seq, const std::vector<uint32_t> & tokens);
    using wanted_tokens = std::vector<std::pair<uint32_t, std::vector<uint32_t>>>; // of each sequence
    struct fetched { std::vector<uint32_t> ids, cells; };
    fetched fetch(group & g, const wanted_tokens & wanted);
    void make_active(group & g, const wanted_tokens & wanted, const fetched & got);
    void drop_needless_copy(group & g, uint32_t id);
    void seal(group & g, uint32_t seq, llama_pos pos_end);

    uint32_t new_record(llama_pos pos, llama_token token, const std::vector<uint32_t> & users);
    uint32_t insert_token(sequence & s, uint32_t id);
    void     free_record(uint32_t id);
    void     forget(sequence & s, uint32_t begin, uint32_t end);
    std::vector<uint32_t> clone_records(const std::vector<uint32_t> & ids);
    uint32_t take_record();
    void     shift_positions(llama_seq_id seq_id, llama_pos p0, llama_pos p1, const char * what, const std::function<llama_pos(llama_pos)> & moved);
    void     rotate_rows(group & g, const std::vector<uint32_t> & ids, const std::vector<int32_t> & shifts);

    struct row_part { size_t ig; ggml_tensor * tensor; size_t row_bytes; size_t offset; }; // offset within a token's bytes
    std::vector<row_part> row_parts() const;
    void read_part(const row_part & part, uint32_t id, uint8_t * out) const;
    void check_state(llama_seq_id seq_id, llama_state_seq_flags flags) const;
    void write_policies(llama_io_write_i & io, llama_seq_id seq_id) const;
    struct saved_sequence { uint32_t id; ranges pinned; std::vector<std::vector<uint8_t>> rules; };
    std::vector<saved_sequence> read_policies(llama_io_read_i & io) const;
    const std::string & model_name() const;
    void index_records(const std::vector<uint32_t> & ids);
    void refuse(const std::string & text, asrkf_status status = ASRKF_UNSUPPORTED);
    void refuse(const std::exception & e);

    const llama_model &   model;
    const llama_cparams & cparams;                       // of the context that owns this
    const uint32_t        n_ctx;                         // all sequences together,
    const uint32_t        n_ctx_seq;                     // and each
    const uint32_t        n_ubatch;
    const bool            unified;                       // all sequences in one set of cells; else each has its own (streams)
    const bool            no_alloc;
    const bool            is_windowed;                   // the last group is that of the layers with a sliding window

    llama_context *       lctx = nullptr;                // learnt at the first update, which every decode begins with
    std::vector<record>   records;
    std::vector<uint32_t> free_records;                  // the last is taken first
    std::vector<sequence> sequences;
    std::vector<uint32_t> in_flight;                     // records of a step that was placed and not computed yet

    // scores
    std::unique_ptr<index_rows> rows;                    // null without a scorer
    side_input *              side           = nullptr;  // of the graph that is being built
    const relevance::branch * scoring_branch = nullptr;  // of the graph that runs
    std::vector<uint32_t>     scoring_layers;            // one ranking serves all groups
    ggml_backend_buffer_ptr   scores_buffer;             // means, then peaks, [n_scores] each, read back from the last scoring step:
    uint32_t                  n_scores       = 0;        // pinned where the device offers it, and never moved: it may still be written
    std::vector<uint32_t>     pending_scores;            // the sequences whose scores are there

    // calls
    bool             output_pending = false;             // the last call had an output row
    uint32_t         last_speaker   = 0;                 // the sequence whose entropy was read last
    bool             prompt_follows = false;             // the caller says that the next call continues the prompt
    llama_pos        rewalk_begin   = -1;                // first position that is being computed again
    bool             keep_store     = false;             // a state is being loaded into it
    std::string      fault;                              // why every decode must fail
    mutable std::string own_fingerprint;                 // made when a state first needs it

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
    : group_context(*this, mem.groups[0], ubatches), mem(mem), is_worst_case(false), rewalks(rewalks), has_output(has_output) {
    for (size_t i = 1; i < mem.groups.size(); ++i) {
        others.push_back(std::make_unique<group_context>(*this, mem.groups[i], ubatches));
    }
}

memory_context::memory_context(memory & mem)
    : group_context(*this, mem.groups[0]), mem(mem), is_worst_case(true), rewalks(false), has_output(false) {
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
    if (shape.n_scored > 0) {
        mem.read_scores(lctx, *this);
    }
    mem.step_computed(has_output && i_cur + 1 == ubatches.size());
}

uint32_t memory_context::group_of(int32_t il) const { return mem.group_of_layer[size_t(il)]; }

void side_input::set_input(const llama_ubatch *) { mctx->mem.set_side_input(*mctx, branch); }

// Rows [n] of layer il's K, as stored, to other positions: upstream's own K-shift (llama_kv_cache::build_graph_shift), on the
// host, since most of them may be there.
void group_cache::rotate(const llama_cparams & cparams, ggml_backend_t cpu, uint32_t il, std::vector<uint8_t> & rows, const std::vector<int32_t> & shifts) const {
    if (!hparams.has_rope(il) || hparams.rope_type == LLAMA_ROPE_TYPE_NONE) {
        return;
    }
    const ggml_tensor * k = k_of(il);
    const int64_t n = int64_t(shifts.size()), n_rot = hparams.n_rot(il), n_head_kv = hparams.n_head_kv(il);
    ggml_init_params params = { 32*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
    ggml_context_ptr holder(ggml_init(params));
    ggml_context * ctx = holder.get();
    ggml_tensor * all     = ggml_new_tensor_2d(ctx, k->type, k->ne[0], n);
    ggml_tensor * by      = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    ggml_tensor * rot     = build_input_k_rot(ctx);
    ggml_tensor * source  = model.get_rope_factors(cparams, int(il));
    ggml_tensor * factors = source ? ggml_dup_tensor(ctx, source) : nullptr;
    ggml_tensor * heads   = ggml_view_3d(ctx, all, n_rot, n_head_kv, n, ggml_row_size(k->type, hparams.n_embd_head_k(il)), all->nb[1], 0);
    ggml_cgraph * graph   = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, build_rope_shift(cparams, ctx, heads, by, rot, factors, model.get_rope_freq_base(cparams, int(il)),
            model.get_rope_freq_scale(cparams, int(il)), il));
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx, cpu));
    if (!buffer) {
        throw error(ASRKF_INTERNAL, "no host memory to rotate keys in");
    }
    ggml_backend_tensor_set(all, rows.data(), 0, rows.size());
    ggml_backend_tensor_set(by, shifts.data(), 0, ggml_nbytes(by));
    if (rot) {
        set_input_k_rot(rot);
    }
    if (source) {
        std::vector<uint8_t> bytes(ggml_nbytes(source));
        ggml_backend_tensor_get(source, bytes.data(), 0, bytes.size());
        ggml_backend_tensor_set(factors, bytes.data(), 0, bytes.size());
    }
    if (ggml_backend_graph_compute(cpu, graph) != GGML_STATUS_SUCCESS) {
        throw error(ASRKF_MOVE_FAILED, "the keys of shifted positions could not be rotated");
    }
    ggml_backend_tensor_get(all, rows.data(), 0, rows.size());
}

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
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE && hparams.swa_type != LLAMA_SWA_TYPE_STANDARD && hparams.swa_type != LLAMA_SWA_TYPE_CHUNKED) {
        unsupported(format("%s has windows that see later tokens, too; use kv_policy=\"full\"", arch.c_str()));
    }
    if (hparams.n_layer_kv_from_start >= 0) {
        unsupported(format("%s has layers that share the cache of others, which the policy does not serve yet; use kv_policy=\"full\"", arch.c_str()));
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
    : config(config), n_seq_max(cparams.n_seq_max), model(model), cparams(cparams), n_ctx(cparams.n_ctx), n_ctx_seq(cparams.n_ctx_seq), n_ubatch(cparams.n_ubatch),
      unified(cparams.kv_unified || cparams.n_seq_max == 1), no_alloc(model.hparams.no_alloc),
      is_windowed(model.hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
    for (uint32_t seq = 0; seq < n_seq_max; ++seq) {
        sequences.emplace_back(config, seq, parse_positions("pinned", config.pinned));
    }
    const auto & hparams = model.hparams;
    const uint32_t n_layer = hparams.n_layer_all;

    // layers of a draft head (NextN) are never attended by the main graph
    const bool has_draft_layers = hparams.n_layer_nextn > 0 && hparams.n_layer() > 0 && hparams.router_layer < 0;
    std::vector<uint32_t>     windowed_layers, layers;
    std::vector<layer_budget> layer_budgets;
    for (uint32_t il = 0; il < (has_draft_layers ? hparams.n_layer() : n_layer); ++il) {
        if (hparams.has_kv(il)) {
            if (hparams.n_head(il) == 0 || hparams.n_head_kv(il) == 0) {
                unsupported(format("layer %u of this %s has no attention, which the policy does not serve yet; use kv_policy=\"full\"", il, model.arch_name().c_str()));
            }
            check_cache_types(model, params, cparams, il);
            if (hparams.is_swa(il)) {
                windowed_layers.push_back(il);
                continue;
            }
            layers.push_back(il);
            layer_budgets.push_back({ il, 0, ggml_row_size(params.type_k, hparams.n_embd_k_gqa(il)) + ggml_row_size(params.type_v, hparams.n_embd_v_gqa(il)) });
        }
    }
    if (layers.empty()) {
        unsupported(windowed_layers.empty() ? "the model has no layer with a KV cache; use kv_policy=\"full\"" :
                "all layers of the model have a sliding window: its cache is bounded as it is; use kv_policy=\"full\"");
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
    // a scoring layer adds up to 150 nodes to a graph that llama_context sizes by the model's tensors, with room to spare
    const size_t n_spare = std::max<size_t>(1024, 8*model.n_tensors())/2;
    if (std::strcmp(config.score_layers, "auto") == 0) {
        scoring_layers.resize(std::min(scoring_layers.size(), n_spare/150));
    }
    group_of_layer.assign(n_layer, 0);
    make_groups(layer_budgets);
    if (is_windowed) {
        add_windowed_group(windowed_layers);
    }

    // refuse before anything is allocated
    for (const group & g : groups) {
        if (!is_window_of_layers(g)) {
            check_pool(g, n_ubatch, count_positions(sequences[0].pinned));
        }
    }

    budget.limit_bytes = config.host_limit;
    ggml_backend_buffer_type_t scores_buft = ggml_backend_cpu_buffer_type();
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        group & g = groups[ig];
        const auto filter = [&](int32_t il) { return group_of_layer[size_t(il)] == ig; };
        const bool is_window = is_window_of_layers(g);
        const std::string tag = groups.size() == 1 ? "" : "g" + std::to_string(ig) + "_";
        g.cache = std::make_unique<group_cache>(model, hparams, params.type_k, params.type_v, /*v_trans*/ false, cparams.offload_kqv,
                unified, unified ? g.pool_cells : floor_cells(g), n_seq_max, /*n_pad*/ 1, is_window ? hparams.n_swa : 0, is_window ? hparams.swa_type : LLAMA_SWA_TYPE_NONE, nullptr, filter, nullptr, nullptr, tag.c_str());

        if (!no_alloc) {
            g.mover = std::make_unique<row_mover>(g.cache->row_tensors(), moves_kind(config.moves));
            ggml_backend_dev_t dev = g.mover->is_staged() ? model.dev_layer(int(g.layers[0])) : nullptr;
            ggml_backend_buffer_type_t buft = dev ? ggml_backend_dev_host_buffer_type(dev) : nullptr;
            scores_buft = buft = buft ? buft : ggml_backend_cpu_buffer_type();
            g.store = std::make_unique<host_store>(g.mover->token_bytes(), buft, budget);
        }
        LLAMA_LOG_INFO("%s: policy %s, group %zu: %zu layers, pool of %u cells for n_ctx %u, %u sequences, window %u, steps of at most %u tokens\n", __func__,
                is_window ? "of sliding windows" : policy_name(config.policy), ig, g.layers.size(), g.pool_cells, n_ctx, n_seq_max, g.rules[0].params.window, g.rules[0].max_ubatch());
    }

    if (150*scoring_layers.size() > n_spare) {
        throw error(ASRKF_INVALID_ARGUMENT, format("score_layers=%s: %zu layers are too many for this model's graph, %zu is the most", config.score_layers,
                scoring_layers.size(), n_spare/150));
    }
    if (!scoring_layers.empty()) {
        const uint32_t tokens_per_row = index_tokens_per_row(), n_rows = n_index_rows();
        rows   = std::make_unique<index_rows>(n_rows, tokens_per_row);
        scorer = std::make_unique<relevance>(make_scoring_layers(cparams.offload_kqv), n_rows, tokens_per_row, n_ring_rows(), index_type(), score_kind(config.score),
                hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f, no_alloc);
        scores_buffer.reset(ggml_backend_buft_alloc_buffer(scores_buft, 2*n_rows*sizeof(float)));
        if (!scores_buffer) {
            throw error(ASRKF_INTERNAL, "no host memory for the scores");
        }
    }
}

uint32_t memory::index_tokens_per_row() const { return recall_kind(config.recall) == RECALL_MEAN_KEY ? RECALL_BLOCK : 1; }
uint32_t memory::n_index_rows() const { return (n_ctx + index_tokens_per_row() - 1) / index_tokens_per_row() + (index_tokens_per_row() > 1 ? n_seq_max - 1 : 0); }

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
                + n_ring_rows()*hparams.n_embd_head_k(layers[0].il)*hparams.n_head(layers[0].il)*sizeof(float) + 1024;
            const uint64_t index_bytes = scoring_layers.size()*layer_bytes, least_bytes = index_bytes + POOL_PAD_CELLS*token_bytes;
            if (config.pool_bytes < least_bytes) {
                throw error(ASRKF_INVALID_ARGUMENT, format("pool of %llu bytes holds no index of %llu bytes and %u cells of %llu: raise kv_pool to at least %llu bytes",
                    (unsigned long long) config.pool_bytes, (unsigned long long) index_bytes, POOL_PAD_CELLS, (unsigned long long) token_bytes, (unsigned long long) least_bytes));
            }
            whole.pool_bytes = config.pool_bytes - index_bytes;
        }
        const uint32_t mean_cells = resolve_pool(whole, n_ctx, token_bytes);
        // the least that check_pool() takes, with a window of half a pool
        const uint32_t least_share = 2*(config.sinks + count_positions(sequences[0].pinned) + std::min(n_ubatch, config.block) + 2*config.block) + config.window;
        const uint32_t least = n_seq_max*(unified ? least_share : std::max(least_share, POOL_PAD_CELLS));
        if (mode == "shared" || mean_cells >= n_ctx || layers.size() == 1 || is_windowed) { // the graph of a windowed model has room for one group
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
        group & g = groups[ig];
        g.layers     = plans[ig].layers;
        g.pool_cells = plans[ig].pool_cells;
        if (!unified) { // each stream's cells are a pool of their own, of whole units
            g.pool_cells = g.pool_cells / n_seq_max / POOL_PAD_CELLS * POOL_PAD_CELLS * n_seq_max;
            if (g.pool_cells == 0) {
                throw error(ASRKF_POOL_FULL, format("pool of %u cells has less than %u for each of %u sequences: raise kv_pool to at least %u, or share one pool (kv_unified, -kvu)",
                        plans[ig].pool_cells, POOL_PAD_CELLS, n_seq_max, n_seq_max*POOL_PAD_CELLS));
            }
        }
        g.rules.assign(n_seq_max, policy(make_policy_params(config, unified ? g.pool_cells : floor_cells(g))));
        g.n_sealed.assign(n_seq_max, 0);
        for (const uint32_t il : plans[ig].layers) {
            group_of_layer[il] = uint32_t(ig);
        }
    }
}

// Layers with a sliding window see their window only: they are a group that keeps it, whatever the policy. Other tokens are
// frozen there as well, so that a sequence can be cut back, shifted and saved as a whole.
void memory::add_windowed_group(const std::vector<uint32_t> & layers) {
    if (state_kind(config.state) == STATE_UPSTREAM) {
        unsupported("state=upstream: a model with sliding windows keeps two caches there, one of which forgets; use state=own");
    }
    if (groups.size() > 1) {
        unsupported(format("layers=%s: a model with sliding windows takes one group, of the layers without: layers=shared, or pool alone", config.layers));
    }
    const uint32_t n_window = model.hparams.n_swa + n_ubatch; // of a step's first token, too
    const uint32_t share    = n_window + n_ubatch + 2*config.block;
    asrkf_config own = config;
    own.policy = ASRKF_POLICY_WINDOW;
    own.score  = SCORE_RECENCY;
    own.sinks  = 0;
    own.window = n_window;
    own.timer_share = 0;
    const auto padded = [](uint32_t cells) { return (cells + POOL_PAD_CELLS - 1)/POOL_PAD_CELLS*POOL_PAD_CELLS; };
    const uint32_t all = padded(n_ctx_seq), each = groups[0].pool_cells >= n_ctx ? all : std::min(all, padded(share));
    group g;
    g.layers     = layers;
    g.pool_cells = unified ? std::min(all, n_seq_max*each) : n_seq_max*each;
    g.rules.assign(n_seq_max, policy(make_policy_params(own, unified ? g.pool_cells : floor_cells(g))));
    g.n_sealed.assign(n_seq_max, 0);
    for (const uint32_t il : layers) {
        group_of_layer[il] = uint32_t(groups.size());
    }
    groups.push_back(std::move(g));
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

// A sequence must be able to live on its floor: what it gets of the pool when all the others are there, too.
void memory::check_pool(const group & g, uint32_t n_ubatch, uint32_t pinned_tokens) const {
    const uint32_t cells = floor_cells(g);
    if ((unified ? g.pool_cells : cells) >= (unified ? n_ctx : n_ctx_seq)) {
        return; // it holds whatever there may be
    }
    const policy_params p = make_policy_params(config, cells);
    const uint64_t required = policy::required_cells(p, n_ubatch, pinned_tokens);
    if (required > cells) {
        // an automatic window is half of the share, so the rest has to fit into the other half
        const uint64_t least = n_seq_max*(config.window ? required : 2*(required - p.window)), unit = unified ? POOL_PAD_CELLS : n_seq_max*POOL_PAD_CELLS;
        const std::string whose = n_seq_max == 1 ? "" : format(", of which each of %u sequences must get %u,", n_seq_max, cells);
        throw error(ASRKF_POOL_FULL, format("pool of %u cells%s cannot hold sinks %u + window %u + pinned %u + batch %u + two blocks of %u: raise kv_pool to at least %llu or lower %s",
                g.pool_cells, whose.c_str(), p.sinks, p.window, pinned_tokens, std::min(n_ubatch, p.block), p.block, (unsigned long long) ((least + unit - 1) / unit * unit),
                n_seq_max > 1 ? "the number of sequences (-np)" : config.window ? "window" : "the pinned ranges"));
    }
}

// What each live sequence may have of each pool while a batch is computed that brings n_new tokens to each. Demands go in
// units, so that shares change now and then, not with every token.
void memory::share_pools(const std::vector<uint32_t> & n_new, uint32_t n_batch_tokens) {
    std::vector<uint32_t> live, demands;
    for (const sequence & s : sequences) {
        const uint32_t n = s.n_tokens() + n_new[id_of(s)];
        if (n > 0) {
            live.push_back(id_of(s));
            demands.push_back((n + config.interval + POOL_PAD_CELLS - 1) / POOL_PAD_CELLS * POOL_PAD_CELLS);
        }
    }
    for (group & g : groups) {
        if (!unified) {
            continue; // each has its own cells
        }
        // records that are shared count once: where all fits, nobody has to give anything up
        const bool fits = n_records() + n_batch_tokens <= g.pool_cells;
        const std::vector<uint32_t> shares = fits ? std::vector<uint32_t>(live.size(), g.pool_cells) : fair_shares(g.pool_cells, demands);
        for (size_t i = 0; i < live.size(); ++i) {
            g.rules[live[i]].resize(shares[i]);
        }
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
        const llama_batch & batch = balloc.get_batch();
        std::vector<uint32_t> n_new(n_seq_max, 0);
        for (int32_t i = 0; i < batch.n_tokens; ++i) {
            for (int32_t j = 0; j < batch.n_seq_id[i]; ++j) {
                if (const std::string & why = named(batch.seq_id[i][j]).fault; !why.empty()) {
                    unsupported(why);
                }
                n_new[size_t(batch.seq_id[i][j])]++;
            }
        }
        if (n_records() + balloc.get_n_tokens() > n_ctx) {
            throw error(ASRKF_POOL_FULL, format("context is full: %u tokens and %u new ones do not fit into n_ctx %u", n_records(), balloc.get_n_tokens(), n_ctx));
        }
        for (const sequence & s : sequences) {
            if (s.n_tokens() + n_new[id_of(s)] > n_ctx_seq) {
                throw error(ASRKF_POOL_FULL, format("context is full: %u tokens of sequence %u and %u new ones do not fit into its %u", s.n_tokens(), id_of(s), n_new[id_of(s)], n_ctx_seq));
            }
        }
        check_host_limit(balloc.get_n_tokens());
        read_entropy();
        share_pools(n_new, balloc.get_n_tokens());
        uint32_t n_step = n_ubatch_max;
        for (const group & g : groups) {
            for (const sequence & s : sequences) {
                const uint32_t most = g.rules[id_of(s)].max_ubatch();
                if (n_new[id_of(s)] > most) {
                    n_step = std::min(n_step, most);
                }
            }
        }

        balloc.split_reset();
        std::vector<llama_ubatch> ubatches;
        const auto split = [&] { return unified ? balloc.split_simple(n_step) : balloc.split_equal(n_step, true, 0); };
        for (llama_ubatch ubatch = split(); ubatch.n_tokens > 0; ubatch = split()) {
            ubatches.push_back(std::move(ubatch));
        }
        if (ubatches.empty() || balloc.get_n_used() < balloc.get_n_tokens()) {
            throw error(ASRKF_INVALID_ARGUMENT, "the batch could not be split: tokens that belong to several sequences need one pool for all (kv_unified, -kvu)");
        }
        for (sequence & s : sequences) {
            s.call_begin = -1;
            s.output     = 0;
        }
        int32_t n_outputs = int32_t(balloc.get_n_outputs());
        for (int32_t i = 0; i < batch.n_tokens; ++i) {
            sequence & s = sequences[size_t(batch.seq_id[i][0])];
            s.call_begin = s.call_begin < 0 ? batch.pos[i] : std::min(s.call_begin, batch.pos[i]);
            if (batch.logits[i]) {
                s.output = -n_outputs--;
            }
        }
        const bool has_output = balloc.get_n_outputs() > 0 && !prompt_follows; // in the middle of a prompt there is one only by habit
        std::optional<llama_ubatch> again = prompt_follows ? std::nullopt : rewalk_of(ubatches);
        if (again) { // the outputs are those of the second time
            ubatches.back().output[ubatches.back().n_tokens - 1] = 0;
            ubatches.push_back(std::move(*again));
        }
        return wrapped(std::make_unique<memory_context>(*this, std::move(ubatches), again.has_value(), has_output));
    } catch (const std::exception & e) {
        refuse(e);
        return std::make_unique<llama_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }
}

// What a ubatch brings each of its sequences.
std::vector<part> memory::parts_of(const llama_ubatch & ubatch) const {
    std::vector<part> parts;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
            const uint32_t seq = uint32_t(ubatch.seq_id[i][j]);
            auto found = std::find_if(parts.begin(), parts.end(), [&](const part & p) { return p.seq == seq; });
            if (found == parts.end()) {
                parts.push_back({ seq, {}, seq_pos_max(llama_seq_id(seq)) + 1 });
                found = parts.end() - 1;
            }
            found->tokens.push_back(i);
            found->pos_end = std::max(found->pos_end, ubatch.pos[i] + 1);
        }
    }
    return parts;
}

// The end of a prompt that will not fit its pool: its last tokens once more, as a step of their own, to be computed when
// the blocks that they ask for are back. Such an end is several tokens of one sequence with one output, the last.
std::optional<llama_ubatch> memory::rewalk_of(const std::vector<llama_ubatch> & ubatches) const {
    const llama_seq_id seq_id = ubatches[0].seq_id[0][0];
    const sequence & s = sequences[size_t(seq_id)];
    uint32_t n_new = 0, n_outputs = 0, least_pool = n_ctx, least_window = n_ctx, n = config.rewalk_tokens;
    for (const llama_ubatch & u : ubatches) {
        for (uint32_t i = 0; i < u.n_tokens; ++i) {
            if (!u.token || u.n_seq_id[i] != 1 || u.seq_id[i][0] != seq_id) {
                return std::nullopt;
            }
        }
        n_new += u.n_tokens;
        n_outputs += uint32_t(std::count_if(u.output, u.output + u.n_tokens, [](int8_t o) { return o != 0; }));
    }
    for (const group & g : groups) {
        const policy & rule = g.rules[size_t(seq_id)];
        least_pool   = is_window_of_layers(g) ? least_pool : std::min(least_pool, rule.params.pool_cells);
        least_window = std::min(least_window, rule.params.window);
        n = std::min({ n, rule.params.window, rule.max_ubatch(), n_ubatch });
    }
    const llama_ubatch & last = ubatches.back();
    if (!scorer || !first().rules[0].params.recall || n_new < 2 || n_outputs != 1 || !last.output[last.n_tokens - 1] || s.n_tokens() + n_new <= least_pool) {
        return std::nullopt;
    }
    if (cparams.embeddings_nextn || std::count(cparams.embeddings_layer_inp.begin(), cparams.embeddings_layer_inp.end(), true)) {
        return std::nullopt; // a draft model reads every token's hidden state, once
    }
    // the newest tokens, back to one that may not be computed again: a record that is shared, that came as an embedding, or
    // from a state that does not hold its token; and no further than the window, which is sure to be in the pool
    std::vector<std::pair<llama_pos, llama_token>> tokens;
    for (auto u = ubatches.rbegin(); u != ubatches.rend(); ++u) {
        for (uint32_t i = u->n_tokens; i-- > 0; ) {
            tokens.emplace_back(u->pos[i], u->token[i]);
        }
    }
    for (uint32_t i = s.n_tokens(); i-- > 0 && tokens.size() < n; ) {
        const record & r = records[s.records[i]];
        if (r.users.count() != 1 || r.token == LLAMA_TOKEN_NULL) {
            break;
        }
        tokens.emplace_back(r.pos, r.token);
    }
    n = std::min(n, uint32_t(tokens.size()));
    while (n > 0 && tokens[n - 1].first <= tokens[0].first - llama_pos(least_window)) {
        n--; // positions may have holes
    }
    if (n < 2) {
        return std::nullopt;
    }
    auto data = std::make_shared<llama_ubatch::data_t>();
    for (uint32_t i = n; i-- > 0; ) {
        data->pos.push_back(tokens[i].first);
        data->token.push_back(tokens[i].second);
    }
    data->n_seq_id.assign(n, 1);
    data->seq_id_data.assign(n, seq_id);
    for (uint32_t i = 0; i < n; ++i) {
        data->seq_id.push_back(&data->seq_id_data[i]);
    }
    data->seq_id_unq = { seq_id };
    data->seq_idx.assign(LLAMA_MAX_SEQ, -1);
    data->seq_idx[size_t(seq_id)] = 0;
    data->output.assign(n, 0);
    data->output[n - 1] = 1;
    data->batch_idxs.assign(n, -1);
    return llama_ubatch { 0, n, 1, n, 1, 1, data->token.data(), nullptr, data->pos.data(), data->n_seq_id.data(), data->seq_id.data(), data->seq_id_unq.data(),
        data->seq_idx.data(), data->output.data(), data };
}

// The entropy of each sequence's last output in the last call, which the caller has had by now, and what it calls for.
void memory::read_entropy() {
    if (!std::exchange(output_pending, false) || (config.recovery == RECOVERY_OFF && !trace)) {
        return;
    }
    stopwatch watch(counters.policy_seconds);
    synchronize();
    for (sequence & s : sequences) {
        const float * logits = s.output < 0 && s.n_tokens() > 0 ? lctx->get_logits_ith(s.output) : nullptr;
        if (!logits) {
            continue;
        }
        last_speaker = id_of(s);
        switch (s.trigger.observe(entropy_of(logits, size_t(model.vocab.n_tokens())), records[s.records.back()].token)) {
            case RECOVERY_SOFT:   counters.recoveries_soft_total++;   s.next_occasion = occasion::soft_reset;   break;
            case RECOVERY_WINDOW: counters.recoveries_window_total++; s.next_occasion = occasion::window_reset; break;
            case RECOVERY_FULL:   counters.recoveries_full_total++;   s.next_occasion = occasion::full_reset;   break;
            default:              break;
        }
    }
}

void memory::step_computed(bool output) {
    rewalk_begin   = -1;
    output_pending = output;
    in_flight.clear();
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
        const uint64_t total = uint64_t(n_records()) + n_new;
        needed_bytes += (total > g.pool_cells ? total - g.pool_cells : 0)*g.mover->token_bytes();
    }
    if (needed_bytes > budget.limit_bytes) {
        throw error(ASRKF_HOST_LIMIT, format("host_limit of %llu bytes cannot hold what must be frozen for %u more tokens (at least %llu bytes): "
                "raise host_limit, raise kv_pool, or remove tokens", (unsigned long long) budget.limit_bytes, n_new, (unsigned long long) needed_bytes));
    }
}

// Room for what the step brings, in every group, and in the shares of those that have more than theirs.
void memory::decide_and_move(const std::vector<demand> & wanted) {
    fold_scores_in();
    std::vector<demand> demands = wanted;
    for (const sequence & s : sequences) {
        const uint32_t seq = id_of(s);
        const bool in_step = std::any_of(wanted.begin(), wanted.end(), [&](const demand & d) { return d.seq == seq; });
        if (!in_step && std::any_of(groups.begin(), groups.end(), [&](const group & g) { return g.rules[seq].n_active() > g.rules[seq].params.pool_cells; })) {
            demands.push_back({ seq, 0, seq_pos_max(llama_seq_id(seq)) + 1, occasion::step });
        }
    }
    std::vector<std::vector<plan>> plans(groups.size());
    for (const bool frugal : { false, true }) {
        {
            stopwatch watch(counters.policy_seconds);
            for (size_t ig = 0; ig < groups.size(); ++ig) {
                plans[ig].clear();
                for (const demand & d : demands) {
                    plans[ig].push_back(groups[ig].rules[d.seq].decide(d.n_new, d.pos_end - int32_t(d.n_new), d.why, frugal));
                }
            }
        }
        try {
            for (size_t ig = 0; ig < groups.size(); ++ig) { // all host room first: only then does anything change
                std::vector<uint32_t> ids;
                for (size_t i = 0; i < demands.size(); ++i) {
                    for (const uint32_t t : plans[ig][i].freeze) {
                        ids.push_back(sequences[demands[i].seq].records[t]);
                    }
                }
                reserve_host_room(groups[ig], ids);
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
        carry_out(groups[ig], demands, plans[ig]);
        for (const demand & d : demands) {
            seal(groups[ig], d.seq, d.pos_end);
        }
    }
}

uint64_t memory::n_restores() const {
    return counters.restores_timer_total + counters.restores_window_total + counters.restores_refill_total + counters.restores_recall_total + counters.restores_recovery_total;
}

bool memory::place_step(memory_context & mctx, const llama_ubatch & ubatch) {
    try {
        const uint32_t n = ubatch.n_tokens;
        const uint64_t freezes = counters.freezes_total, restores = n_restores();
        const double policy_before = counters.policy_seconds, moves_before = counters.moves_seconds;

        const std::vector<part> parts = parts_of(ubatch);
        std::vector<demand> demands;
        for (const part & p : parts) {
            sequence & s = sequences[p.seq];
            const uint32_t  n_new   = uint32_t(p.tokens.size());
            const llama_pos pos_new = p.pos_end - llama_pos(n_new);
            occasion why = s.next_occasion;
            if (why == occasion::step && pos_new < s.reset_pos && pos_new >= s.reset_pos - llama_pos(config.rewalk_tokens)) {
                why = s.reset;
            }
            demands.push_back({ p.seq, n_new, p.pos_end, why });
        }
        decide_and_move(demands);
        for (const demand & d : demands) {
            sequences[d.seq].next_occasion = occasion::step;
            if (d.why != occasion::step) {
                sequences[d.seq].reset     = d.why;
                sequences[d.seq].reset_pos = d.pos_end - llama_pos(d.n_new);
            }
        }

        std::vector<llama_kv_cache::slot_info> slots;
        for (const group & g : groups) {
            slots.push_back(g.cache->find_free(ubatch));
            if (slots.back().empty()) {
                throw error(ASRKF_INTERNAL, format("no %u free cells after a decision (%u of %u used)", n, g.cache->n_used(), g.cache->n_cells()));
            }
        }

        // as many sequences as queries fit: the others are still due at the next step
        const bool prompt_end = mctx.is_before_rewalk();
        const size_t n_most = std::max<size_t>(1, PROMPT_END_QUERIES / config.score_queries);
        std::vector<uint32_t> scored;
        for (const part & p : parts) {
            const bool due = prompt_end || std::any_of(groups.begin(), groups.end(), [&](const group & g) { return g.rules[p.seq].scores_due(uint32_t(p.tokens.size())); });
            if (scorer && due && scored.size() < n_most) {
                scored.push_back(p.seq);
            }
        }

        mctx.records.clear();
        for (uint32_t i = 0; i < n; ++i) {
            const std::vector<uint32_t> users(ubatch.seq_id[i], ubatch.seq_id[i] + ubatch.n_seq_id[i]);
            mctx.records.push_back(new_record(ubatch.pos[i], ubatch.token ? ubatch.token[i] : LLAMA_TOKEN_NULL, users));
        }
        in_flight = mctx.records;
        for (uint32_t ig = 0; ig < groups.size(); ++ig) {
            group & g = groups[ig];
            g.cache->apply_ubatch(slots[ig], ubatch);
            for (uint32_t i = 0; i < n; ++i) {
                g.places[mctx.records[i]] = { int32_t(g.cache->cell_at(slots[ig], i)), -1 };
            }
            for (const part & p : parts) {
                g.rules[p.seq].advance(uint32_t(p.tokens.size()), std::find(scored.begin(), scored.end(), p.seq) != scored.end());
            }
            mctx.at(ig).set_slot(std::move(slots[ig]));
        }
        prepare_side(mctx, parts, scored, prompt_end);

        counters.scoring_steps_total += !scored.empty();
        record_step({ 0, ubatch.pos[0], n, 0, 0, uint32_t(counters.freezes_total - freezes), uint32_t(n_restores() - restores), !scored.empty(), uint32_t(demands[0].why),
            mctx.is_first_step() ? float(sequences[parts[0].seq].trigger.last()) : 0, float(counters.policy_seconds - policy_before), float(counters.moves_seconds - moves_before) });
        counters.steps_total++;
        return true;
    } catch (const std::exception & e) {
        refuse(e);
        return false;
    }
}

void memory::record_step(asrkf_step step) {
    if (trace) {
        step.index        = counters.steps_total;
        step.active_cells = mean_cells([](const group & g) { return g.cache->n_used(); });
        step.frozen_cells = n_records() - std::min(n_records(), step.active_cells);
        trace[trace_count++ % trace_capacity] = step;
    }
}

// The last tokens again, in the cells that they have: their rows are overwritten, no token is added.
bool memory::place_rewalk(memory_context & mctx, const llama_ubatch & ubatch) {
    try {
        sequence & s = sequences[size_t(ubatch.seq_id[0][0])];
        const uint32_t seq = id_of(s), n = ubatch.n_tokens, begin = s.n_tokens() - n;
        rewalk_begin = ubatch.pos[0]; // from here on a failure takes back this call's tokens only: see seq_rm()
        const uint64_t freezes = counters.freezes_total, restores = n_restores();
        const double policy_before = counters.policy_seconds, moves_before = counters.moves_seconds;
        decide_and_move({ { seq, 0, seq_pos_max(llama_seq_id(seq)) + 1, occasion::prompt_end } });
        mctx.records.assign(s.records.begin() + begin, s.records.end());
        for (uint32_t ig = 0; ig < groups.size(); ++ig) {
            group & g = groups[ig];
            const uint32_t stream = g.cache->first_cell_of(seq) / g.cache->get_size();
            llama_kv_cache::slot_info slot = { stream, stream, { llama_seq_id(stream) }, { {} } };
            for (const uint32_t id : mctx.records) {
                if (g.places[id].cell < 0) {
                    throw error(ASRKF_INTERNAL, format("position %d of the window is not in the pool", records[id].pos));
                }
            }
            for (const uint32_t id : mctx.records) {
                place & p = g.places[id];
                slot.idxs[0].push_back(uint32_t(p.cell) % g.cache->get_size());
                if (p.slot >= 0) {
                    g.store->release(uint32_t(p.slot));
                    p.slot = -1;
                }
            }
            g.n_sealed[seq] = std::min(g.n_sealed[seq], begin / config.block * config.block);
            mctx.at(ig).set_slot(std::move(slot));
        }
        part again = { seq, {}, 0 };
        for (uint32_t i = 0; i < n; ++i) {
            again.tokens.push_back(i);
        }
        prepare_side(mctx, { again }, {}, false);
        counters.rewalks_total++;
        counters.rewalked_tokens_total += n;
        record_step({ 0, ubatch.pos[0], n, 0, 0, uint32_t(counters.freezes_total - freezes), uint32_t(n_restores() - restores), 0, uint32_t(occasion::prompt_end), 0,
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

// The side branch of a step whose tokens are in the books by now: where it writes their K rows and queries, and whose
// queries score.
void memory::prepare_side(memory_context & mctx, const std::vector<part> & parts, const std::vector<uint32_t> & scored, bool prompt_end) {
    mctx.shape  = {};
    mctx.scored = scored;
    if (!scorer) {
        return;
    }
    mctx.queries.clear();
    mctx.query_rows.clear();
    mctx.shape.n_tokens = uint32_t(mctx.records.size());
    for (const part & p : parts) {
        std::vector<llama_pos> step_pos;
        for (const uint32_t i : p.tokens) {
            step_pos.push_back(records[mctx.records[i]].pos);
        }
        std::vector<int32_t> kept;
        sequences[p.seq].rings.keep(step_pos, kept, mctx.query_rows);
        for (const int32_t i : kept) {
            mctx.queries.push_back(int32_t(p.tokens[size_t(i)]));
        }
    }
    mctx.shape.n_written = mctx.shape.n_tokens;
    if (index_tokens_per_row() > 1) { // as many as a sequence's tokens can fill, or more where there are several
        std::vector<uint32_t> written;
        for (const uint32_t id : mctx.records) {
            written.push_back((*rows)[id]);
        }
        std::sort(written.begin(), written.end());
        const uint32_t n_distinct = uint32_t(std::unique(written.begin(), written.end()) - written.begin());
        mctx.shape.n_written = std::min(std::max(n_distinct, scorer->n_written(mctx.shape.n_tokens)), worst_shape(mctx.shape.n_tokens).n_written);
    }
    mctx.shape.n_kept = uint32_t(mctx.queries.size());
    if (!scored.empty()) {
        mctx.shape.prompt_end = prompt_end;
        mctx.shape.n_scored   = std::min(scorer->rows(), (rows->n_used() + POOL_PAD_CELLS - 1) / POOL_PAD_CELLS * POOL_PAD_CELLS);
        mctx.shape.n_scoring  = prompt_end ? PROMPT_END_QUERIES : uint32_t(scored.size())*config.score_queries;
        mctx.shape.several    = scored.size() > 1;
    }
}

// What compute buffers are reserved for.
branch_shape memory::worst_shape(uint32_t n_tokens) const {
    const bool     ends   = config.rewalk_tokens >= 2 && first().rules[0].params.recall;
    const uint32_t n_seqs = std::min(n_seq_max, std::max(1u, PROMPT_END_QUERIES / config.score_queries)), n_scoring = n_seqs*config.score_queries;
    branch_shape shape;
    shape.n_tokens   = n_tokens;
    shape.n_written  = index_tokens_per_row() == 1 ? n_tokens : scorer->n_written(n_tokens) + 2*(std::min(n_tokens, n_seq_max) - 1);
    shape.n_kept     = std::min(n_tokens, n_seq_max)*query_rings::n_kept(n_tokens, config.score_queries);
    shape.n_scored   = scorer->rows();
    shape.prompt_end = ends && n_scoring < PROMPT_END_QUERIES;
    shape.n_scoring  = shape.prompt_end ? PROMPT_END_QUERIES : n_scoring;
    shape.several    = n_seqs > 1 && !shape.prompt_end;
    return shape;
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
        const branch_shape shape = mctx.is_worst_case ? worst_shape(uint32_t(k_cur->ne[2])) : mctx.shape;
        side = static_cast<side_input *>(res.add_input(std::make_unique<side_input>(&mctx, scorer->new_branch(res.get_ctx(), shape))));
    }
    scorer->build(res.get_ctx(), gf, side->branch, size_t(found - layers.begin()), q, k_cur, kq_scale);
}

void memory::set_side_input(const memory_context & mctx, const relevance::branch & branch) {
    scorer->set_written(branch, *rows, mctx.records);
    ggml_backend_tensor_set(branch.queries, mctx.queries.data(), 0, ggml_nbytes(branch.queries));
    ggml_backend_tensor_set(branch.query_rows, mctx.query_rows.data(), 0, ggml_nbytes(branch.query_rows));
    if (branch.scoring) {
        std::vector<std::vector<llama_pos>> positions;
        for (const uint32_t seq : mctx.scored) {
            positions.push_back(positions_of(sequences[seq]));
        }
        std::vector<int32_t>       scoring;
        std::vector<scoring_query> queries;
        for (size_t i = 0; i < mctx.scored.size(); ++i) {
            const sequence & s = sequences[mctx.scored[i]];
            const std::vector<int32_t> own = s.rings.scoring_rows(branch.shape.prompt_end);
            scoring.insert(scoring.end(), own.begin(), own.end());
            for (const int32_t pos : s.rings.positions(branch.shape.prompt_end)) {
                queries.push_back({ pos, &s.records, &positions[i] });
            }
        }
        ggml_backend_tensor_set(branch.scoring, scoring.data(), 0, ggml_nbytes(branch.scoring));
        scorer->set_mask(branch, *rows, queries);
    }
    scoring_branch = &branch;
}

void memory::read_scores(llama_context & ctx, const memory_context & mctx) {
    stopwatch watch(counters.scoring_seconds);
    ggml_backend_sched_t sched = ctx.get_sched();
    auto * out = static_cast<float *>(ggml_backend_buffer_get_base(scores_buffer.get()));
    n_scores = mctx.shape.n_scored;
    for (ggml_tensor * scores : { scoring_branch->mean, scoring_branch->peak }) {
        ggml_backend_tensor_get_async(ggml_backend_sched_get_tensor_backend(sched, scores), scores, out, 0, n_scores*sizeof(float));
        out += n_scores;
    }
    pending_scores = mctx.scored;
}

// The scores arrive with the logits of their step; by the next one the caller has usually waited for those. They are
// averaged over the queries of all sequences that scored, and a row has those of its own. (A row that sequences share has
// what they all want of it.)
void memory::fold_scores_in() {
    if (pending_scores.empty()) {
        return;
    }
    stopwatch watch(counters.scoring_seconds);
    synchronize();
    const auto * means = static_cast<const float *>(ggml_backend_buffer_get_base(scores_buffer.get()));
    const float * peaks = means + n_scores;
    const float n_scored = float(pending_scores.size());
    for (const uint32_t seq : pending_scores) {
        const sequence & s = sequences[seq];
        for (group & g : groups) {
            const float keep = g.rules[seq].average_weight();
            for (uint32_t i = 0; i < s.n_tokens() && g.rules[seq].params.wants_scores(); ++i) {
                const uint32_t row = (*rows)[s.records[i]];
                if (row < n_scores) { // a token of this very call may be newer
                    const float share = n_scored / float(rows->tokens_of(row));
                    g.rules[seq].observe(i, means[row]*share, peaks[row]*share, keep);
                }
            }
        }
    }
    pending_scores.clear();
}

//
// moves
//

// Not llama_synchronize(): that one counts tokens. CUDA's set and get use another stream than compute.
void memory::synchronize() { ggml_backend_sched_synchronize(lctx->get_sched()); }

// Moves run on the backends that compute the graphs, but not through their scheduler.
void memory::prepare_to_move() {
    if (!lctx) {
        return; // nothing has been computed, so nothing is on a device
    }
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

// Room for the host copies that these records do not have yet. Copies of records that no sequence has frozen only save
// time: near the limit they make way. Throws with no state changed but those.
void memory::reserve_host_room(group & g, const std::vector<uint32_t> & ids) {
    if (ids.empty()) {
        return;
    }
    std::vector<bool> wanted(records.size(), false);
    size_t n = 0;
    for (const uint32_t id : ids) {
        n += !wanted[id] && g.places[id].slot < 0;
        wanted[id] = true;
    }
    if (n == 0) {
        return;
    }
    try {
        g.store->reserve(n);
    } catch (const error & e) {
        if (e.status != ASRKF_HOST_LIMIT) {
            throw;
        }
        for (uint32_t id = 0; id < records.size(); ++id) {
            place & p = g.places[id];
            if (!wanted[id] && p.cell >= 0 && p.slot >= 0 && g.cache->n_active(uint32_t(p.cell)) == records[id].users.count()) {
                g.store->release(uint32_t(p.slot));
                p.slot = -1;
            }
        }
        g.store->reserve(n);
    }
}

// Give every one of these records a host copy; throws with nothing changed.
void memory::copy_to_host(group & g, const std::vector<uint32_t> & ids) {
    std::vector<uint32_t> wanted, cells, slots;
    std::vector<bool> taken(records.size(), false);
    for (const uint32_t id : ids) {
        if (g.places[id].slot < 0 && !taken[id]) {
            taken[id] = true;
            wanted.push_back(id);
            cells.push_back(uint32_t(g.places[id].cell));
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

// Host memory on both sides: a copy of what every sequence has active would only cost RAM.
void memory::drop_needless_copy(group & g, uint32_t id) {
    place & p = g.places[id];
    if (!g.mover->is_staged() && p.slot >= 0 && p.cell >= 0 && g.cache->n_active(uint32_t(p.cell)) == records[id].users.count()) {
        g.store->release(uint32_t(p.slot));
        p.slot = -1;
    }
}

// Out of one sequence's attention; the records have host copies.
void memory::freeze_tokens(group & g, uint32_t seq, const std::vector<uint32_t> & tokens) {
    for (const uint32_t t : tokens) {
        place & p = g.places[sequences[seq].records[t]];
        if (g.cache->take_out(uint32_t(p.cell), seq)) {
            p.cell = -1;
        }
    }
    counters.freezes_total += tokens.size();
}

// Bytes of frozen tokens into free cells, where no other sequence has their records active; make_active() completes it.
// Throws with nothing changed but free cells' bytes.
memory::fetched memory::fetch(group & g, const wanted_tokens & wanted) {
    fetched result;
    std::vector<bool> taken(records.size(), false);
    for (const auto & [seq, tokens] : wanted) {
        const size_t before = result.ids.size();
        for (const uint32_t t : tokens) {
            const uint32_t id = sequences[seq].records[t];
            if (g.places[id].cell < 0 && !taken[id]) {
                taken[id] = true;
                result.ids.push_back(id);
            }
        }
        const size_t n_new = result.ids.size() - before, n = unified ? result.ids.size() : n_new; // those given before are still free
        const std::vector<uint32_t> found = g.cache->free_cells(n, seq);
        if (found.size() < n) {
            throw error(ASRKF_POOL_FULL, format("pool of %u cells has %zu free, %zu tokens are to be restored: freeze others first, or raise kv_pool",
                    unified ? g.pool_cells : floor_cells(g), found.size(), n));
        }
        result.cells.insert(result.cells.end(), found.end() - std::ptrdiff_t(n_new), found.end());
    }
    if (!result.ids.empty()) {
        std::vector<const uint8_t *> hosts;
        for (const uint32_t id : result.ids) {
            hosts.push_back(g.store->data(uint32_t(g.places[id].slot)));
        }
        g.mover->set(result.cells.data(), hosts.data(), hosts.size());
        counters.moved_to_device_bytes += hosts.size()*g.mover->token_bytes();
        counters.moves_to_device_total++;
    }
    return result;
}

void memory::make_active(group & g, const wanted_tokens & wanted, const fetched & got) {
    for (size_t i = 0; i < got.ids.size(); ++i) {
        g.cache->put_in(got.cells[i], records[got.ids[i]].pos, records[got.ids[i]].token);
        g.places[got.ids[i]].cell = int32_t(got.cells[i]);
    }
    for (const auto & [seq, tokens] : wanted) {
        for (const uint32_t t : tokens) {
            const uint32_t id = sequences[seq].records[t];
            g.cache->activate(uint32_t(g.places[id].cell), seq);
            drop_needless_copy(g, id);
        }
    }
}

void memory::carry_out(group & g, const std::vector<demand> & demands, const std::vector<plan> & plans) {
    std::vector<uint32_t> leaving;
    wanted_tokens back;
    for (size_t i = 0; i < plans.size(); ++i) {
        back.push_back({ demands[i].seq, {} });
        for (const uint32_t t : plans[i].freeze) {
            leaving.push_back(sequences[demands[i].seq].records[t]);
        }
        for (const restoration & r : plans[i].restore) {
            back.back().second.push_back(r.token);
        }
        std::sort(back.back().second.begin(), back.back().second.end()); // in an empty pool they lie as when they were written
    }
    if (!leaving.empty() || std::any_of(back.begin(), back.end(), [](const auto & b) { return !b.second.empty(); })) {
        prepare_to_move();
        copy_to_host(g, leaving);
        for (size_t i = 0; i < plans.size(); ++i) {
            freeze_tokens(g, demands[i].seq, plans[i].freeze);
        }
        try {
            make_active(g, back, fetch(g, back));
        } catch (...) { // what was frozen is safe on the host: book it, and leave the rest for the next step
            for (size_t i = 0; i < plans.size(); ++i) {
                plan frozen_only = plans[i];
                frozen_only.restore.clear();
                g.rules[demands[i].seq].commit(frozen_only);
                g.rules[demands[i].seq].recheck();
            }
            throw;
        }
    }
    for (size_t i = 0; i < plans.size(); ++i) {
        for (const restoration & r : plans[i].restore) {
            switch (r.why) {
                case cause::timer:    counters.restores_timer_total++;    break;
                case cause::window:   counters.restores_window_total++;   break;
                case cause::refill:   counters.restores_refill_total++;   break;
                case cause::recall:   counters.restores_recall_total++;   break;
                case cause::recovery: counters.restores_recovery_total++; break;
            }
        }
        g.rules[demands[i].seq].commit(plans[i]);
        counters.decisions_total += plans[i].decided;
    }
}

// Where rows have to cross to another memory, a block is copied once, when it leaves the window and its bytes cannot
// change any more; freezing its tokens later moves nothing.
void memory::seal(group & g, uint32_t seq, llama_pos pos_end) {
    const sequence & s = sequences[seq];
    if (!g.mover->is_staged() || n_ctx <= g.pool_cells) {
        return;
    }
    const llama_pos window_start = pos_end - llama_pos(g.rules[seq].params.window);
    std::vector<uint32_t> ids;
    uint32_t end = g.n_sealed[seq];
    for (; end + config.block <= s.n_tokens() && records[s.records[end + config.block - 1]].pos < window_start; end += config.block) {
        for (uint32_t i = end; i < end + config.block; ++i) {
            if (g.places[s.records[i]].slot < 0) {
                ids.push_back(s.records[i]);
            }
        }
    }
    if (!ids.empty()) {
        try {
            prepare_to_move();
            copy_to_host(g, ids);
        } catch (const error & e) {
            if (e.status != ASRKF_HOST_LIMIT) {
                throw;
            }
            return; // no room for copies ahead of time: what is frozen is copied then
        }
    }
    g.n_sealed[seq] = end;
}

//
// records and the tokens of sequences
//

uint32_t memory::take_record() {
    if (free_records.empty()) {
        free_records.push_back(uint32_t(records.size()));
        records.emplace_back();
        for (group & g : groups) {
            g.places.emplace_back();
        }
    }
    const uint32_t id = free_records.back();
    free_records.pop_back();
    return id;
}

// A token of these sequences, active in none yet. What its first sequence has before it, it follows in the index, unless
// other sequences have that.
uint32_t memory::new_record(llama_pos pos, llama_token token, const std::vector<uint32_t> & users) {
    const uint32_t id = take_record();
    records[id] = { pos, token, {} };
    for (const uint32_t seq : users) {
        records[id].users.set(seq);
    }
    if (rows) {
        const std::vector<uint32_t> & before = sequences[users[0]].records;
        rows->append(id, !before.empty() && records[before.back()].users == records[id].users ? int64_t(before.back()) : -1);
    }
    for (const uint32_t seq : users) {
        insert_token(sequences[seq], id);
    }
    return id;
}

// A record becomes the sequence's token where its position belongs. Returns which.
uint32_t memory::insert_token(sequence & s, uint32_t id) {
    const llama_pos pos = records[id].pos;
    uint32_t i = s.n_tokens();
    if (i > 0 && records[s.records.back()].pos > pos) {
        i = lower_bound(s, pos + 1);
    }
    s.records.insert(s.records.begin() + i, id);
    records[id].users.set(id_of(s));
    const bool is_pinned = contains(s.pinned, pos);
    for (group & g : groups) {
        policy & rule = g.rules[id_of(s)];
        rule.insert(i, pos);
        if (is_pinned && !is_window_of_layers(g)) {
            rule.set_pinned(i, true);
        }
        g.n_sealed[id_of(s)] = std::min(g.n_sealed[id_of(s)], i / config.block * config.block);
    }
    return i;
}

// No sequence has it any more.
void memory::free_record(uint32_t id) {
    for (group & g : groups) {
        place & p = g.places[id];
        if (p.slot >= 0) {
            g.store->release(uint32_t(p.slot));
        }
        p = {};
    }
    if (rows) {
        rows->release(id);
    }
    records[id] = {};
    free_records.push_back(id);
}

void memory::forget(sequence & s, uint32_t begin, uint32_t end) {
    const uint32_t seq = id_of(s);
    fold_scores_in(); // they belong to rows that may change hands
    s.output = 0;
    s.rings.forget_from(records[s.records[begin]].pos); // queries of what goes, or of what would have seen it
    for (uint32_t i = begin; i < end; ++i) {
        const uint32_t id = s.records[i];
        records[id].users.reset(seq);
        for (group & g : groups) {
            place & p = g.places[id];
            if (p.cell >= 0 && g.cache->is_active(uint32_t(p.cell), seq) && g.cache->take_out(uint32_t(p.cell), seq)) {
                p.cell = -1;
            }
        }
        if (records[id].users.none()) {
            free_record(id);
        } else {
            for (group & g : groups) {
                drop_needless_copy(g, id);
            }
        }
    }
    s.records.erase(s.records.begin() + begin, s.records.begin() + end);
    for (group & g : groups) {
        g.rules[seq].erase(begin, end);
        g.n_sealed[seq] = std::min(g.n_sealed[seq], begin / config.block * config.block);
        if (s.records.empty()) { // timers of a sequence that is gone, and host memory when all are
            s.next_occasion = occasion::step;
            s.reset_pos     = -1;
            s.fault.clear();
            g.rules[seq].clear();
            if (g.store && !keep_store && n_records() == 0) {
                g.store->clear();
            }
        }
    }
}

// Copies of records, for one sequence to take in: their bytes go to the host, and come back when a step wants them. Throws
// with nothing changed.
std::vector<uint32_t> memory::clone_records(const std::vector<uint32_t> & ids) {
    if (n_records() + ids.size() > n_ctx) {
        throw error(ASRKF_POOL_FULL, format("context is full: %u tokens and copies of %zu do not fit into n_ctx %u", n_records(), ids.size(), n_ctx));
    }
    prepare_to_move();
    for (group & g : groups) { // room for all, then copies of those that are on the device only
        size_t n = ids.size();
        for (const uint32_t id : ids) {
            n += g.places[id].slot < 0;
        }
        g.store->reserve(n);
    }
    for (group & g : groups) {
        copy_to_host(g, ids);
    }
    std::vector<uint32_t> copies;
    for (const uint32_t id : ids) {
        copies.push_back(take_record());
        records[copies.back()] = { records[id].pos, records[id].token, {} };
        if (rows) {
            rows->append(copies.back(), copies.size() > 1 ? int64_t(copies[copies.size() - 2]) : -1);
        }
        for (group & g : groups) {
            const uint32_t slot = g.store->acquire();
            std::memcpy(g.store->data(slot), g.store->data(uint32_t(g.places[id].slot)), g.mover->token_bytes());
            g.places[copies.back()].slot = int32_t(slot);
        }
    }
    for (group & g : groups) {
        for (const uint32_t id : ids) {
            drop_needless_copy(g, id);
        }
    }
    return copies;
}

//
// explicit requests
//

uint32_t memory::lower_bound(const sequence & s, llama_pos pos) const {
    return uint32_t(std::lower_bound(s.records.begin(), s.records.end(), pos, [&](uint32_t id, llama_pos p) { return records[id].pos < p; }) - s.records.begin());
}

std::vector<llama_pos> memory::positions_of(const sequence & s) const {
    std::vector<llama_pos> positions;
    for (const uint32_t id : s.records) {
        positions.push_back(records[id].pos);
    }
    return positions;
}

sequence & memory::named(int32_t seq_id) {
    if (seq_id < 0 || uint32_t(seq_id) >= n_seq_max) {
        throw error(ASRKF_INVALID_ARGUMENT, format("there is no sequence %d: this context has %u (n_seq_max, -np)", seq_id, n_seq_max));
    }
    return sequences[size_t(seq_id)];
}

std::pair<uint32_t, uint32_t> memory::token_range(int32_t seq_id, int32_t p0, int32_t p1) const {
    const sequence & s = named(seq_id);
    p1 = p1 < 0 ? std::numeric_limits<int32_t>::max() : p1;
    if (p0 < 0 || p0 > p1) {
        throw error(ASRKF_INVALID_ARGUMENT, format("[%d, %d) is not a range of positions", p0, p1));
    }
    return { lower_bound(s, p0), lower_bound(s, p1) };
}

uint64_t memory::freeze_range(llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) {
    const auto [begin, end] = token_range(seq_id, p0, p1);
    const sequence & s = named(seq_id);
    const uint32_t seq = uint32_t(seq_id);
    lctx = ctx;
    const llama_pos pos_end = seq_pos_max(seq_id) + 1;
    for (const group & g : groups) {
        const policy & rule = g.rules[seq];
        for (uint32_t i = begin; i < end && !is_window_of_layers(g); ++i) {
            if (rule.is_protected(i, pos_end)) {
                throw error(ASRKF_PROTECTED, format("position %d is protected (sinks %u, window from %d on, or pinned): freeze less, unpin it, or lower window",
                        rule.pos(i), rule.params.sinks, pos_end - llama_pos(rule.params.window)));
            }
        }
    }
    fold_scores_in();
    prepare_to_move();
    stopwatch watch(counters.moves_seconds);
    std::vector<std::vector<uint32_t>> chosen(groups.size()), ids(groups.size()), copied(groups.size());
    uint64_t n = 0;
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        for (uint32_t i = begin; i < end && !is_window_of_layers(groups[ig]); ++i) {
            if (!groups[ig].rules[seq].is_frozen(i)) {
                chosen[ig].push_back(i);
                ids[ig].push_back(s.records[i]);
                if (groups[ig].places[s.records[i]].slot < 0) {
                    copied[ig].push_back(s.records[i]);
                }
            }
        }
        n += chosen[ig].size();
    }
    try {
        for (size_t ig = 0; ig < groups.size(); ++ig) {
            reserve_host_room(groups[ig], ids[ig]);
        }
        for (size_t ig = 0; ig < groups.size(); ++ig) {
            copy_to_host(groups[ig], ids[ig]);
        }
    } catch (...) {
        for (size_t ig = 0; ig < groups.size(); ++ig) {
            for (const uint32_t id : copied[ig]) {
                int32_t & slot = groups[ig].places[id].slot;
                if (slot >= 0) {
                    groups[ig].store->release(uint32_t(slot));
                    slot = -1;
                }
            }
        }
        throw;
    }
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        freeze_tokens(groups[ig], seq, chosen[ig]);
        for (uint32_t i = begin; i < end && !is_window_of_layers(groups[ig]); ++i) {
            groups[ig].rules[seq].set_frozen(i, true, true);
        }
    }
    return n;
}

uint64_t memory::restore_range(llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) {
    const auto [begin, end] = token_range(seq_id, p0, p1);
    const uint32_t seq = uint32_t(seq_id);
    lctx = ctx;
    fold_scores_in();
    prepare_to_move();
    stopwatch watch(counters.moves_seconds);
    std::vector<wanted_tokens> chosen(groups.size());
    std::vector<fetched> got;
    uint64_t n = 0;
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        chosen[ig].push_back({ seq, {} });
        for (uint32_t i = begin; i < end && !is_window_of_layers(groups[ig]); ++i) {
            if (groups[ig].rules[seq].is_frozen(i)) {
                chosen[ig][0].second.push_back(i);
            }
        }
        got.push_back(fetch(groups[ig], chosen[ig]));
        n += chosen[ig][0].second.size();
    }
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        make_active(groups[ig], chosen[ig], got[ig]);
        for (const uint32_t i : chosen[ig][0].second) {
            groups[ig].rules[seq].set_frozen(i, false, false);
        }
    }
    counters.restores_request_total += n;
    return n;
}

void memory::pin_range(llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1, bool pin) {
    token_range(seq_id, p0, p1); // checks
    sequence & s = named(seq_id);
    lctx = ctx;
    if (p1 < 0) { // to the end: of what is there to pin, of everything to unpin
        p1 = pin ? std::max(p0, seq_pos_max(seq_id) + 1) : std::numeric_limits<int32_t>::max();
    }
    ranges after;
    for (const auto & [from, to] : s.pinned) { // what remains of the ranges outside [p0, p1)
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
    for (const group & g : groups) {
        if (pin && !is_window_of_layers(g)) {
            check_pool(g, n_ubatch, count_positions(after));
        }
    }
    s.pinned = after;
    for (group & g : groups) {
        for (uint32_t i = lower_bound(s, p0); i < lower_bound(s, p1) && !is_window_of_layers(g); ++i) {
            g.rules[size_t(seq_id)].set_pinned(i, pin);
        }
    }
}

//
// sequence operations: frozen tokens are part of the sequence
//

bool memory::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;
    if (!in_flight.empty()) { // a step was placed and has failed: its rows were never computed, for none of its sequences
        const std::vector<uint32_t> failed = std::move(in_flight);
        in_flight.clear();
        for (auto id = failed.rbegin(); id != failed.rend(); ++id) {
            for (sequence & s : sequences) {
                if (!records[*id].users.test(id_of(s))) {
                    continue;
                }
                const uint32_t i = uint32_t(std::find(s.records.rbegin(), s.records.rend(), *id).base() - s.records.begin()) - 1;
                forget(s, i, i + 1);
            }
        }
    }
    for (sequence & s : sequences) {
        if (seq_id >= 0 && id_of(s) != uint32_t(seq_id)) {
            continue;
        }
        if (p0 == 0 && s.n_tokens() == 0) {
            s.fault.clear();
        }
        if (p0 > seq_pos_max(llama_seq_id(id_of(s)))) { // llama-cpp-python asks before every token
            continue;
        }
        if (rewalk_begin >= 0 && p0 == rewalk_begin) {
            // llama_decode() takes a step that failed back by its positions; those of earlier calls were only computed again
            p0 = std::max(p0, s.call_begin);
            rewalk_begin = -1;
        }
        const uint32_t begin = lower_bound(s, p0), end = lower_bound(s, p1);
        if (begin < end) {
            forget(s, begin, end);
        }
    }
    return true;
}

void memory::seq_keep(llama_seq_id seq_id) {
    for (sequence & s : sequences) {
        if (id_of(s) != uint32_t(seq_id) && s.n_tokens() > 0) {
            forget(s, 0, s.n_tokens());
        }
    }
}

// The operations below return nothing, so where one fails the sequence's next decode says it, until all its tokens are
// removed. Never a cache that is silently wrong.

// In one pool the sequences share records. Streams have their own cells: there the copy is one, whole, as upstream's is.
void memory::seq_cp(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    if (src == dst) {
        return;
    }
    try {
        sequence & from = named(src);
        sequence & to   = named(dst);
        const uint32_t begin = lower_bound(from, std::max(p0, 0)), end = p1 < 0 ? from.n_tokens() : lower_bound(from, p1);
        std::vector<uint32_t> ids(from.records.begin() + begin, from.records.begin() + std::max(begin, end));
        if (!unified) {
            if (to.n_tokens() > 0) {
                forget(to, 0, to.n_tokens());
            }
            ids = clone_records(ids);
        }
        for (uint32_t i = 0; i < ids.size(); ++i) {
            if (unified && records[ids[i]].users.test(size_t(dst))) {
                continue;
            }
            const uint32_t at = insert_token(to, ids[i]);
            for (group & g : groups) {
                g.rules[size_t(dst)].copy_token(at, g.rules[size_t(src)], begin + i, !unified);
                if (unified && !g.rules[size_t(dst)].is_frozen(at)) {
                    g.cache->activate(uint32_t(g.places[ids[i]].cell), uint32_t(dst));
                }
            }
        }
        if (!unified) {
            index_records(ids);
        }
    } catch (const std::exception & e) {
        const std::string text = format("sequence %d could not be copied to %d: %s", src, dst, e.what());
        refuse(text);
        if (dst >= 0 && uint32_t(dst) < n_seq_max) { // another is refused by its number
            sequences[size_t(dst)].fault = text;
        }
    }
}

void memory::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    if (shift != 0) {
        shift_positions(seq_id, p0, p1, "shifted", [&](llama_pos pos) { return pos + shift; });
    }
}

void memory::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    if (d != 1) {
        shift_positions(seq_id, p0, p1, "divided", [&](llama_pos pos) { return pos / d; });
    }
}

// Rows are rotated at once, wherever they are. Records that other sequences have, too, are copied first: theirs stay.
void memory::shift_positions(llama_seq_id seq_id, llama_pos p0, llama_pos p1, const char * what, const std::function<llama_pos(llama_pos)> & moved) {
    try {
        sequence & s = named(seq_id);
        const uint32_t seq = id_of(s);
        if (!get_can_shift()) {
            unsupported(format("%s does not allow it", model.arch_name().c_str()));
        }
        const uint32_t begin = lower_bound(s, std::max(p0, 0));
        uint32_t end = p1 < 0 ? s.n_tokens() : lower_bound(s, p1);
        uint32_t n_gone = 0; // below 0: as upstream does
        while (begin + n_gone < end && moved(records[s.records[begin + n_gone]].pos) < 0) {
            n_gone++;
        }
        if (n_gone > 0) {
            forget(s, begin, begin + n_gone);
            end -= n_gone;
        }
        if (begin >= end) {
            return;
        }
        fold_scores_in();
        prepare_to_move();
        std::vector<uint32_t> shared, at;
        for (uint32_t i = begin; i < end; ++i) {
            if (records[s.records[i]].users.count() > 1) {
                shared.push_back(s.records[i]);
                at.push_back(i);
            }
        }
        const std::vector<uint32_t> own = shared.empty() ? shared : clone_records(shared);
        for (size_t n = 0; n < shared.size(); ++n) {
            records[shared[n]].users.reset(seq);
            records[own[n]].users.set(seq);
            s.records[at[n]] = own[n];
            for (group & g : groups) {
                place & p = g.places[shared[n]];
                if (p.cell >= 0 && g.cache->is_active(uint32_t(p.cell), seq) && g.cache->take_out(uint32_t(p.cell), seq)) {
                    p.cell = -1;
                }
                drop_needless_copy(g, shared[n]);
                g.rules[seq].set_frozen_copy(at[n]);
            }
        }
        const std::vector<uint32_t> ids(s.records.begin() + begin, s.records.begin() + end);
        std::vector<int32_t> shifts;
        for (const uint32_t id : ids) {
            shifts.push_back(moved(records[id].pos) - records[id].pos);
        }
        for (group & g : groups) {
            rotate_rows(g, ids, shifts);
        }
        for (size_t n = 0; n < ids.size(); ++n) {
            records[ids[n]].pos += shifts[n];
            for (group & g : groups) {
                g.rules[seq].move_to(begin + uint32_t(n), records[ids[n]].pos);
                if (g.places[ids[n]].cell >= 0) {
                    g.cache->move_to(uint32_t(g.places[ids[n]].cell), records[ids[n]].pos);
                }
            }
        }
        std::vector<uint32_t> order(s.n_tokens());
        for (uint32_t i = 0; i < order.size(); ++i) {
            order[i] = i;
        }
        const auto earlier = [&](uint32_t a, uint32_t b) { return records[s.records[a]].pos < records[s.records[b]].pos; };
        if (!std::is_sorted(order.begin(), order.end(), earlier)) { // moved across others
            std::stable_sort(order.begin(), order.end(), earlier);
            std::vector<uint32_t> sorted;
            for (const uint32_t i : order) {
                sorted.push_back(s.records[i]);
            }
            s.records = sorted;
            for (group & g : groups) {
                g.rules[seq].reorder(order);
            }
        }
        for (group & g : groups) {
            g.n_sealed[seq] = std::min(g.n_sealed[seq], begin / config.block * config.block);
            for (uint32_t i = 0; i < s.n_tokens() && !is_window_of_layers(g); ++i) {
                g.rules[seq].set_pinned(i, contains(s.pinned, records[s.records[i]].pos)); // pins are of positions
            }
        }
        s.rings.forget_from(0);
        s.reset_pos = -1;
        index_records(ids);
    } catch (const std::exception & e) {
        const std::string text = format("positions of sequence %d could not be %s: %s", seq_id, what, e.what());
        refuse(text);
        if (seq_id >= 0 && uint32_t(seq_id) < n_seq_max) {
            sequences[size_t(seq_id)].fault = text;
        }
    }
}

// K of these records by so many positions, in batches through host memory.
void memory::rotate_rows(group & g, const std::vector<uint32_t> & ids, const std::vector<int32_t> & shifts) {
    constexpr size_t BATCH = 256;
    ggml_backend_ptr cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu.get()));
    if (auto set_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"))) {
        set_threads(cpu.get(), cparams.n_threads);
    }
    std::vector<uint8_t> bytes(std::min(BATCH, ids.size())*g.mover->token_bytes()), rows_of_layer;
    for (size_t from = 0; from < ids.size(); from += BATCH) {
        const size_t n = std::min(BATCH, ids.size() - from);
        const std::vector<int32_t> by(shifts.begin() + std::ptrdiff_t(from), shifts.begin() + std::ptrdiff_t(from + n));
        std::vector<uint8_t *> hosts(n);
        std::vector<uint32_t>  read_cells, write_cells;
        std::vector<uint8_t *> read_hosts, write_hosts;
        for (size_t i = 0; i < n; ++i) {
            const place & p = g.places[ids[from + i]];
            hosts[i] = p.slot >= 0 ? g.store->data(uint32_t(p.slot)) : bytes.data() + i*g.mover->token_bytes();
            if (p.slot < 0) {
                read_cells.push_back(uint32_t(p.cell));
                read_hosts.push_back(hosts[i]);
            }
            if (p.cell >= 0) {
                write_cells.push_back(uint32_t(p.cell));
                write_hosts.push_back(hosts[i]);
            }
        }
        if (!read_cells.empty()) {
            g.mover->get(read_cells.data(), read_hosts.data(), read_cells.size());
        }
        for (const row_part & part : row_parts()) {
            const auto il = std::find_if(g.layers.begin(), g.layers.end(), [&](uint32_t l) { return g.cache->k_of(l) == part.tensor; });
            if (&groups[part.ig] != &g || il == g.layers.end()) {
                continue; // another group's, or V
            }
            rows_of_layer.resize(n*part.row_bytes);
            for (size_t i = 0; i < n; ++i) {
                std::memcpy(rows_of_layer.data() + i*part.row_bytes, hosts[i] + part.offset, part.row_bytes);
            }
            g.cache->rotate(cparams, cpu.get(), *il, rows_of_layer, by);
            for (size_t i = 0; i < n; ++i) {
                std::memcpy(hosts[i] + part.offset, rows_of_layer.data() + i*part.row_bytes, part.row_bytes);
            }
        }
        if (!write_cells.empty()) {
            g.mover->set(write_cells.data(), write_hosts.data(), write_cells.size());
        }
    }
}

void memory::clear(bool data) {
    in_flight.clear();
    pending_scores.clear();
    for (sequence & s : sequences) {
        if (s.n_tokens() > 0) {
            forget(s, 0, s.n_tokens());
        }
        s.rings.forget_from(0);
        s.trigger.clear();
        s.output        = 0;
        s.next_occasion = occasion::step;
        s.reset_pos     = -1;
        s.fault.clear();
    }
    for (group & g : groups) {
        g.cache->clear(data);
        for (policy & rule : g.rules) {
            rule.clear();
        }
    }
    output_pending    = false;
    counters          = {};
    budget.peak_bytes = budget.used_bytes;
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
// state: upstream's own format, complete, wherever the rows are; before it, unless state=upstream says otherwise, scores,
// timers and what was frozen. Upstream's reader takes the mark in front for a number of streams that it does not have.
//

constexpr llama_pos MAX_POS = 1 << 30; // so that positions can be counted on from
constexpr uint32_t STATE_MARK = 0x4b525341, STATE_VERSION = 1; // "ASRK"
// Upstream's partial states are what a sliding window forgets; here it forgets nothing.
constexpr uint32_t STATE_NOTHING = 0x4e525341;

void write_u32(llama_io_write_i & io, uint32_t value) { io.write(&value, sizeof(value)); }

uint32_t read_u32(llama_io_read_i & io) {
    uint32_t value;
    io.read(&value, sizeof(value));
    return value;
}

[[noreturn]] void unfit(const std::string & what) { throw error(ASRKF_INVALID_ARGUMENT, "the state does not fit this context: " + what); }

uint64_t checksum(const std::vector<uint8_t> & bytes) { // FNV-1a
    uint64_t hash = 14695981039346656037ull;
    for (const uint8_t byte : bytes) {
        hash = (hash ^ byte)*1099511628211ull;
    }
    return hash;
}

const std::string & memory::model_name() const {
    if (own_fingerprint.empty()) {
        own_fingerprint = fingerprint(model);
    }
    return own_fingerprint;
}

// Mark, version, size, checksum, and then: the model; each sequence's pins and, by layer group, its policy.
void memory::write_policies(llama_io_write_i & io, llama_seq_id seq_id) const {
    std::vector<uint8_t> bytes;
    const auto put = [&](const void * data, size_t n) { bytes.insert(bytes.end(), static_cast<const uint8_t *>(data), static_cast<const uint8_t *>(data) + n); };
    const auto put_u32 = [&](uint32_t value) { put(&value, sizeof(value)); };
    put_u32(uint32_t(model_name().size()));
    put(model_name().data(), model_name().size());
    for (const sequence & s : sequences) {
        if (s.n_tokens() == 0 || (seq_id >= 0 && id_of(s) != uint32_t(seq_id))) {
            continue;
        }
        put_u32(id_of(s));
        put_u32(uint32_t(s.pinned.size()));
        for (const auto & [from, to] : s.pinned) {
            put_u32(uint32_t(from));
            put_u32(uint32_t(to));
        }
        put_u32(uint32_t(groups.size()));
        for (const group & g : groups) {
            const std::vector<uint8_t> rule = g.rules[id_of(s)].save();
            put_u32(uint32_t(rule.size()));
            put(rule.data(), rule.size());
        }
    }
    const uint64_t size = bytes.size(), sum = checksum(bytes);
    write_u32(io, STATE_MARK);
    write_u32(io, STATE_VERSION);
    io.write(&size, sizeof(size));
    io.write(&sum, sizeof(sum));
    io.write(bytes.data(), bytes.size());
}

// After the mark.
std::vector<memory::saved_sequence> memory::read_policies(llama_io_read_i & io) const {
    if (const uint32_t version = read_u32(io); version != STATE_VERSION) {
        unfit(format("it is of version %u, this library reads %u", version, STATE_VERSION));
    }
    uint64_t size, sum;
    io.read(&size, sizeof(size));
    io.read(&sum, sizeof(sum));
    if (size > (uint64_t(1) << 20) + uint64_t(n_ctx)*n_seq_max*64*1024) { // far more than any has, and little enough to ask for
        unfit("it is damaged");
    }
    std::vector<uint8_t> bytes;
    while (bytes.size() < size) { // piece by piece: a damaged size must end at the end of the file, not in memory
        const size_t before = bytes.size();
        bytes.resize(size_t(std::min<uint64_t>(size, before + (1 << 20))));
        io.read(bytes.data() + before, bytes.size() - before);
    }
    if (checksum(bytes) != sum) {
        unfit("it is damaged");
    }
    size_t at = 0;
    const auto take = [&](size_t n) {
        if (n > bytes.size() - at) {
            unfit("it is damaged");
        }
        at += n;
        return bytes.data() + at - n;
    };
    const auto take_u32 = [&] {
        uint32_t value;
        std::memcpy(&value, take(sizeof(value)), sizeof(value));
        return value;
    };
    const size_t n_name = take_u32();
    const std::string name(reinterpret_cast<const char *>(take(n_name)), n_name);
    if (name != model_name()) {
        unfit(format("it is of another model (%s, this one is %s)", name.c_str(), model_name().c_str()));
    }
    std::vector<saved_sequence> saved;
    while (at < bytes.size()) {
        saved_sequence s = { take_u32(), {}, {} };
        for (uint32_t n = take_u32(); n > 0; --n) {
            const uint32_t from = take_u32(), to = take_u32();
            if (from > to || to > uint32_t(std::numeric_limits<int32_t>::max())) {
                unfit("it is damaged");
            }
            s.pinned.emplace_back(int32_t(from), int32_t(to));
        }
        for (uint32_t n = take_u32(); n > 0; --n) {
            const size_t n_rule = take_u32();
            const uint8_t * rule = take(n_rule);
            s.rules.emplace_back(rule, rule + n_rule);
        }
        saved.push_back(std::move(s));
    }
    return saved;
}

void memory::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    check_state(seq_id, flags);
    if (is_windowed && flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) {
        write_u32(io, STATE_NOTHING);
        return;
    }
    if (state_kind(config.state) == STATE_OWN) {
        write_policies(io, seq_id);
    }
    const uint32_t n_stream = unified ? 1 : n_seq_max;
    write_u32(io, n_stream);
    for (uint32_t stream = 0; stream < n_stream; ++stream) {
        std::vector<uint32_t> ids;
        std::vector<bool> taken(records.size(), false);
        for (const sequence & s : sequences) {
            if ((seq_id >= 0 && id_of(s) != uint32_t(seq_id)) || (!unified && id_of(s) != stream)) {
                continue;
            }
            for (const uint32_t id : s.records) {
                if (!taken[id]) {
                    taken[id] = true;
                    ids.push_back(id);
                }
            }
        }
        write_u32(io, uint32_t(ids.size()));
        if (ids.empty()) {
            continue;
        }
        for (const uint32_t id : ids) {
            io.write(&records[id].pos, sizeof(llama_pos));
            write_u32(io, seq_id < 0 ? uint32_t(records[id].users.count()) : 1);
            for (uint32_t seq = 0; seq < n_seq_max; ++seq) {
                if (records[id].users.test(seq) && (seq_id < 0 || seq == uint32_t(seq_id))) {
                    write_u32(io, seq);
                }
            }
        }
        const std::vector<row_part> parts = row_parts();
        std::vector<uint8_t> copied;
        write_u32(io, 0); // V is not transposed
        write_u32(io, uint32_t(parts.size() / 2));
        for (const row_part & part : parts) {
            const group & g = groups[part.ig];
            const int32_t  type = int32_t(part.tensor->type);
            const uint64_t row_bytes = part.row_bytes;
            io.write(&type, sizeof(type));
            io.write(&row_bytes, sizeof(row_bytes));
            for (size_t i = 0; i < ids.size(); ) {
                const place & p = g.places[ids[i]];
                if (p.cell < 0) {
                    io.write(g.store->data(uint32_t(p.slot)) + part.offset, row_bytes);
                    i++;
                    continue;
                }
                size_t run = 1; // cells beside each other go together
                while (i + run < ids.size() && g.places[ids[i + run]].cell == p.cell + int32_t(run)) {
                    run++;
                }
                if (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) { // where frozen rows are: on the host
                    copied.resize(run*row_bytes);
                    ggml_backend_tensor_get(part.tensor, copied.data(), size_t(p.cell)*row_bytes, copied.size());
                    io.write(copied.data(), copied.size());
                } else {
                    io.write_tensor(part.tensor, size_t(p.cell)*row_bytes, run*row_bytes);
                }
                i += run;
            }
        }
    }
}

// Everything is read to the host first; only then is what was there given up.
void memory::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    std::vector<std::vector<uint32_t>> slots(groups.size()); // by group, then by token as it comes
    try {
        check_state(seq_id, flags);
        uint32_t n_stream = read_u32(io);
        if (is_windowed && flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY && n_stream == STATE_NOTHING) {
            return;
        }
        std::vector<saved_sequence> saved;
        if (n_stream == STATE_MARK) {
            saved    = read_policies(io);
            n_stream = read_u32(io);
        }
        if (n_stream == 0 || n_stream > LLAMA_MAX_SEQ) {
            unfit(format("it claims %u streams", n_stream));
        }
        struct arrival { llama_pos pos; uint32_t at; std::vector<uint32_t> users; };
        std::vector<arrival> arrivals;
        uint32_t n_kept = 0; // records of other sequences
        for (const record & r : records) {
            n_kept += seq_id >= 0 && r.users.count() > size_t(r.users.test(size_t(seq_id)));
        }
        const std::vector<row_part> parts = row_parts();
        for (uint32_t stream = 0; stream < n_stream; ++stream) {
            const uint32_t n = read_u32(io), before = uint32_t(arrivals.size());
            if (n > n_ctx || n_kept + before + n > n_ctx) {
                const std::string others = n_kept ? format("other sequences %u, and ", n_kept) : "";
                throw error(ASRKF_POOL_FULL, format("the state has %u tokens, %sn_ctx is %u: raise n_ctx", before + n, others.c_str(), n_ctx));
            }
            if (n == 0) {
                continue;
            }
            for (uint32_t i = 0; i < n; ++i) {
                arrival a = { 0, before + i, {} };
                io.read(&a.pos, sizeof(a.pos));
                const uint32_t n_users = read_u32(io);
                if (a.pos > MAX_POS) {
                    unfit(format("a token has position %d", a.pos));
                }
                if (a.pos < 0 || n_users == 0 || n_users > (seq_id < 0 && unified ? n_seq_max : 1)) {
                    unfit(a.pos < 0 ? "a token has no position" : format("a token belongs to %u sequences", n_users));
                }
                for (uint32_t j = 0; j < n_users; ++j) {
                    a.users.push_back(read_u32(io));
                    if (seq_id >= 0) {
                        a.users.back() = uint32_t(seq_id);
                    } else if (a.users.back() >= n_seq_max || std::count(a.users.begin(), a.users.end(), a.users.back()) > 1) {
                        unfit(format("a token belongs to sequence %u, and this context has %u", a.users.back(), n_seq_max));
                    }
                }
                arrivals.push_back(std::move(a));
            }
            if (read_u32(io) != 0) {
                unfit("its V is transposed (flash attention was off)");
            }
            if (const uint32_t n_layer = read_u32(io); n_layer != parts.size() / 2) {
                unfit(format("it has %u layers, not %zu", n_layer, parts.size() / 2));
            }
            for (size_t ig = 0; ig < groups.size(); ++ig) {
                groups[ig].store->reserve(n);
                for (uint32_t i = 0; i < n; ++i) {
                    slots[ig].push_back(groups[ig].store->acquire());
                }
            }
            for (const row_part & part : parts) {
                int32_t  type;
                uint64_t row_bytes;
                io.read(&type, sizeof(type));
                io.read(&row_bytes, sizeof(row_bytes));
                if (type != int32_t(part.tensor->type) || row_bytes != part.row_bytes) {
                    unfit("its cache type or row size is another one");
                }
                for (uint32_t i = 0; i < n; ++i) {
                    io.read(groups[part.ig].store->data(slots[part.ig][before + i]) + part.offset, row_bytes);
                }
            }
        }
        std::stable_sort(arrivals.begin(), arrivals.end(), [](const arrival & a, const arrival & b) { return a.pos < b.pos; }); // they come in the order of cells
        std::vector<uint32_t> n_of(n_seq_max, 0);
        for (const arrival & a : arrivals) {
            for (const uint32_t seq : a.users) {
                if (++n_of[seq] > n_ctx_seq) {
                    throw error(ASRKF_POOL_FULL, format("the state has more than %u tokens of sequence %u: raise n_ctx", n_ctx_seq, seq));
                }
            }
        }
        for (saved_sequence & s : saved) {
            s.id = seq_id >= 0 ? uint32_t(seq_id) : s.id;
            for (const auto & bytes : s.rules) {
                if (s.id >= n_seq_max || !policy::fits(bytes, n_of[s.id])) {
                    unfit("its scores and timers are not those of its tokens");
                }
            }
        }

        // from here on nothing fails
        std::vector<uint32_t> ids;
        for (sequence & s : sequences) {
            if (seq_id >= 0 && id_of(s) != uint32_t(seq_id)) {
                continue;
            }
            if (s.n_tokens() > 0) {
                keep_store = true;
                forget(s, 0, s.n_tokens());
                keep_store = false;
            }
            s.next_occasion = occasion::step;
            s.reset_pos     = -1;
            s.trigger.clear();
        }
        for (const saved_sequence & s : saved) {
            const uint32_t n = count_positions(s.pinned);
            try {
                for (const group & g : groups) {
                    if (!is_window_of_layers(g)) {
                        check_pool(g, n_ubatch, n);
                    }
                }
                sequences[s.id].pinned = s.pinned;
            } catch (const error &) {} // this pool is too small for its pins: it keeps its own
        }
        for (const arrival & a : arrivals) {
            ids.push_back(new_record(a.pos, LLAMA_TOKEN_NULL, a.users)); // a state does not say which token
            for (size_t ig = 0; ig < groups.size(); ++ig) {
                groups[ig].places[ids.back()].slot = int32_t(slots[ig][a.at]);
                for (const uint32_t seq : a.users) { // in order of position: it is the last
                    groups[ig].rules[seq].set_frozen(sequences[seq].n_tokens() - 1, true, false);
                    groups[ig].rules[seq].recheck(); // the next step brings back what the pool holds
                }
            }
        }
        slots.clear();
        for (const saved_sequence & s : saved) {
            for (size_t ig = 0; ig < groups.size() && !s.rules.empty(); ++ig) { // of other groups: one ranking serves them all
                groups[ig].rules[s.id].load(s.rules[std::min(ig, s.rules.size() - 1)]);
            }
        }
        index_records(ids);
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
    if (seq_id >= 0 && uint32_t(seq_id) >= n_seq_max) {
        text = format("there is no sequence %d: this context has %u (n_seq_max, -np)", seq_id, n_seq_max);
    } else if (flags & ~uint32_t(LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY | LLAMA_STATE_SEQ_FLAGS_ON_DEVICE)) {
        text = format("states with flags %u are unknown here", flags);
    } else if (no_alloc) {
        text = "a context without memory has no state";
    }
    for (const sequence & s : sequences) {
        if (text.empty() && (seq_id < 0 || id_of(s) == uint32_t(seq_id))) {
            text = s.fault;
        }
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
                k.push_back({ group_of_layer[il], tensor, row_bytes, offset });
            } else if (tensor == g.cache->v_of(il)) {
                v.push_back({ group_of_layer[il], tensor, row_bytes, offset });
            }
            offset += row_bytes;
        }
    }
    k.insert(k.end(), v.begin(), v.end());
    return k;
}

void memory::read_part(const row_part & part, uint32_t id, uint8_t * out) const {
    const place & p = groups[part.ig].places[id];
    if (p.slot >= 0) {
        std::memcpy(out, groups[part.ig].store->data(uint32_t(p.slot)) + part.offset, part.row_bytes);
    } else {
        ggml_backend_tensor_get(part.tensor, out, size_t(p.cell)*part.row_bytes, part.row_bytes);
    }
}

// K rows that no graph of ours has written, from a state, a copy or a shift: into the index.
void memory::index_records(const std::vector<uint32_t> & ids) {
    if (!scorer || ids.empty()) {
        return;
    }
    std::vector<std::vector<uint32_t>> members(rows->n_used()); // of the index rows that change
    std::vector<bool> changed(members.size(), false);
    for (const uint32_t id : ids) {
        changed[(*rows)[id]] = true;
    }
    for (uint32_t id = 0; id < records.size(); ++id) {
        if (records[id].users.any() && changed[(*rows)[id]]) {
            members[(*rows)[id]].push_back(id);
        }
    }
    const ggml_type type = index_type();
    const auto parts = row_parts();
    for (size_t l = 0; l < scorer->layers().size(); ++l) {
        const ggml_tensor * k = groups[group_of_layer[scoring_layers[l]]].cache->k_of(scoring_layers[l]);
        const row_part & part = *std::find_if(parts.begin(), parts.end(), [&](const row_part & p) { return p.tensor == k; });
        std::vector<uint8_t> indexed(ggml_row_size(type, k->ne[0])), stored(part.row_bytes);
        std::vector<float>   values(size_t(k->ne[0])), sum;
        for (uint32_t row = 0; row < members.size(); ++row) {
            if (members[row].empty()) {
                continue;
            }
            sum.assign(values.size(), 0);
            for (const uint32_t id : members[row]) {
                read_part(part, id, stored.data());
                if (k->type == GGML_TYPE_F32) {
                    std::memcpy(values.data(), stored.data(), part.row_bytes);
                } else {
                    ggml_get_type_traits(k->type)->to_float(stored.data(), values.data(), k->ne[0]);
                }
                for (size_t d = 0; d < sum.size(); ++d) {
                    sum[d] += values[d] / float(members[row].size());
                }
            }
            ggml_quantize_chunk(type, sum.data(), indexed.data(), 0, 1, k->ne[0], nullptr);
            scorer->set_row(l, row, indexed.data());
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

asrkf_config memory::get_config() const {
    asrkf_config now = config;
    now.host_limit = budget.limit_bytes;
    return now;
}

void memory::set_host_limit(uint64_t limit_bytes) {
    if (limit_bytes && limit_bytes < budget.used_bytes) {
        throw error(ASRKF_HOST_LIMIT, format("host_limit of %llu bytes: %llu are in use", (unsigned long long) limit_bytes, (unsigned long long) budget.used_bytes));
    }
    budget.limit_bytes = limit_bytes;
}

asrkf_stats memory::get_stats(llama_context * ctx) const {
    asrkf_stats s = counters;
    s.struct_size        = sizeof(s);
    s.policy             = config.policy;
    s.n_groups           = uint32_t(groups.size());
    s.pool_cells         = mean_cells([](const group & g) { return g.pool_cells; });
    s.active_cells       = mean_cells([](const group & g) { return g.cache->n_used(); });
    s.tokens             = n_records();
    s.frozen_cells       = uint32_t(s.tokens) - s.active_cells;
    s.n_sequences        = uint32_t(std::count_if(sequences.begin(), sequences.end(), [](const sequence & q) { return q.n_tokens() > 0; }));
    s.device_index_bytes = scorer ? scorer->device_bytes() : 0;
    const recovery_trigger & trigger = sequences[last_speaker].trigger;
    for (const sequence & q : sequences) {
        s.outputs_total += q.trigger.count();
    }
    s.entropy            = float(trigger.last());
    s.entropy_mean       = float(trigger.mean());
    s.entropy_deviation  = float(trigger.deviation());
    s.host_kv_bytes      = budget.used_bytes;
    s.host_kv_peak_bytes = budget.peak_bytes;
    for (const group & g : groups) {
        s.device_kv_bytes      += g.cache->device_bytes();
        s.device_staging_bytes += g.mover ? g.mover->staging_bytes() : 0;
        for (const policy & rule : g.rules) {
            s.restores_redundant_total += rule.n_redundant();
        }
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
    s.pool_cells          = g.pool_cells;
    s.window              = g.rules[0].params.window;
    s.max_ubatch          = g.rules[0].max_ubatch();
    s.active_cells        = g.cache->n_used();
    for (uint32_t id = 0; id < records.size(); ++id) {
        const place & p = g.places[id];
        s.active_copied_cells += p.cell >= 0 && p.slot >= 0;
        s.frozen_cells        += p.cell < 0 && p.slot >= 0;
    }
    s.sliding_window      = is_window_of_layers(g) ? model.hparams.n_swa : 0;
    s.token_bytes         = g.mover ? g.mover->token_bytes() : 0;
    s.device_kv_bytes     = g.cache->device_bytes();
    return s;
}

size_t memory::get_tokens(int32_t seq_id, uint32_t index, int32_t * out_pos, uint8_t * out_state, size_t capacity) const {
    const sequence & s = named(seq_id);
    if (index >= groups.size()) {
        throw error(ASRKF_INVALID_ARGUMENT, format("group %u: there are %zu", index, groups.size()));
    }
    const group & g = groups[index];
    for (uint32_t i = 0; i < std::min<size_t>(capacity, s.n_tokens()); ++i) {
        const place & p = g.places[s.records[i]];
        if (out_pos) {
            out_pos[i] = records[s.records[i]].pos;
        }
        if (out_state) {
            const bool active = p.cell >= 0 && g.cache->is_active(uint32_t(p.cell), id_of(s));
            out_state[i] = !active ? ASRKF_TOKEN_FROZEN : p.slot < 0 ? ASRKF_TOKEN_ACTIVE : ASRKF_TOKEN_ACTIVE_COPIED;
        }
    }
    return s.n_tokens();
}

void memory::get_rows(llama_context * ctx, int32_t seq_id, uint32_t index, int32_t pos, uint8_t * out, size_t size) {
    const sequence & s = named(seq_id);
    if (index >= groups.size()) {
        throw error(ASRKF_INVALID_ARGUMENT, format("group %u: there are %zu", index, groups.size()));
    }
    group & g = groups[index];
    const uint32_t i = lower_bound(s, pos);
    if (i == s.n_tokens() || records[s.records[i]].pos != pos) {
        throw error(ASRKF_INVALID_ARGUMENT, format("sequence %d has no position %d", seq_id, pos));
    }
    if (size != g.mover->token_bytes()) {
        throw error(ASRKF_INVALID_ARGUMENT, format("size is %zu, a token has %zu bytes in group %u", size, g.mover->token_bytes(), index));
    }
    lctx = ctx;
    prepare_to_move();
    const place & p = g.places[s.records[i]];
    if (p.cell < 0) {
        std::memcpy(out, g.store->data(uint32_t(p.slot)), size);
        return;
    }
    const uint32_t cell = uint32_t(p.cell);
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
