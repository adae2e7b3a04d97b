// What a caller asks for by position: freeze, restore, pin. All or nothing.
#pragma once

#include "llama/scores.h"

namespace asrkf {

class requests {
public:
    requests(layer_groups & groups, token_table & tokens, transfers & moves, scores & scored, counters & counted)
        : groups(groups), tokens(tokens), moves(moves), scored(scored), counted(counted) {}

    // Positions [p0, p1), p1 < 0: to the end. Return how many tokens changed, over all groups. A frozen one stays frozen until
    // a request, or the window, brings it back. Throw error (see asrkf.h) with nothing changed.
    uint64_t freeze (int32_t seq_id, int32_t p0, int32_t p1);
    uint64_t restore(int32_t seq_id, int32_t p0, int32_t p1);
    void     pin    (int32_t seq_id, int32_t p0, int32_t p1, bool pinned);
    ranges   pinned (int32_t seq_id) const; // ascending

private:
    // Of each group: tokens [begin, end) that are frozen, or are not. None where a sliding window is kept.
    std::vector<std::vector<uint32_t>> chosen(uint32_t seq, uint32_t begin, uint32_t end, bool frozen) const;
    void check_unprotected(const sequence & s, uint32_t begin, uint32_t end) const;

    layer_groups & groups;
    token_table &  tokens;
    transfers &    moves;
    scores &       scored;
    counters &     counted;
};

} // namespace asrkf
