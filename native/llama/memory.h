// The memory that freezes, as llama.cpp calls it (llama_memory_i) and as the C boundary does (engine). Both are a table of
// contents: what a call does is in the file of the part that it goes to.
#pragma once

#include "llama/contexts.h"
#include "llama/counters.h"
#include "llama/engine.h"
#include "llama/figures.h"
#include "llama/groups.h"
#include "llama/layout.h"
#include "llama/prompt_cut.h"
#include "llama/requests.h"
#include "llama/saved_states.h"
#include "llama/scores.h"
#include "llama/sequence_ops.h"
#include "llama/settings.h"
#include "llama/shifts.h"
#include "llama/steps.h"
#include "llama/tokens.h"
#include "llama/transfers.h"

#include <algorithm>

namespace asrkf {

class memory final : public llama_memory_i, public engine {
public:
    memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams, const asrkf_config & config,
            const std::string & choice);

    // decoding
    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    // sequences
    void clear(bool data) override;
    bool seq_rm  (llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override { sequences.keep(seq_id); }
    void seq_add (llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;
    bool get_can_shift() const override { return std::all_of(groups.begin(), groups.end(), [](const group & g) { return g.cache->why_no_shift().empty(); }); }
    llama_pos seq_pos_min(llama_seq_id seq_id) const override { return tokens.has(seq_id) ? tokens.pos_min(tokens.named(seq_id)) : -1; }
    llama_pos seq_pos_max(llama_seq_id seq_id) const override { return tokens.has(seq_id) ? tokens.pos_max(tokens.named(seq_id)) : -1; }

    // states
    void state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const override { states.write(io, seq_id, flags); }
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id, llama_state_seq_flags flags) override { states.read(io, seq_id, flags); }

    // requests
    uint64_t freeze_range (llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) override;
    uint64_t restore_range(llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) override;
    void     pin_range    (llama_context *, int32_t seq_id, int32_t p0, int32_t p1, bool pinned) override { asked.pin(seq_id, p0, p1, pinned); }
    void     set_prompt_follows(bool follows) override { placing.set_prompt_follows(follows); }
    void     set_host_limit(uint64_t limit_bytes) override;

    // figures
    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override { return seen.memory_breakdown(); }
    uint32_t graph_nodes() const override { return graph_nodes_of(groups, scored, cuts); }
    asrkf_config      get_config() const override;
    const std::string & get_pool_choice() const override { return choice; }
    asrkf_stats       get_stats(llama_context * ctx) const override { return seen.stats(ctx); }
    asrkf_group_stats get_group_stats(uint32_t index) const override { return seen.group_stats(index); }
    size_t   get_tokens(int32_t seq_id, uint32_t index, int32_t * out_pos, uint8_t * out_state, size_t capacity) const override {
        return seen.token_states(seq_id, index, out_pos, out_state, capacity);
    }
    ranges   get_pinned(int32_t seq_id) const override { return asked.pinned(seq_id); }
    bool     get_sampled_output(int32_t i, asrkf_output & out) override { return placing.get_sampled_output(i, out); }
    void     get_rows(llama_context * ctx, int32_t seq_id, uint32_t index, int32_t pos, uint8_t * out, size_t size) override;
    void     set_trace(asrkf_step * buffer, size_t capacity) override { placing.trace = { buffer, capacity, 0 }; }
    uint64_t get_trace_count() const override { return placing.trace.count; }

private:
    ggml_backend_buffer_type_t prepare_groups(const llama_memory_params & params);
    void shift(llama_seq_id seq_id, llama_pos p0, llama_pos p1, const char * what, const std::function<llama_pos(llama_pos)> & moved);
    // An operation that returns nothing has failed: its sequence's next decode says it, until all its tokens are removed. Never
    // a cache that is silently wrong.
    void fail(llama_seq_id seq_id, const std::string & text);

    // In the order in which each needs those before it.
    const settings config;
    const std::string choice; // of the pool, and why
    layout         laid_out;
    host_budget    budget;
    counters       counted;
    layer_groups   groups;
    token_table    tokens;
    transfers      moves;
    scores         scored;
    prompt_cuts    cuts;
    sequence_ops   sequences;
    shifts         shifted;
    saved_states   states;
    requests       asked;
    steps          placing;
    figures        seen;
};

} // namespace asrkf
