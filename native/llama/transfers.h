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

using wanted_tokens = std::vector<std::pair<uint32_t, std::vector<uint32_t>>>; // tokens of each sequence

class transfers {
public:
    transfers(const settings & config, layer_groups & groups, token_table & tokens, counters & counted)
        : config(config), groups(groups), tokens(tokens), counted(counted) {}

    // The context whose graphs compute on the rows; nothing has been computed before it is known.
    void            set_context(llama_context * ctx) { lctx = ctx; }
    llama_context * context() const { return lctx; }
    // Until the graphs have finished. Not llama_synchronize(): that one counts tokens. CUDA's set and get use another stream.
    void synchronize();
    // Before any move: synchronise, and find the backends. Moves run on those that compute the graphs, but not through
    // their scheduler.
    void prepare();

    // Room for the host copies that these records do not have yet. Copies of records that no sequence has frozen only save
    // time: near the limit they make way. Throws with no state changed but those.
    void reserve_host_room(group & g, const std::vector<uint32_t> & ids);
    // Give every one of these records a host copy; throws with nothing changed.
    void copy_to_host(group & g, const std::vector<uint32_t> & ids);
    // Out of one sequence's attention; the records have host copies.
    void freeze(group & g, uint32_t seq, const std::vector<uint32_t> & chosen);
    // Bytes of frozen tokens into free cells, where no other sequence has their records active; make_active() completes it.
    // Throws with nothing changed but free cells' bytes.
    struct fetched { std::vector<uint32_t> ids, cells; };
    fetched fetch(group & g, const wanted_tokens & wanted);
    void make_active(group & g, const wanted_tokens & wanted, const fetched & got);

    // A decision of each demand's sequence, in one group. Throws where rows cannot be moved: tokens that were frozen by then are
    // booked so, all others are as before, and the next step decides again.
    void carry_out(group & g, const std::vector<demand> & demands, const std::vector<plan> & plans);
    // Where rows have to cross to another memory, a block is copied once, when it leaves the window and its bytes cannot
    // change any more; freezing its tokens later moves nothing. Without room for copies ahead of time it does nothing.
    void seal(group & g, uint32_t seq, llama_pos pos_end);

    // The bytes of one record's part, wherever they are.
    void read(const row_part & part, uint32_t id, uint8_t * out) const;

private:
    void count(const plan & done);

    const settings & config;
    layer_groups &   groups;
    token_table &    tokens;
    counters &       counted;
    llama_context *  lctx = nullptr;
};

} // namespace asrkf
