// The freeze policy of one layer group: numbers in, decisions out. Knows no tensor, no cell and no llama.cpp.
//
// Tokens are numbered by order of position (0 is the oldest). A decision is prepared by decide(), which changes
// nothing, and takes effect by commit(), after the engine has moved the bytes.
//
// Two drivers:
// - budget (asrkf and the controls window and random): every `interval` tokens keep the best-scored history that fits
//   beside sinks, window and the tokens to come; freeze the rest. A frozen token's timer runs floor(sqrt(c)/k)
//   decisions, at least one, where c counts how often it was frozen; then it may come back into a small share of the
//   pool, stay a few decisions, and is judged on fresh scores.
// - threshold (paper and the control flag-all; arXiv 2512.11221): at every check, flag what scores below tau, c += 1,
//   freeze for floor(sqrt(c)/k) checks, then judge anew. The pool is still a hard bound: what does not fit is frozen,
//   lowest score first. When c is reset is not published: here it never is while the token lives.
#pragma once

#include "config.h"

#include <cstdint>
#include <vector>

namespace asrkf {

struct policy_params {
    uint32_t   pool_cells    = 0;
    uint32_t   sinks         = 0;
    uint32_t   window        = 0;
    uint32_t   interval      = 1;
    uint32_t   block         = 32;
    bool       threshold     = false; // the paper's driver
    score_kind score         = SCORE_ATTENTION;
    float      ema           = 0;
    float      softness      = 1;
    float      timer_share   = 0;
    uint32_t   timer_grace   = 1;
    float      tau           = 0;
    uint32_t   seed          = 0;

    bool wants_scores() const { return score == SCORE_ATTENTION || score == SCORE_MAGNITUDE; }
};

policy_params make_policy_params(const asrkf_config & config, uint32_t pool_cells);

enum class cause { timer, window, refill };

struct restoration {
    uint32_t token;
    cause    why;
};

// What to do before the next tokens are placed. All token numbers ascend within freeze.
struct plan {
    bool                     decided = false; // false: nothing was due
    std::vector<uint32_t>    flagged;         // threshold driver: c += 1
    std::vector<uint32_t>    freeze;
    std::vector<restoration> restore;
};

class policy {
public:
    explicit policy(const policy_params & params) : params(params) {}

    // Cells that must fit beside each other in the smallest legal pool: sinks + window + pinned + one batch + two blocks.
    static uint64_t required_cells(const policy_params & params, uint32_t n_ubatch, uint32_t n_pinned);

    // Longest step to let through: half a window, so that every new token sees at least half a window of its past.
    uint32_t max_ubatch() const;

    // Bookkeeping, by the engine. Positions ascend.
    void append(int32_t pos);
    void erase(uint32_t begin, uint32_t end);
    void clear();
    void set_pinned(uint32_t token, bool pinned);
    void recheck() { protection_changed = true; }            // protected tokens may be frozen: look at the next step
    void set_frozen(uint32_t token, bool frozen, bool held); // explicit freeze (held: no timer) and restore
    void observe(uint32_t token, float score);               // a fresh score of an active token

    uint32_t n_tokens() const { return uint32_t(tokens.size()); }
    uint32_t n_frozen() const { return frozen_count; }
    uint32_t n_active() const { return n_tokens() - frozen_count; }
    bool     is_frozen(uint32_t token) const { return tokens[token].frozen; }
    bool     is_protected(uint32_t token, int32_t pos_end) const; // with the window ending before pos_end
    int32_t  pos(uint32_t token) const { return tokens[token].pos; }

    // Does the next step want its scores read, and has the pool come near enough to full for them to matter?
    bool scores_due(uint32_t n_new) const;

    // Prepare the step that adds n_new tokens from position pos_new on. Throws error(ASRKF_POOL_FULL) if they can
    // never fit; changes nothing.
    plan decide(uint32_t n_new, int32_t pos_new) const;
    void commit(const plan & done);
    // The step's tokens have been appended.
    void advance(uint32_t n_new, bool scored);

    const policy_params params;

private:
    struct token {
        int32_t  pos      = 0;
        float    score    = 0;
        bool     observed = false;
        bool     frozen   = false;
        bool     held     = false;  // frozen by request: only a request (or the window) brings it back
        bool     pinned   = false;
        uint32_t count    = 0;      // c: times found unimportant
        uint32_t wake     = 0;      // decision at which the timer ends
        uint32_t grace    = 0;      // decision before which a token restored by timer is not judged
    };

    float rank(uint32_t index) const; // what decides who stays
    uint32_t timer(uint32_t count) const;
    void decide_by_budget(plan & result, uint32_t capacity, int32_t pos_end) const;
    void decide_by_threshold(plan & result, uint32_t capacity, int32_t pos_end) const;

    std::vector<token> tokens;
    uint32_t frozen_count        = 0;
    uint32_t decision            = 0;
    uint32_t tokens_since_decide = 0;
    uint32_t tokens_since_score  = 0;
    bool     protection_changed  = false; // tokens that must be active again may be frozen
};

} // namespace asrkf
