// How much each layer group leans to a token: its layers' own attention to it, as long as it is in their pool, beside the relevance that
// all groups share. Measured after each step that scores, and folded in with the scores.
#pragma once

#include "llama/transfers.h"
#include "scoring/own_attention.h"

#include <string>

namespace asrkf {

struct part;
struct side_step;

// Of the layers of these groups (made, or planned) whose pool is smaller than the context. Null where there are none, or the policy's ranking
// is shared. A device that lacks an operation: null, and why. Throws error(ASRKF_INTERNAL) without memory.
template <typename Groups> std::unique_ptr<own_attention> make_own_attention(const settings & config, const Groups & groups, ggml_type type_k, bool no_alloc, std::string & why_not);

class own_scores {
public:
    own_scores(const settings & config, layer_groups & groups, token_table & tokens, transfers & moves, ggml_type type_k);

    bool is_on() const { return attention != nullptr; }

    // Which of the layers il is, -1: none. They are built in order; the first begins a new graph.
    int           place_of(int32_t il) const;
    ggml_tensor * new_input(ggml_context * ctx) const { return attention->new_input(ctx); }
    void build(ggml_context * ctx, ggml_cgraph * gf, int i, ggml_tensor * q, float kq_scale) { attention->build(ctx, gf, last_tokens, size_t(i), q, kq_scale); }
    ggml_tensor * last_tokens = nullptr; // the input of the graph that is being built; null for one sequence

    // Which token of the step is the last of each sequence; and, if it scores, which cells each sees. Throws error(ASRKF_INTERNAL).
    void prepare(side_step & step, const std::vector<part> & parts);
    // Those cells again, after a move; of sequences, none: nothing is asked.
    void prepare(const std::vector<uint32_t> & seqs);
    // The step is computed. llama.cpp calls this where nothing may throw: the caller takes what is thrown.
    void run();
    // What came of it, once these tokens' scores are those of the ranking.
    void fold_in();
    void drop_pending() { is_pending = false; }

    own_attention::sizes kept_bytes() const { return attention ? attention->kept_bytes() : own_attention::sizes(); }
    own_attention::sizes room_bytes() const { return attention ? attention->room_bytes() : own_attention::sizes(); }

private:
    void attach();
    void write_mask(size_t set, const std::vector<uint32_t> & seqs);
    void fold_in(size_t set, size_t n);

    layer_groups &                 groups;
    token_table &                  tokens;
    transfers &                    moves;
    std::unique_ptr<own_attention> attention; // see make_own_attention()
    std::vector<size_t>            sets;      // their groups
    own_attention::inputs          asked;     // of the next run, and until that is over
    std::vector<uint32_t>          seqs;      // the same sequences
    bool                           is_pending = false;
};

} // namespace asrkf
