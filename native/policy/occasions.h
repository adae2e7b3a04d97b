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

// When a sequence is cut (refreekv): where a prompt ends, and then every `repeat` tokens. A prompt ends with the only output of a call,
// at its last token, if tokens without an output came before it.
class cut_times {
public:
    struct call {
        uint32_t n_tokens = 0, n_outputs = 0;
        bool     ends_with_output = false;
    };
    // Is a cut due once this call is computed? To be asked once a call; repeat 0: never.
    bool is_due(const call & c, uint32_t repeat) {
        n_unsaid += c.n_tokens;
        n_since += c.n_tokens;
        if (!c.ends_with_output) {
            return false;
        }
        const bool due = (n_unsaid >= 2 && c.n_outputs == 1) || (repeat > 0 && n_since >= repeat);
        n_unsaid = 0;
        n_since  = due ? 0 : n_since;
        return due;
    }

    void clear() { *this = {}; }

private:
    uint32_t n_unsaid = 0; // tokens since the last output
    uint32_t n_since  = 0; // and since the last cut
};

// Of the sequences that are due, in the order of the batch, as many as the queries of one scoring step serve; at least one.
// The others are still due at the next step.
inline std::vector<uint32_t> choose_scored(std::vector<uint32_t> due, uint32_t score_queries, uint32_t most_queries) {
    due.resize(std::min<size_t>(due.size(), std::max(1u, most_queries / score_queries)));
    return due;
}

} // namespace asrkf
