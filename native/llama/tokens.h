// Which tokens there are, and who has them.
//
// A token's K and V rows are a record; sequences that share a prefix share its records. A record's bytes are in a cell, in a
// slot of the host store, or both, and that is all that exists once (groups.h: place). Whether a token is active is a matter
// of each sequence, and stands in the cell's own set of sequences. A frozen token's record always has a slot.
#pragma once

#include "llama/groups.h"
#include "policy/entropy.h"
#include "policy/occasions.h"
#include "policy/second_look.h"
#include "scoring/query_ring.h"
#include "scoring/query_rings.h"
#include "scoring/seen_rows.h"

#include <memory>

namespace asrkf {

struct record {
    llama_pos                 pos   = -1;
    llama_token               token = LLAMA_TOKEN_NULL; // null: it came as an embedding, or from a state that does not say
    llama_kv_cells::seq_set_t users;                    // the sequences that have it, active or frozen
};

struct sequence {
    sequence(const asrkf_config & config, uint32_t id, const ranges & pinned);

    uint32_t n_tokens() const { return uint32_t(records.size()); }

    const uint32_t        id;
    std::vector<uint32_t> records;         // by token, in order of position
    query_rings           rings;
    query_ring            newest;          // of all layers, for cuts
    seen_rows             seen;            // of the index, at its last scoring: cleared where tokens get other numbers or records
    recovery_trigger      trigger;
    occasions             why;
    look_rule             look;
    cut_times             cuts;
    ranges                pinned;
    int32_t               output     = 0;  // the last call's last output, counted from the end: -1, -2, ...; 0: none
    llama_pos             call_begin = -1; // first position of the current call
    std::string           fault;           // why the next decode must fail, until it is emptied
};

class token_table {
public:
    // has_index: tokens are scored, so each record has a row of the index.
    token_table(const settings & config, layer_groups & groups, bool has_index);

    uint32_t n_records() const { return uint32_t(records.size() - free_records.size()); }
    sequence &       named(int32_t seq_id); // throws error(ASRKF_INVALID_ARGUMENT)
    const sequence & named(int32_t seq_id) const { return const_cast<token_table *>(this)->named(seq_id); }
    bool      has(int32_t seq_id) const { return seq_id >= 0 && uint32_t(seq_id) < sequences.size() && sequences[size_t(seq_id)].n_tokens() > 0; }
    llama_pos pos_min(const sequence & s) const { return s.records.empty() ? -1 : records[s.records.front()].pos; }
    llama_pos pos_max(const sequence & s) const { return s.records.empty() ? -1 : records[s.records.back()].pos; }
    // The first token of the sequence at pos or later.
    uint32_t lower_bound(const sequence & s, llama_pos pos) const;
    // Tokens [first, second) at positions [p0, p1), p1 < 0: to the end. Throws error(ASRKF_INVALID_ARGUMENT).
    std::pair<uint32_t, uint32_t> range(int32_t seq_id, int32_t p0, int32_t p1) const;

    // Room in all tables for so many new records, and tokens of this sequence: what comes after cannot fail for lack of memory, and
    // leave a token in some tables only.
    void     reserve_records(size_t n_more);
    void     reserve_tokens(const sequence & s, size_t n_more);
    // A token of these sequences, active in none yet.
    uint32_t new_record(llama_pos pos, llama_token token, const std::vector<uint32_t> & users);
    // The same rows as another's, for a copy: of no sequence yet. after: the copy before it, -1 for the first.
    uint32_t new_copy(uint32_t id, int64_t after);
    // A record becomes the sequence's token where its position belongs. Returns which.
    uint32_t insert(sequence & s, uint32_t id);
    // No sequence has it any more.
    void     release(uint32_t id);

    std::vector<record>         records;
    std::vector<sequence>       sequences;
    std::unique_ptr<index_rows> index;          // which row each record has; null without scoring
    std::vector<uint32_t>       in_flight;      // records of a step that was placed and not computed yet
    llama_pos                   rewalk_begin = -1; // first position that is being computed again

private:
    uint32_t take_record();

    const settings &      config;
    layer_groups &        groups;
    std::vector<uint32_t> free_records;         // the last is taken first
};

} // namespace asrkf
