#include "scoring/query_rings.h"

#include <numeric>

namespace asrkf {

void query_rings::keep(const std::vector<int32_t> & step_pos, std::vector<int32_t> & tokens, std::vector<int64_t> & rows) {
    const uint32_t n = uint32_t(step_pos.size()), n_spread = std::min(n, n_queries), n_end = std::min(n, PROMPT_END_QUERIES);
    const size_t n_tokens_before = tokens.size(), n_rows_before = rows.size();
    for (uint32_t i = 0; i < n_spread; ++i) { // a long step is judged by queries from all over it, not by its end
        tokens.push_back(int32_t((i + 1)*n/n_spread) - 1);
        rows.push_back(first_row + next);
        next = (next + 1) % n_queries;
    }
    for (uint32_t i = 0; i < n_end; ++i) {
        tokens.push_back(int32_t(n - n_end + i));
        rows.push_back(first_row + n_queries + next_end);
        next_end = (next_end + 1) % PROMPT_END_QUERIES;
    }
    for (size_t i = 0; n_rows_before + i < rows.size(); ++i) {
        pos[size_t(rows[n_rows_before + i]) - first_row] = step_pos[size_t(tokens[n_tokens_before + i])];
    }
}

void query_rings::forget_from(int32_t first_pos) {
    for (int32_t & p : pos) {
        p = p >= first_pos ? -1 : p;
    }
}

std::pair<uint32_t, uint32_t> query_rings::range(askers who) const {
    switch (who) {
        case askers::prompt_end: return { n_queries, n_queries + PROMPT_END_QUERIES };
        case askers::newest:     return { (next + n_queries - 1) % n_queries, (next + n_queries - 1) % n_queries + 1 };
        default:                 return { 0, n_queries };
    }
}

std::vector<int32_t> query_rings::scoring_rows(askers who) const {
    const auto [begin, end] = range(who);
    std::vector<int32_t> rows(end - begin);
    std::iota(rows.begin(), rows.end(), int32_t(first_row + begin));
    return rows;
}

std::vector<int32_t> query_rings::positions(askers who) const {
    const auto [begin, end] = range(who);
    return std::vector<int32_t>(pos.begin() + begin, pos.begin() + end);
}

} // namespace asrkf
