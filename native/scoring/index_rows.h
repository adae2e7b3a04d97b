#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace asrkf {

// Which row of the index each record (a token's K and V, which sequences may share) has. One that goes gives its place
// back. Where many short ranges went, no row may be free: then another row takes more tokens than the others.
class index_rows {
public:
    index_rows(uint32_t n_rows, uint32_t tokens_per_row);

    void     reserve(size_t n_records) { rows.reserve(n_records); }
    // after: the record before it, -1 for none or one of other sequences: a mean is of tokens that belong together.
    void     append(uint32_t record, int64_t after);
    void     release(uint32_t record);
    uint32_t operator[](uint32_t record) const { return rows[record]; }
    uint32_t tokens_of(uint32_t row) const { return counts[row]; }
    uint32_t n_used() const { return end; } // rows from 0 on that hold all tokens

    const uint32_t tokens_per_row;

private:
    std::vector<uint32_t> rows;      // by record
    std::vector<uint32_t> counts;    // by row: its tokens
    std::vector<uint32_t> free_rows; // the last is taken first
    uint32_t              end = 0;   // behind the last row that has tokens
};

} // namespace asrkf
