#pragma once

#include "scoring/index_rows.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace asrkf {

// What one sequence sees of the index: of each row its tokens, and which of them are frozen. Kept from one scoring to the
// next: a scoring costs what has changed since, and copies.
class seen_rows {
public:
    // Tokens that came since are added, and of all tokens noted who is frozen: active has a bit for each token, in words of 64, by
    // set of layers. Where tokens have got other numbers or records, clear() comes first.
    void update(const index_rows & index, const std::vector<uint32_t> & records, const std::vector<const uint64_t *> & active);
    void clear() { *this = {}; }

    // The mask of a query that sees the first n tokens, for n_rows rows: log of the tokens that a row stands for.
    void write_mask(uint32_t n, float * mask, uint32_t n_rows);
    bool has(uint32_t row) const { return row < counts.size() && counts[row] > 0; }
    uint32_t first_row() const { return rows[0]; }

    // By set, then by row: the part of these sequences' tokens that is frozen.
    static void write_frozen(const std::vector<const seen_rows *> & sequences, size_t n_sets, uint32_t n_rows, std::vector<float> & parts);

private:
    struct frozen_tokens {
        std::vector<uint64_t> tokens; // a bit for each
        std::vector<float>    counts; // by row
    };
    void add(uint32_t row);

    std::vector<uint32_t>      rows;   // by token
    std::vector<float>         counts; // by row, up to the last that it has; of its tokens,
    std::vector<float>         logs;   // and their log
    float                      most = 0; // tokens of any row
    std::vector<frozen_tokens> frozen; // by set
};

} // namespace asrkf
