// What the newest queries make of the tokens: the side branch of the model's graph, which writes index and rings; what scores
// with them; and the scores that come back. Scores of a step arrive with its logits and are folded in before the
// next decision, never later and never earlier, so that a seed repeats.
#pragma once

#include "llama/gate_scores.h"
#include "llama/own_scores.h"
#include "scoring/by_device.h"
#include "scoring/device_scorers.h"

#include <functional>

namespace asrkf {

// What a step brings one sequence.
struct part {
    uint32_t              seq;
    std::vector<uint32_t> tokens; // of the ubatch
    llama_pos             pos_end;
};

// A scoring of some sequences by their kept queries, as it was prepared.
struct scoring_job {
    std::vector<uint32_t> seqs; // none: nothing is scored
    askers                who = askers::of_steps;
    scoring_shape         shape;
};

// What a step keeps of its queries, in every layer, for cuts.
struct kept_queries {
    std::vector<int32_t> tokens;
    std::vector<int64_t> rows;
};

// A step's side branch, and its scorings.
struct side_step {
    branch_shape          shape;
    std::vector<uint32_t> records;    // of its tokens
    std::vector<int32_t>  queries;    // which tokens' queries are kept, and where
    std::vector<int64_t>  query_rows;
    relevance::written    written;    // index rows
    scoring_job           scoring;    // by the newest queries, for the next decision
    scoring_job           look;       // by this token's own: whether it needs a second look
    kept_queries          for_cuts;
    std::vector<int32_t>  last_tokens; // of each sequence, for own scores

    bool scores() const { return !scoring.seqs.empty() || !look.seqs.empty(); }
};

// The index and the branch of these layers. sets gets their groups.
using group_of_layer = std::function<uint32_t(uint32_t il)>;
std::unique_ptr<relevance> make_scorer(const settings & config, const std::vector<uint32_t> & scoring_layers, const group_of_layer & group_of, std::vector<uint32_t> & sets, bool no_alloc);
// Of its scorings.
std::vector<scoring_shape> largest_shapes(const settings & config);

class scores {
public:
    // The part of attention that fell on tokens frozen in its layer's group, averaged over all heads of the scoring layers, and of
    // the worst head. -1: there are no scores.
    struct missed_attention { float mean = -1, worst = -1; };

    // scoring_layers: empty where the policy asks for no scores. buft: where scores are read back to, pinned if the device
    // offers that. Throws error(ASRKF_INTERNAL) without memory.
    scores(const settings & config, layer_groups & groups, token_table & tokens, transfers & moves, counters & counted,
            const std::vector<uint32_t> & scoring_layers, ggml_backend_buffer_type_t buft, ggml_type type_k);

    gate_scores gated; // with scores from them instead
    own_scores  own;   // beside them

    bool is_on() const { return scorer != nullptr; }
    std::string backend() const { return devices ? devices->kinds() : gated.is_on() ? "gates" : "none"; } // as asrkf_stats names it
    const char * ranked_by() const { return own.is_on() ? "own" : devices ? "shared" : "none"; } // the same

    // The branch of a step whose tokens and scored sequences are known by now: where it writes their K rows and queries, and
    // whose queries score. prompt_end: the newest PROMPT_END_QUERIES do. Once a step: its queries go into the rings. Throws
    // error(ASRKF_INTERNAL) without memory.
    void prepare(side_step & step, const std::vector<part> & parts, bool prompt_end);
    // What compute buffers are reserved for.
    branch_shape worst_shape(uint32_t n_tokens) const;
    // Of index and rings, or gates; and of what scores with them, beside the scheduler's own buffers.
    size_t index_bytes() const { return (scorer ? scorer->device_bytes() : 0) + gated.device_bytes() + sum_of(own.kept_bytes()); }
    size_t compute_bytes() const { return (devices ? devices->device_bytes() : 0) + sum_of(own.room_bytes()); }
    std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> breakdown() const; // of both

    // Which of the scoring layers il is, -1: none. They are built in order; the first begins a new graph.
    int  place_of(int32_t il) const;
    relevance::branch new_branch(ggml_context * ctx, const branch_shape & shape) const { return scorer->new_branch(ctx, shape); }
    void build(ggml_context * ctx, ggml_cgraph * gf, int i, ggml_tensor * q, ggml_tensor * k_cur, float kq_scale) {
        scorer->build(ctx, gf, *building, size_t(i), q, k_cur, kq_scale);
    }
    const relevance::branch * building = nullptr; // of the graph that is being built

    void set_input(const side_step & step, const relevance::branch & branch);
    // After moves between the step's first and second time: who is frozen.
    void note_frozen(const scoring_job & job);
    // The step's graph has been queued: queue a scoring, if there is one. Where a device fails the step goes without scores, and
    // says so.
    void run(const scoring_job & job);
    // What the scoring that runs has missed, now: waits for it. Its scores are still to be folded in, or dropped.
    missed_attention wait_for_missed();
    // Scores that have come back, into the policies: averaged over the queries of all sequences that scored. A row that
    // sequences share has what they all want of it.
    void fold_in();
    void drop_pending() { pending.clear(); gated.drop_pending(); own.drop_pending(); }
    // Of the newest scores that came back.
    missed_attention missed() const { return newest_missed; }
    void clear_missed() { newest_missed = {}; }

    // K rows that no graph of ours has written, from a state, a copy or a shift: into the index.
    void index_records(const std::vector<uint32_t> & ids);

private:
    scoring_inputs & prepared(const scoring_job & job) { return job.who == askers::newest ? for_look : for_decision; }
    void prepare_scoring(scoring_job & job, askers who);
    void read_missed();
    void attach();
    bool await();
    void give_up(const std::exception & why);
    void index_layer(size_t i, const std::vector<std::vector<uint32_t>> & members);

    const settings &           config;
    layer_groups &             groups;
    token_table &              tokens;
    transfers &                moves;
    counters &                 counted;
    std::unique_ptr<relevance> scorer;             // null if the policy asks for no scores
    scoring_inputs             for_decision, for_look, running; // of the next runs; and what a run reads, until it is over
    ggml_backend_buffer_ptr    arrived;            // what heads miss; of each device means, then peaks, [n_arrived] each: never moved, it may still be written
    std::unique_ptr<device_scorers> devices;       // as `scorer`; dies before what its last run reads and writes
    std::vector<uint32_t>      sets;               // the groups of scoring layers
    missed_attention           newest_missed;
    uint32_t                   n_arrived = 0;
    std::vector<uint32_t>      pending;            // the sequences whose scores are there
};

} // namespace asrkf
