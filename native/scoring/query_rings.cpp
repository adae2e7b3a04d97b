#include "scoring/query_rings.h"

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

std::vector<int32_t> query_rings::scoring_rows(bool prompt_end) const {
    std::vector<int32_t> rows;
    for (uint32_t i = prompt_end ? n_queries : 0; i < (prompt_end ? n_queries + PROMPT_END_QUERIES : n_queries); ++i) {
        rows.push_back(int32_t(first_row + i));
    }
    return rows;
}

std::vector<int32_t> query_rings::positions(bool prompt_end) const {
    return prompt_end ? std::vector<int32_t>(pos.begin() + n_queries, pos.end()) : std::vector<int32_t>(pos.begin(), pos.begin() + n_queries);
}

} // namespace asrkf
