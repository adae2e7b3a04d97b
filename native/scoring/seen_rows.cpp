#include "scoring/seen_rows.h"

#include "common.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace asrkf {

void seen_rows::update(const index_rows & index, const std::vector<uint32_t> & records, const std::vector<const uint64_t *> & active) {
    if (makes_anew) {
        clear();
    }
    for (size_t i = rows.size(); i < records.size(); ++i) {
        add(index[records[i]]);
    }
    frozen.resize(active.size());
    for (size_t set = 0; set < active.size(); ++set) {
        frozen_tokens & known = frozen[set];
        known.tokens.resize((rows.size() + 63) / 64, 0);
        known.counts.resize(counts.size(), 0);
        for (size_t w = 0; w < known.tokens.size(); ++w) {
            const uint64_t there = (w + 1)*64 <= rows.size() ? ~uint64_t(0) : ~(~uint64_t(0) << (rows.size() % 64));
            const uint64_t now = ~active[set][w] & there;
            for (uint64_t changed = now ^ known.tokens[w]; changed; changed &= changed - 1) {
                const uint32_t bit = uint32_t(__builtin_ctzll(changed));
                known.counts[rows[w*64 + bit]] += now >> bit & 1 ? 1.0f : -1.0f;
            }
            known.tokens[w] = now;
        }
    }
}

void seen_rows::add(uint32_t row) {
    make_room(rows);
    if (row >= counts.size()) { // what can fail comes first
        make_room(counts, row + 1 - counts.size());
        make_room(logs,   row + 1 - logs.size());
        counts.resize(row + 1, 0);
        logs.resize(row + 1, -INFINITY);
    }
    rows.push_back(row);
    logs[row] = std::log(++counts[row]);
    most = std::max(most, counts[row]);
}

// Few tokens are newer than a query that scores.
void seen_rows::write_mask(uint32_t n, float * mask, uint32_t n_rows) {
    std::fill(std::copy(logs.begin(), logs.end(), mask), mask + n_rows, -INFINITY);
    for (size_t i = n; i < rows.size(); ++i) {
        mask[rows[i]] = std::log(--counts[rows[i]]); // log(0) is -inf
    }
    for (size_t i = n; i < rows.size(); ++i) {
        ++counts[rows[i]];
    }
}

void seen_rows::write_frozen(const std::vector<const seen_rows *> & sequences, size_t n_sets, uint32_t n_rows, std::vector<float> & parts) {
    parts.resize(n_sets*n_rows);
    for (size_t set = 0; set < n_sets; ++set) {
        float * part = parts.data() + set*n_rows;
        const std::vector<float> & first = sequences[0]->frozen[set].counts;
        std::fill(std::copy(first.begin(), first.end(), part), part + n_rows, 0.0f);
        for (size_t s = 1; s < sequences.size(); ++s) {
            const std::vector<float> & more = sequences[s]->frozen[set].counts;
            std::transform(more.begin(), more.end(), part, part, std::plus<>());
        }
    }
    if (sequences.size() == 1 && sequences[0]->most <= 1) {
        return;
    }
    std::vector<float> tokens(n_rows, 0);
    for (const seen_rows * s : sequences) {
        std::transform(s->counts.begin(), s->counts.end(), tokens.begin(), tokens.begin(), std::plus<>());
    }
    for (size_t i = 0; i < parts.size(); ++i) {
        parts[i] /= std::max(1.0f, tokens[i % n_rows]);
    }
}

} // namespace asrkf
