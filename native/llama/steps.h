// Decoding, step by step (ubatch by ubatch). A step is placed when it is applied, not when its batch is split: programs use
// batches of 2048 tokens on pools of that size. Placing a step is: fold the last scores in, decide, move, find slots.
#pragma once

#include "llama/outputs.h"
#include "llama/prompt_cut.h"
#include "llama/scores.h"

#include "llama-batch.h"

namespace asrkf {

class steps {
public:
    steps(const settings & config, layer_groups & groups, token_table & tokens, transfers & moves, scores & scored, prompt_cuts & cuts, counters & counted,
            const host_budget & budget)
        : config(config), groups(groups), tokens(tokens), moves(moves), scored(scored), cuts(cuts), counted(counted), budget(budget), outputs(config.n_seq_max) {}

    // A batch in steps that fit the pools. rewalks: the last step is the end of the prompt once more. Throws error where it can
    // never fit; no token has changed then, but the last output's entropy has been read, and the sequences' shares may be
    // others.
    struct split_batch {
        std::vector<llama_ubatch> ubatches;
        bool                      rewalks    = false;
        bool                      has_output = false; // one whose entropy counts
    };
    split_batch split(llama_batch_allocr & balloc, uint32_t n_ubatch_max);

    // Where a step's tokens go, and its side branch. Throw error; the books are then as far as the moves came.
    struct placed {
        std::vector<llama_kv_cache::slot_info> slots; // by group
        side_step                              side;
    };
    // is_first: of the call. before_rewalk: the prompt's end scores.
    placed place(const llama_ubatch & ubatch, bool is_first, bool before_rewalk);
    // The last tokens again, in the cells that they have: their rows are overwritten, no token is added.
    placed place_rewalk(const llama_ubatch & ubatch);
    // Of a step that was computed once, and whose results nobody has read: does its token need a second look? Waits for it.
    bool   wants_look(llama_context & ctx, const llm_graph_result & res, const llama_ubatch & ubatch, side_step & side);
    // That token again, in its cells, with what it asks for restored.
    placed place_look(const llama_ubatch & ubatch, side_step side);
    // There are more tokens than cells: from then on any cell may be taken, and attention goes over all, so that graphs stay.
    bool   overflows(const group & g, const llama_kv_cache::slot_info & slot) const;
    // is_last: of the call. output: it is, and has one.
    void   computed(llama_context & ctx, const llm_graph_result & res, const llama_ubatch & ubatch, bool is_last, bool output);

    void clear() { output_pending = false; }
    void set_fault(const std::string & text) { fault = text; } // why every decode must fail
    void set_prompt_follows(bool follows)    { prompt_follows = follows; }
    uint32_t last_speaker() const { return speaker; }
    // As engine.h says.
    bool   get_sampled_output(int32_t i, asrkf_output & out);

    step_trace trace;

private:
    std::vector<uint32_t> new_tokens_of(const llama_batch & batch) const;
    void check_room(const std::vector<uint32_t> & n_new, uint32_t n_batch) const;
    void check_host_limit(uint32_t n_new) const;
    uint32_t longest_step(const std::vector<uint32_t> & n_new, uint32_t n_ubatch_max) const;
    void note_outputs(const llama_batch & batch, int32_t n_outputs);
    bool has_levels() const { return config.recovery != RECOVERY_OFF && config.recovery != RECOVERY_SECOND_LOOK; }
    bool wants_entropy() const { return has_levels() || trace.buffer; }
    void read_entropy();
    double entropy_of_last(const sequence & s);
    std::vector<part> parts_of(const llama_ubatch & ubatch) const;
    std::vector<demand> demands_of(const std::vector<part> & parts) const;
    void decide_and_move(const std::vector<demand> & wanted);
    std::vector<demand> with_shrunk_shares(const std::vector<demand> & wanted) const;
    plans_by_group decide(const std::vector<demand> & demands, bool frugal);
    std::vector<llama_kv_cache::slot_info> find_slots(const llama_ubatch & ubatch) const;
    bool may_look(const llama_ubatch & ubatch) const;
    std::vector<uint32_t> sequences_to_score(const std::vector<part> & parts, bool before_rewalk) const;
    void book(const llama_ubatch & ubatch, const std::vector<part> & parts, placed & step);
    llama_kv_cache::slot_info cells_again(group & g, const sequence & s, const std::vector<uint32_t> & ids) const;
    struct mark { uint64_t freezes, restores; double policy_seconds, moves_seconds; };
    mark now() const { return { counted.freezes_total, counted.n_restores(), counted.policy_seconds, counted.moves_seconds }; }
    void record(const mark & before, const llama_ubatch & ubatch, bool scores, occasion why, float entropy);

    const settings &    config;
    layer_groups &      groups;
    token_table &       tokens;
    transfers &         moves;
    scores &            scored;
    prompt_cuts &       cuts;
    counters &          counted;
    const host_budget & budget;
    bool                output_pending = false; // the last call had an output row
    bool                prompt_follows = false; // the caller says that the next call continues the prompt
    output_rows          outputs;               // of this call
    std::vector<int32_t> row_of;                // by token of the last call's batch: its output row, counted from the end (-1); 0: none
    uint32_t            speaker        = 0;     // the sequence whose entropy was read last
    std::string         fault;
};

} // namespace asrkf
