#include "llama/requests.h"

#include <algorithm>
#include <limits>

namespace asrkf {

std::vector<std::vector<uint32_t>> requests::chosen(uint32_t seq, uint32_t begin, uint32_t end, bool frozen) const {
    std::vector<std::vector<uint32_t>> result(groups.size());
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        for (uint32_t i = begin; i < end && !groups[ig].keeps_window; ++i) {
            if (groups[ig].rules[seq].is_frozen(i) == frozen) {
                result[ig].push_back(i);
            }
        }
    }
    return result;
}

void requests::check_unprotected(const sequence & s, uint32_t begin, uint32_t end) const {
    const llama_pos pos_end = tokens.pos_max(s) + 1;
    for (const group & g : groups) {
        const policy & rule = g.rules[s.id];
        for (uint32_t i = begin; i < end && !g.keeps_window; ++i) {
            if (rule.is_protected(i, pos_end)) {
                throw error(ASRKF_PROTECTED, format("position %d is protected (sinks %u, window from %d on, or pinned): freeze less, unpin it, or lower window",
                        tokens.records[s.records[i]].pos, rule.params.sinks, pos_end - llama_pos(rule.window())));
            }
        }
    }
}

uint64_t requests::freeze(int32_t seq_id, int32_t p0, int32_t p1) {
    const auto [begin, end] = tokens.range(seq_id, p0, p1);
    const sequence & s = tokens.named(seq_id);
    check_unprotected(s, begin, end);
    scored.fold_in();
    moves.prepare();
    stopwatch watch(counted.moves_seconds);
    const std::vector<std::vector<uint32_t>> leaving = chosen(s.id, begin, end, false);
    records_by_group ids(groups.size());
    uint64_t n = 0;
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        for (const uint32_t i : leaving[ig]) {
            ids[ig].push_back(s.records[i]);
        }
        n += leaving[ig].size();
    }
    moves.reserve_host_room(ids);
    moves.copy_to_host(ids);
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        moves.freeze(groups[ig], s.id, leaving[ig]);
        for (uint32_t i = begin; i < end && !groups[ig].keeps_window; ++i) {
            groups[ig].rules[s.id].set_frozen(i, true, true);
        }
    }
    return n;
}

uint64_t requests::restore(int32_t seq_id, int32_t p0, int32_t p1) {
    const auto [begin, end] = tokens.range(seq_id, p0, p1);
    const uint32_t seq = uint32_t(seq_id);
    scored.fold_in();
    moves.prepare();
    stopwatch watch(counted.moves_seconds);
    const std::vector<std::vector<uint32_t>> back = chosen(seq, begin, end, true);
    std::vector<wanted_tokens> wanted;
    uint64_t n = 0;
    for (const std::vector<uint32_t> & chosen : back) {
        wanted.push_back({ { seq, chosen } });
        n += chosen.size();
    }
    moves.make_active(wanted, moves.fetch(wanted));
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        for (const uint32_t i : back[ig]) {
            groups[ig].rules[seq].set_frozen(i, false, false);
        }
    }
    counted.restores_request_total += n;
    return n;
}

void requests::pin(int32_t seq_id, int32_t p0, int32_t p1, bool pinned) {
    tokens.range(seq_id, p0, p1); // checks
    sequence & s = tokens.named(seq_id);
    if (p1 < 0) { // to the end: of what is there to pin, of everything to unpin
        p1 = pinned ? std::max(p0, tokens.pos_max(s) + 1) : std::numeric_limits<int32_t>::max();
    }
    ranges after = without(s.pinned, p0, p1);
    if (pinned && p1 > p0) {
        after.emplace_back(p0, p1);
    }
    if (pinned) {
        groups.check_pools(count_positions(after));
    }
    s.pinned = after;
    const uint32_t begin = tokens.lower_bound(s, p0), end = tokens.lower_bound(s, p1);
    for (uint32_t i = begin; i < end; ++i) {
        groups.ranks_of(s.id).set_pinned(i, pinned);
    }
    for (group & g : groups) {
        g.rules[s.id].recheck();
    }
}

ranges requests::pinned(int32_t seq_id) const {
    ranges found = tokens.named(seq_id).pinned;
    std::sort(found.begin(), found.end());
    return found;
}

} // namespace asrkf
