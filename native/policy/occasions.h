// Why a sequence's next step decides, and which sequences score: numbers in, decisions out.
#pragma once

#include "policy/policy.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace asrkf {

// The occasions of one sequence's steps. A reset (anything but occasion::step) is asked for once, for the next step. Who
// takes tokens back behind a reset, no further than a rewalk, gets the same reset again: else the decision that the cut
// brings would undo part of it.
class occasions {
public:
    void ask_for(occasion why) { next = why; }
    // Of a step whose first new token is at pos.
    occasion at(int32_t pos, uint32_t rewalk_tokens) const {
        return next == occasion::step && pos < reset_pos && pos >= reset_pos - int32_t(rewalk_tokens) ? reset : next;
    }
    void decided(occasion why, int32_t pos) {
        next = occasion::step;
        if (why != occasion::step) {
            reset     = why;
            reset_pos = pos;
        }
    }
    void forget_reset() { reset_pos = -1; } // positions have changed
    void clear() { *this = {}; }

private:
    occasion next      = occasion::step;
    occasion reset     = occasion::step; // the last one that was not a step's,
    int32_t  reset_pos = -1;             // and where it came
};

// Of the sequences that are due, in the order of the batch, as many as the queries of one scoring step serve; at least one.
// The others are still due at the next step.
inline std::vector<uint32_t> choose_scored(std::vector<uint32_t> due, uint32_t score_queries, uint32_t most_queries) {
    due.resize(std::min<size_t>(due.size(), std::max(1u, most_queries / score_queries)));
    return due;
}

} // namespace asrkf
