#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace asrkf {

// The queries of a sequence that are kept: of steps a few, spread over a long one; and the newest tokens' all, for where
// a prompt ends.
constexpr uint32_t PROMPT_END_QUERIES = 32;

// Which of them score: those of the newest steps, those at a prompt's end, or the newest alone.
enum class askers { of_steps, prompt_end, newest };

class query_rings {
public:
    // first_row: of the device's rows, those from here on are this sequence's.
    query_rings(uint32_t n_queries, uint32_t first_row) : n_queries(n_queries), first_row(first_row), pos(n_queries + PROMPT_END_QUERIES, -1) {}

    static uint32_t n_kept(uint32_t n_tokens, uint32_t n_queries) { return std::min(n_tokens, n_queries) + std::min(n_tokens, PROMPT_END_QUERIES); }
    // Of a step at these positions: tokens to keep, and the device's row of each; appended.
    void keep(const std::vector<int32_t> & step_pos, std::vector<int32_t> & tokens, std::vector<int64_t> & rows);
    void forget_from(int32_t first_pos);
    // The queries that score: their rows, and positions, -1 for none.
    std::vector<int32_t> scoring_rows(askers who) const;
    std::vector<int32_t> positions(askers who) const;

private:
    std::pair<uint32_t, uint32_t> range(askers who) const; // of its own rows, from the first on

    uint32_t             n_queries, first_row;
    std::vector<int32_t> pos; // by row: those of steps, then those for a prompt's end
    uint32_t             next = 0, next_end = 0;
};

} // namespace asrkf
