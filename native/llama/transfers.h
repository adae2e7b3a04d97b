// Moves of rows between pool and host store, for what a policy decided or a caller asked. What can fail comes before the
// books are changed, or leaves them as far as it came, so a token is always in exactly one state.
#pragma once

#include "llama/counters.h"
#include "llama/tokens.h"

namespace asrkf {

// What a step brings one sequence: room for n_new tokens before pos_end.
struct demand {
    uint32_t  seq;
    uint32_t  n_new;
    llama_pos pos_end;
    occasion  why;
};

using wanted_tokens    = std::vector<std::pair<uint32_t, std::vector<uint32_t>>>; // tokens of each sequence
using records_by_group = std::vector<std::vector<uint32_t>>;
using plans_by_group   = std::vector<std::vector<plan>>; // in the order of the demands

class transfers {
public:
    transfers(const settings & config, layer_groups & groups, token_table & tokens, counters & counted, const host_budget & budget)
        : config(config), groups(groups), tokens(tokens), counted(counted), budget(budget) {}

    // The context whose graphs compute on the rows; nothing has been computed before it is known.
    void            set_context(llama_context * ctx) { lctx = ctx; }
    llama_context * context() const { return lctx; }
    // Until the graphs have finished. Not llama_synchronize(): that one counts tokens. CUDA's set and get use another stream.
    void synchronize();
    // Those that compute the graphs. They stay as long as the context; their scheduler may not.
    std::vector<ggml_backend_t> backends() const;
    // Before any move: synchronise, and settle the last one. Moves run on backends(), but not through their scheduler.
    void prepare();

    // All of these work on all groups at once, given by group: one transfer.
    //
    // Room for the host copies that these records do not have yet. Copies of records that no sequence has frozen only save
    // time: near the limit they make way. Throws with no state changed but those.
    void reserve_host_room(const records_by_group & ids);
    // Give every one of these records a host copy; throws with nothing changed.
    void copy_to_host(const records_by_group & ids);
    // Out of one sequence's attention; the records have host copies.
    void freeze(group & g, uint32_t seq, const std::vector<uint32_t> & chosen);
    // Bytes of frozen tokens into free cells, where no other sequence has their records active; make_active() completes it.
    // Throws with nothing changed but free cells' bytes.
    struct fetched { std::vector<uint32_t> ids, cells; };
    std::vector<fetched> fetch(const std::vector<wanted_tokens> & wanted);
    void make_active(const std::vector<wanted_tokens> & wanted, const std::vector<fetched> & got);

    // The records that these plans freeze, each once; for reserve_host_room(), and then carry_out().
    records_by_group leaving(const std::vector<demand> & demands, const plans_by_group & plans) const;
    // A decision of each demand's sequence. Throws where rows cannot be moved: tokens that were frozen by then are booked so, all
    // others are as before, and the next step decides again. Where rows have to cross to another memory, a block is sealed: it
    // is copied once, when it leaves the window and its bytes cannot change any more; freezing its tokens later moves nothing.
    void carry_out(const std::vector<demand> & demands, const plans_by_group & plans, records_by_group leaving);

    // The bytes of one record's part, wherever they are.
    void read(const row_part & part, uint32_t id, uint8_t * out) const;

private:
    struct seal { size_t group; uint32_t seq, end; };
    std::vector<seal> add_sealed(const std::vector<demand> & demands, records_by_group & copied);
    std::vector<uint32_t> unsealed(const group & g, uint32_t seq, llama_pos pos_end, uint32_t & end) const;
    fetched find_cells(const group & g, const wanted_tokens & wanted) const;
    void bring_back(const std::vector<demand> & demands, const plans_by_group & plans);
    void count(const plan & done);

    const settings &    config;
    layer_groups &      groups;
    token_table &       tokens;
    counters &          counted;
    const host_budget & budget;
    llama_context *     lctx         = nullptr;
    bool                has_said_pageable = false;
};

} // namespace asrkf
