#include "scoring/index_rows.h"

#include <algorithm>

namespace asrkf {

index_rows::index_rows(uint32_t n_rows, uint32_t tokens_per_row) : tokens_per_row(tokens_per_row), counts(n_rows, 0) {
    for (uint32_t row = n_rows; row-- > 0; ) {
        free_rows.push_back(row);
    }
}

void index_rows::append(uint32_t record, int64_t after) {
    rows.resize(std::max<size_t>(rows.size(), record + 1));
    if (after >= 0 && counts[rows[size_t(after)]] < tokens_per_row) {
        rows[record] = rows[size_t(after)];
    } else if (!free_rows.empty()) {
        rows[record] = free_rows.back();
        free_rows.pop_back();
    } else {
        rows[record] = after >= 0 ? rows[size_t(after)] : uint32_t(std::min_element(counts.begin(), counts.end()) - counts.begin());
    }
    counts[rows[record]]++;
    end = std::max(end, rows[record] + 1);
}

void index_rows::release(uint32_t record) {
    if (--counts[rows[record]] == 0) {
        free_rows.push_back(rows[record]);
    }
    while (end > 0 && counts[end - 1] == 0) {
        end--;
    }
}

} // namespace asrkf
