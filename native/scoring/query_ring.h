#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace asrkf {

// The newest queries of a sequence, whatever its steps: which row of the device holds each, and its position.
class query_ring {
public:
    // first_row: of the device's rows, n_rows from here on are this sequence's.
    query_ring(uint32_t n_rows, uint32_t first_row) : first_row(first_row), pos(n_rows, -1) {}

    // Of a step at these positions: tokens to keep, and the device's row of each; appended.
    void keep(const std::vector<int32_t> & step_pos, std::vector<int32_t> & tokens, std::vector<int64_t> & rows) {
        for (size_t i = step_pos.size() - std::min(step_pos.size(), pos.size()); i < step_pos.size(); ++i) {
            tokens.push_back(int32_t(i));
            rows.push_back(int64_t(first_row) + int64_t(next));
            pos[next] = step_pos[i];
            next = (next + 1) % pos.size();
        }
    }
    void forget_from(int32_t first_pos) {
        for (int32_t & p : pos) {
            p = p >= first_pos ? -1 : p;
        }
    }
    struct kept { int32_t row, pos; };
    std::vector<kept> all() const { // that are still there
        std::vector<kept> found;
        for (size_t i = 0; i < pos.size(); ++i) {
            if (pos[i] >= 0) {
                found.push_back({ int32_t(first_row + i), pos[i] });
            }
        }
        return found;
    }

private:
    uint32_t             first_row;
    std::vector<int32_t> pos; // by row; -1: none
    size_t               next = 0;
};

} // namespace asrkf
