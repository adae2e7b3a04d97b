#include "llama/tokens.h"

#include <algorithm>
#include <limits>

namespace asrkf {

sequence::sequence(const asrkf_config & config, uint32_t id, const ranges & pinned)
    : id(id), rings(config.score_queries, id*(config.score_queries + PROMPT_END_QUERIES)), newest(config.rows, id*config.rows),
      trigger(recovery_kind(config.recovery), trigger_kind(config.trigger), config.trigger_share, 2*config.interval, config.seed),
      look(look_trigger_kind(config.look_trigger), config.look_share, config.seed), pinned(pinned) {}

token_table::token_table(const settings & config, layer_groups & groups, bool has_index) : config(config), groups(groups) {
    for (uint32_t seq = 0; seq < config.n_seq_max; ++seq) {
        sequences.emplace_back(config, seq, parse_positions("pinned", config.pinned));
    }
    if (has_index) {
        index = std::make_unique<index_rows>(config.n_index_rows(), config.index_tokens_per_row());
    }
}

sequence & token_table::named(int32_t seq_id) {
    if (seq_id < 0 || uint32_t(seq_id) >= sequences.size()) {
        throw error(ASRKF_INVALID_ARGUMENT, format("there is no sequence %d: this context has %zu (n_seq_max, -np)", seq_id, sequences.size()));
    }
    return sequences[size_t(seq_id)];
}

uint32_t token_table::lower_bound(const sequence & s, llama_pos pos) const {
    return uint32_t(std::lower_bound(s.records.begin(), s.records.end(), pos, [&](uint32_t id, llama_pos p) { return records[id].pos < p; }) - s.records.begin());
}

std::pair<uint32_t, uint32_t> token_table::range(int32_t seq_id, int32_t p0, int32_t p1) const {
    const sequence & s = named(seq_id);
    p1 = p1 < 0 ? std::numeric_limits<int32_t>::max() : p1;
    if (p0 < 0 || p0 > p1) {
        throw error(ASRKF_INVALID_ARGUMENT, format("[%d, %d) is not a range of positions", p0, p1));
    }
    return { lower_bound(s, p0), lower_bound(s, p1) };
}

void token_table::reserve_records(size_t n_more) {
    make_room(records, n_more);
    free_records.reserve(records.capacity()); // so nothing that is released needs memory
    for (group & g : groups) {
        make_room(g.places, n_more);
    }
    if (index) {
        index->reserve(records.capacity());
    }
}

void token_table::reserve_tokens(const sequence & s, size_t n_more) {
    make_room(sequences[s.id].records, n_more);
    groups.ranks_of(s.id).reserve(n_more);
    for (group & g : groups) {
        g.rules[s.id].reserve(n_more);
    }
}

uint32_t token_table::take_record() {
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

// What its first sequence has before it, it follows in the index, unless other sequences have that.
uint32_t token_table::new_record(llama_pos pos, llama_token token, const std::vector<uint32_t> & users) {
    const uint32_t id = take_record();
    records[id] = { pos, token, {} };
    for (const uint32_t seq : users) {
        records[id].users.set(seq);
    }
    if (index) {
        const std::vector<uint32_t> & before = sequences[users[0]].records;
        index->append(id, !before.empty() && records[before.back()].users == records[id].users ? int64_t(before.back()) : -1);
    }
    for (const uint32_t seq : users) {
        insert(sequences[seq], id);
    }
    return id;
}

uint32_t token_table::new_copy(uint32_t id, int64_t after) {
    const uint32_t copy = take_record();
    records[copy] = { records[id].pos, records[id].token, {} };
    if (index) {
        index->append(copy, after);
    }
    return copy;
}

uint32_t token_table::insert(sequence & s, uint32_t id) {
    const llama_pos pos = records[id].pos;
    uint32_t i = s.n_tokens();
    if (i > 0 && records[s.records.back()].pos > pos) {
        i = lower_bound(s, pos + 1);
        s.seen.clear();
    }
    s.records.insert(s.records.begin() + i, id);
    records[id].users.set(s.id);
    const bool is_pinned = contains(s.pinned, pos);
    groups.ranks_of(s.id).insert(i, pos);
    groups.ranks_of(s.id).set_pinned(i, is_pinned);
    for (group & g : groups) {
        g.rules[s.id].insert(i);
        if (is_pinned) {
            g.rules[s.id].recheck();
        }
        g.unseal(s.id, i, config.block);
    }
    return i;
}

void token_table::release(uint32_t id) {
    for (group & g : groups) {
        g.release_copy(id);
        g.places[id] = {};
    }
    if (index) {
        index->release(id);
    }
    records[id] = {};
    free_records.push_back(id);
}

} // namespace asrkf
