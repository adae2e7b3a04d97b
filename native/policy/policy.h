// The freeze policy of one sequence in one layer group: numbers in, decisions out. Knows no tensor, no cell and no
// llama.cpp. Where several sequences share a pool, each decides about its share of it, which may change.
//
// Tokens are numbered by order of position (0 is the oldest). A decision is prepared by decide(), which changes
// nothing, and takes effect by commit(), after the engine has moved the bytes.
//
// Two drivers:
// - budget (asrkf and the controls window and random): every `interval` tokens keep the best-scored history that fits
//   beside sinks, window and the tokens to come; freeze the rest. With recall, frozen tokens have fresh scores, too:
//   a share of the history's cells goes to the blocks that the newest queries ask for, the rest to the best averages.
//   Where scores of frozen tokens are not known (recall off), a frozen token's timer runs floor(sqrt(c)/k) decisions, at
//   least one, c being how often it was frozen; then it may come back into a small share of the pool, stay a few
//   decisions, and is judged on fresh scores.
// - threshold (paper and the control flag-all; arXiv 2512.11221): at every check, flag what scores below tau, c += 1,
//   freeze for floor(sqrt(c)/k) checks, then judge anew. The pool is still a hard bound: what does not fit is frozen,
//   lowest score first. When c is reset is not published: here it never is while the token lives.
#pragma once

#include "policy/config.h"

#include <cstdint>
#include <vector>

namespace asrkf {

struct policy_params {
    uint32_t   pool_cells    = 0;
    uint32_t   sinks         = 0;
    uint32_t   window        = 0;
    bool       half_window   = false; // the window is half of the pool, whatever that is
    uint32_t   interval      = 1;
    uint32_t   block         = 32;
    bool       threshold     = false; // the paper's driver
    score_kind score         = SCORE_ATTENTION;
    float      ema           = 0;
    float      hysteresis    = 0;
    bool       recall        = false;
    float      recall_share  = 0;
    uint32_t   recall_limit  = 1;
    float      softness      = 1;
    float      timer_share   = 0;
    uint32_t   timer_grace   = 1;
    float      tau           = 0;
    uint32_t   seed          = 0;

    bool wants_scores() const { return score == SCORE_ATTENTION || score == SCORE_MAGNITUDE; }
};

policy_params make_policy_params(const asrkf_config & config, uint32_t pool_cells);

enum class cause { timer, window, refill, recall, recovery };

// Why a decision is made: the interval is over; a prompt has ended and its last tokens will be computed again; or output
// entropy asks for more, at one of the paper's levels.
enum class occasion { step, prompt_end, soft_reset, window_reset, full_reset };

constexpr uint32_t RECALL_BLOCK = 16; // tokens that are recalled together: an answer is longer than a token

struct restoration {
    uint32_t token;
    cause    why;
};

// What to do before the next tokens are placed. All token numbers ascend within freeze.
struct plan {
    bool                     decided = false; // false: nothing was due
    occasion                 why     = occasion::step;
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

    // The cells to decide about from now on.
    void resize(uint32_t pool_cells);

    // Bookkeeping, by the engine. Positions ascend.
    void append(int32_t pos) { insert(n_tokens(), pos); }
    void insert(uint32_t token, int32_t pos);
    // A token is one of another sequence, too, or a frozen copy of it: what is known of that one, but pins.
    void copy_token(uint32_t token, const policy & from, uint32_t from_token, bool frozen_copy);
    void move_to(uint32_t token, int32_t pos);               // positions have changed
    void reorder(const std::vector<uint32_t> & order);       // and no longer ascended: which token comes first, second, ...
    void erase(uint32_t begin, uint32_t end);
    void clear();
    void set_pinned(uint32_t token, bool pinned);
    void recheck() { protection_changed = true; }            // protected tokens may be frozen: look at the next step
    void set_frozen(uint32_t token, bool frozen, bool held); // explicit freeze (held: no timer) and restore
    void set_frozen_copy(uint32_t token);                    // its bytes are on the host now: if it was active, it comes back first
    // Fresh scores: averaged over heads, and of the head that wants it most. Frozen tokens' count with recall only. The
    // old average counts `keep`, see average_weight().
    void observe(uint32_t token, float score, float peak, float keep);
    // ema is for an interval of tokens: a step of many leaves less of the old average.
    float average_weight() const;

    uint64_t n_redundant() const { return redundant_count; } // recalls that did not outlast the next decision

    uint32_t n_tokens() const { return uint32_t(tokens.size()); }
    uint32_t n_frozen() const { return frozen_count; }
    uint32_t n_active() const { return n_tokens() - frozen_count; }
    bool     is_frozen(uint32_t token) const { return tokens[token].frozen; }
    bool     is_protected(uint32_t token, int32_t pos_end) const; // with the window ending before pos_end
    int32_t  pos(uint32_t token) const { return tokens[token].pos; }

    // Does the next step want its scores read, and has the pool come near enough to full for them to matter?
    bool scores_due(uint32_t n_new) const;

    // Prepare the step that adds n_new tokens from position pos_new on. Throws error(ASRKF_POOL_FULL) if they can
    // never fit; changes nothing. Anything but occasion::step decides in any case.
    // frugal: freeze no token for the sake of another, so that as little as possible is frozen.
    plan decide(uint32_t n_new, int32_t pos_new, occasion why = occasion::step, bool frugal = false) const;
    void commit(const plan & done);
    // The step's tokens have been appended.
    void advance(uint32_t n_new, bool scored);

    // Scores, timers and what is frozen as bytes, for a saved state; load() throws error(ASRKF_INVALID_ARGUMENT) and changes
    // nothing if they are not those of so many tokens. Positions and pins are not among them. All tokens are to be frozen
    // when load() is called: the next decision brings back what was active, as far as the pool goes.
    std::vector<uint8_t> save() const;
    static bool fits(const std::vector<uint8_t> & bytes, uint32_t n_tokens);
    void load(const std::vector<uint8_t> & bytes);

    policy_params params; // changed by resize() only

private:
    struct token {
        int32_t  pos      = 0;
        float    score    = 0;
        float    peak     = 0;
        bool     observed = false;
        bool     frozen   = false;
        bool     held     = false;  // frozen by request: only a request (or the window) brings it back
        bool     pinned   = false;
        bool     returns  = false;  // was active in the state that was loaded: comes back first
        uint32_t count    = 0;      // c: times found unimportant
        uint32_t wake     = 0;      // decision at which the timer ends
        uint32_t grace    = 0;      // decision before which a token restored by timer is not judged
        uint32_t frozen_at   = 0;   // decision that froze it last
        uint32_t recalled_at = 0;   // decision that recalled it last, 0: never
    };

    struct choice; // by_budget.cpp

    float rank(uint32_t index) const; // what decides who stays
    std::vector<float> all_ranks() const;
    uint32_t timer(uint32_t count) const;
    std::vector<uint32_t> blocks_asked_for(int32_t pos_end, size_t n_tokens_wanted, bool with_neighbours) const;
    void decide_by_budget(plan & result, uint32_t capacity, int32_t pos_end, occasion why, bool frugal) const;
    void decide_by_threshold(plan & result, uint32_t capacity, int32_t pos_end) const;

    std::vector<token> tokens;
    uint32_t frozen_count        = 0;
    uint64_t redundant_count     = 0;
    uint32_t decision            = 0;
    uint32_t tokens_since_decide = 0;
    uint32_t tokens_since_score  = 0;
    uint32_t tokens_of_score     = 1; // that the last scores stand for
    bool     protection_changed  = false; // tokens that must be active again may be frozen
    bool     returning           = false; // some tokens of a loaded state come back first
};

} // namespace asrkf
