// Cuts of `refreekv`: when one is due, the attention that it is decided by, and the move. All layers keep their newest queries;
// when a prompt's last step is computed, its attention over all tokens is measured layer by layer, each layer group's policy
// says what goes and what comes, and rows move before anything else happens. So what is seen after a prompt is already cut.
#pragma once

#include "llama/scores.h"
#include "scoring/attention_row.h"

namespace asrkf {

// Of the layers that the policy serves.
std::unique_ptr<attention_rows> make_attention_rows(const settings & config, const std::vector<uint32_t> & layers, ggml_type type_k, bool no_alloc);

class prompt_cuts {
public:
    // Where the policy makes cuts; else nothing is allocated. type_k: of the cache. Throws as attention_rows does.
    prompt_cuts(const settings & config, layer_groups & groups, token_table & tokens, transfers & moves, scores & scored, counters & counted, ggml_type type_k);

    bool is_on() const { return attention != nullptr; }

    // The branch of a step. Once a step: its queries go into the rings.
    void     prepare(side_step & step, const std::vector<part> & parts);
    uint32_t worst_kept(uint32_t n_tokens) const { return std::min(n_tokens, config.rows*config.n_seq_max); }
    int      place_of(int32_t il) const; // -1: none; they are built in order, and the first begins a new graph
    attention_rows::branch new_branch(ggml_context * ctx, uint32_t n_kept) const { return attention->new_branch(ctx, n_kept); }
    void build(ggml_context * ctx, ggml_cgraph * gf, int i, ggml_tensor * q, float kq_scale) { attention->build(ctx, gf, building, size_t(i), q, kq_scale); }
    attention_rows::branch building; // of the graph that is being built

    // A call brings this batch; prompt_follows: the caller says that more of it follows.
    void note(const llama_batch & batch, bool prompt_follows);
    // The call is computed: the cuts that it calls for. What cannot be cut stays active, and that is said.
    void make_due();
    void clear();

    // What the last cut came to, in a group.
    cut_result result_of(size_t ig) const { return is_on() ? results[ig] : cut_result(); }
    // The pool that would have been enough for it.
    uint32_t enough_cells(size_t ig) const;
    size_t   ring_bytes() const; // on devices
    size_t   room_bytes() const;
    std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> breakdown() const;

private:
    // Where a layer's keys lie in the bytes of a token.
    struct key_part { size_t group; ggml_tensor * keys; size_t offset; };

    void make(sequence & s);
    plan decide(size_t ig, const sequence & s, cut_result & out);
    void measure(size_t i, const sequence & s, std::vector<float> & weights);

    const settings &                config;
    layer_groups &                  groups;
    token_table &                   tokens;
    transfers &                     moves;
    scores &                        scored;
    counters &                      counted;
    std::unique_ptr<attention_rows> attention; // null: no cuts
    std::vector<key_part>           keys;      // by layer of it
    std::vector<uint32_t>           due;       // sequences of the current call
    std::vector<cut_result>         results;   // by group, of the last cut
};

} // namespace asrkf
