// The freeze policy of one sequence in one layer group: numbers in, decisions out. Knows no tensor, no cell and no
// llama.cpp. Where several sequences share a pool, each decides about its share of it, which may change.
//
// Positions, pins and scores are alike in all groups of a sequence: its ranking has them (ranking.h). Here is what differs:
// who is active, and for methods with timers what each token has behind it. Tokens are numbered by order of position (0 is
// the oldest). A decision is prepared by decide(), which changes nothing, and takes effect by commit(), after the engine
// has moved the bytes. What a decision costs goes by the tokens near its threshold, and by words of 64 tokens for the rest.
//
// Three drivers:
// - budget (asrkf and the controls window and random): every `interval` tokens keep the best-scored history that fits
//   beside sinks, window and the tokens to come; freeze the rest. With recall, frozen tokens have fresh scores, too:
//   a share of the history's cells goes to the blocks that the newest queries ask for, the rest to the best averages.
//   Where scores of frozen tokens are not known (recall off), a frozen token's timer runs floor(sqrt(c)/k) decisions, at
//   least one, c being how often it was frozen; then it may come back into a small share of the pool, stay a few
//   decisions, and is judged on fresh scores.
// - threshold (paper and the control flag-all; arXiv 2512.11221): at every check, flag what scores below tau, c += 1,
//   freeze for floor(sqrt(c)/k) checks, then judge anew. The pool is still a hard bound: what does not fit is frozen,
//   lowest score first. When c is reset is not published: here it never is while the token lives.
// - cut (refreekv): where a prompt ends, by its last query's attention (norm_cut.h). Between cuts the budget driver only keeps
//   the bound: nothing comes back because there is room.
// kvzip (arXiv 2601.17668) is the budget driver with scores that never change: each token's gate has spoken when it was computed.
// With a threshold the input decides how many stay: what scores less goes when it leaves the window.
#pragma once

#include "policy/config.h"
#include "policy/norm_cut.h"
#include "policy/ranking.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace asrkf {

struct policy_params {
    uint32_t   pool_cells    = 0;
    uint32_t   sinks         = 0;
    uint32_t   window        = 0;
    bool       half_window   = false; // the window is half of the pool, whatever that is; less beside many pinned tokens
    uint32_t   interval      = 1;
    uint32_t   block         = 32;
    bool       threshold     = false; // the paper's driver
    score_kind score         = SCORE_ATTENTION;
    float      ema           = 0;
    float      hysteresis    = 0;
    bool       recall        = false;
    bool       leans         = false; // a layer group's own attention counts beside the shared ranking
    float      recall_share  = 0;
    uint32_t   recall_limit  = 1;
    float      softness      = 1;
    float      timer_share   = 0;
    uint32_t   timer_grace   = 1;
    float      tau           = 0;
    bool       cuts          = false; // the driver of refreekv
    bool       cuts_by_score = false; // the lowest scores go first, not the oldest tokens
    float      tolerance     = 0;
    float      gate_threshold = 0;    // what scores less is frozen even where there is room
    uint32_t   seed          = 0;
    bool       heeds_pins    = true;

    bool freezes_with_room() const { return cuts || gate_threshold > 0; }
    bool wants_scores() const { return score == SCORE_ATTENTION || score == SCORE_MAGNITUDE; }
    bool ranks_by_layer() const { return leans || score == SCORE_GATE; } // else layers with equal pools hold the same tokens
};

policy_params make_policy_params(const asrkf_config & config, uint32_t pool_cells);

enum class cause { timer, window, refill, recall, recovery };

// Why a decision is made: the interval is over; a prompt has ended, and its last tokens will be computed again, or it is cut;
// output entropy asks for more, at one of the paper's levels; or the newest token will be computed again, with what it asks
// for. A second look comes beside the other decisions: it exchanges tokens, leaves free cells free, and the next interval ends
// as if it had not been.
enum class occasion { step, prompt_end, soft_reset, window_reset, full_reset, second_look };

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
    float                    highest_going = 0; // scores of those that were thought of going and coming: how far the next
    float                    lowest_coming = 0; // decision looks first
};

constexpr float MOST_LEAN = 8; // and its inverse the least: how far the worst of a layer group may be from the worst of all

class policy {
public:
    explicit policy(const policy_params & params) : params(params) {}
    // The ranking of its sequence, before anything else; it has each token first, and loses it first.
    void follow(ranking & ranks) { this->ranks = &ranks; }

    // The window beside so many pinned tokens: what was asked for; or half of the pool, where pinned tokens find no room in the
    // other half what they leave, a block at least.
    static uint32_t window_beside(const policy_params & params, uint32_t n_pinned);
    uint32_t window() const;
    // The smallest legal pool: sinks, window, pinned tokens, one batch and two blocks fit beside each other.
    static uint64_t least_cells(const policy_params & params, uint32_t n_ubatch, uint32_t n_pinned);

    // Longest step to let through: half a window, so that every new token sees at least half a window of its past; with cuts
    // and gates, whose window may be small, what that would be if the window were half of the pool.
    uint32_t max_ubatch(bool beside_pins = true) const;

    // The cells to decide about from now on.
    void resize(uint32_t pool_cells);

    // Bookkeeping, by the engine, after the ranking's.
    void reserve(size_t n_more);                             // so many can be inserted, whatever memory is left
    void insert(uint32_t token);                             // active
    // A token is one of another sequence, too, or a frozen copy of it: what is known of that one, but pins.
    void copy_token(uint32_t token, const policy & from, uint32_t from_token, bool frozen_copy);
    void reorder(const std::vector<uint32_t> & order);       // which token comes first, second, ...
    void erase(uint32_t begin, uint32_t end);
    void clear();
    void recheck() { protection_changed = true; }            // protected tokens may be frozen: look at the next step
    void set_frozen(uint32_t token, bool frozen, bool held); // explicit freeze (held: no timer) and restore
    void set_frozen_copy(uint32_t token);                    // its bytes are on the host now: if it was active, it comes back first
    // Without recall a frozen token keeps the score that it was frozen with, and each group has its own: see ranking::observe().
    // So it is with gates, which score a token once, layer by layer.
    bool has_own_scores() const { return params.score == SCORE_GATE || (params.wants_scores() && !params.recall); }
    void observe(uint32_t token, float score, float peak, float keep) { // of an active one; of any, if gates score
        ranking::blend(histories[token].score, score, peak, keep);
    }

    // The group's own layers gave an active token this much of their attention.
    void observe_own(uint32_t token, float attention);

    uint64_t n_redundant() const { return redundant_count; } // recalls that did not outlast the next decision

    uint32_t n_tokens() const { return active.size(); }
    uint32_t n_frozen() const { return n_tokens() - n_active(); }
    uint32_t n_active() const { return active.n_in(); }
    bool     is_frozen(uint32_t token) const { return !active.has(token); }
    const token_set & active_tokens() const { return active; }
    bool     is_protected(uint32_t token, int32_t pos_end) const; // with the window ending before pos_end

    // Does the next step want its scores read, and has the pool come near enough to full for them to matter?
    bool scores_due(uint32_t n_new) const;

    // Prepare the step that adds n_new tokens from position pos_new on. Throws error(ASRKF_POOL_FULL) if they can
    // never fit; changes nothing. Anything but occasion::step decides in any case.
    // frugal: freeze no token for the sake of another, so that as little as possible is frozen.
    plan decide(uint32_t n_new, int32_t pos_new, occasion why = occasion::step, bool frugal = false) const;
    // The cut where a prompt ends, its last token before pos_end: what is to be measured; and then what to do. Changes nothing.
    norm_cut cut_before(int32_t pos_end) const;
    plan     decide_cut(const norm_cut & measured, int32_t pos_end, cut_result & out) const;
    void commit(const plan & done);
    // The step's tokens have been inserted.
    void advance(uint32_t n_new) { tokens_since_decide += n_new; }

    // Scores, timers and what is frozen as bytes, for a saved state; load() throws error(ASRKF_INVALID_ARGUMENT) and changes
    // nothing if they are not those of so many tokens. Positions and pins are not among them, and shared scores are read by
    // ranking::load(). All tokens are to be frozen when load() is called: the next decision brings back what was active, as
    // far as the pool goes.
    std::vector<uint8_t> save() const;
    static bool fits(const std::vector<uint8_t> & bytes, uint32_t n_tokens);
    void load(const std::vector<uint8_t> & bytes);

    policy_params params; // changed by resize() only

private:
    // Of a token, where timers run or scores are the group's own; else nobody asks.
    struct history {
        float    score = ranking::UNSEEN;
        uint32_t count = 0; // c: times found unimportant
        uint32_t until = 0; // frozen: decision at which the timer ends; active: decision before which it is not judged
    };
    // Where the history lies: tokens [begin, end) that are not pinned.
    struct span { uint32_t begin, end; bool has_pins; };
    struct choice; // by_budget.cpp

    bool     has_timers() const { return params.threshold || params.timer_share > 0; }
    bool     has_histories() const { return has_timers() || has_own_scores(); }
    // What decides who stays.
    float    rank(uint32_t token) const { return is_frozen(token) ? rank_frozen(token) : rank_active(token); }
    float    rank_frozen(uint32_t token) const { return params.recall ? leaning(token, ranks->score(token)) : own_rank(token); }
    float    rank_active(uint32_t token) const {
        const float rank = rank_frozen(token);
        return params.recall && rank != ranking::UNSEEN ? in_pool(rank) : rank; // own ranks have it
    }
    float    leaning(uint32_t token, float score) const { return leans.empty() || score == ranking::UNSEEN ? score : score*leans[token]; }
    float    rank_of(uint32_t token, float score) const { return score == ranking::UNSEEN || is_frozen(token) ? score : in_pool(score); }
    float    own_rank(uint32_t token) const;
    float    in_pool(float score) const { return score*(1 + params.hysteresis); } // what an active token's score counts
    uint32_t timer(uint32_t count) const;
    // Decisions since the token was frozen or recalled, as far as 16 bits tell.
    uint32_t age(uint32_t token) const { return uint16_t(decision - since[token]); }
    span     history_before(int32_t pos_end) const;
    uint64_t n_protected(span h) const; // sinks, window, pinned
    uint64_t history_of(uint32_t w, span h) const { // its tokens in a word
        return token_set::within(w, h.begin, h.end) & (h.has_pins ? ~ranks->pinned().word(w) : ~uint64_t(0));
    }
    // Tokens that a timer has frozen and whose timer has ended, that wait longest first, at most n.
    template <typename Wanted> std::vector<uint32_t> first_expired(size_t n, Wanted wanted) const;
    void start_timers() const;
    void forget_ended_timers();
    void restore_protected(plan & result, span h) const;
    void decide_by_budget(plan & result, uint32_t capacity, span h, uint32_t n_judged, occasion why, bool frugal) const;
    void decide_by_threshold(plan & result, uint32_t capacity, span h) const;

    ranking *             ranks = nullptr;
    token_set             active;
    token_set             held;      // frozen by request: only a request (or the window) brings it back
    token_set             returns;   // was active in the state that was loaded: comes back first
    std::vector<uint16_t> since;     // the decision that froze it last, or recalled it (0: none did); its low bits
    std::vector<history>  histories; // by token; empty without: has_histories()
    std::vector<float>    leans;     // by token; empty without: how many times the shared score its group's own attention was, when it last was active
    // Frozen tokens by the decision at which their timer ends. Those that have come back otherwise stand here until then.
    mutable std::map<uint32_t, std::vector<uint32_t>> waiting;
    mutable bool          waiting_stale       = false; // tokens have other numbers
    float                 highest_going       = 0;
    float                 lowest_coming       = 0;
    uint64_t              redundant_count     = 0;
    uint32_t              decision            = 0;
    uint32_t              tokens_since_decide = 0;
    bool                  protection_changed  = false; // tokens that must be active again may be frozen
    bool                  returning           = false; // some tokens of a loaded state come back first
};

template <typename Wanted> std::vector<uint32_t> policy::first_expired(size_t n, Wanted wanted) const {
    start_timers();
    std::vector<uint32_t> result;
    for (auto at = waiting.begin(); at != waiting.end() && at->first <= decision && result.size() < n; ++at) {
        const size_t before = result.size();
        for (const uint32_t i : at->second) {
            if (!active.has(i) && !held.has(i) && histories[i].until == at->first && wanted(i)) {
                result.push_back(i);
            }
        }
        std::sort(result.begin() + std::ptrdiff_t(before), result.end());
    }
    result.resize(std::min(n, result.size()));
    return result;
}

} // namespace asrkf
