// The policy as plainly as it can be written: one object for each group, which has everything about every token, looks at all
// of them at each decision, and sorts. What native/policy does with shared scores and sets of tokens must decide the same. It
// is how the library decided before scores were shared, but for one thing: who is frozen or comes back otherwise than by a
// decision has no timer and no grace.
#pragma once

#include "policy/policy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace asrkf {

// Leave the n best in front; ties go to the later token, so the order is total and the choice repeatable.
template <typename Better>
void select_best(std::vector<uint32_t> & indices, size_t n, Better better) {
    if (n > 0 && n < indices.size()) {
        std::nth_element(indices.begin(), indices.begin() + std::ptrdiff_t(n), indices.end(), better);
    }
}

class plain_policy {
public:
    explicit plain_policy(const policy_params & params) : params(params) {}

    // The cells to decide about from now on.
    void resize(uint32_t pool_cells);

    // Bookkeeping, by the engine. Positions ascend.
    void append(int32_t pos) { insert(n_tokens(), pos); }
    void insert(uint32_t token, int32_t pos);
    // A token is one of another sequence, too, or a frozen copy of it: what is known of that one, but pins.
    void copy_token(uint32_t token, const plain_policy & from, uint32_t from_token, bool frozen_copy);
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
    // The group's own layers gave an active token this much of their attention.
    void observe_own(uint32_t token, float attention);
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
        float    lean     = 1;      // how many times the score its group's own attention was
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

// splitmix64: a fixed function of its argument, so that "random" needs no state and repeats for a seed
inline uint64_t mix_plainly(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

inline void plain_policy::resize(uint32_t pool_cells) {
    if (pool_cells == params.pool_cells) {
        return;
    }
    const uint32_t window = params.half_window ? pool_cells / 2 : params.window;
    if (window > params.window || pool_cells > params.pool_cells) { // what the window covers now may be frozen, or there is room
        protection_changed = true;
    }
    params.pool_cells = pool_cells; // with less than it has, a sequence decides anyway
    params.window     = window;
}

inline void plain_policy::insert(uint32_t index, int32_t pos) {
    token t;
    t.pos = pos;
    tokens.insert(tokens.begin() + index, t);
}

inline void plain_policy::copy_token(uint32_t index, const plain_policy & from, uint32_t from_token, bool frozen_copy) {
    if (tokens.size() == 1) {
        decision = from.decision;
    }
    const auto rebase = [&](uint32_t at) { return uint32_t(std::max<int64_t>(0, int64_t(at) - from.decision + decision)); };
    token & t = tokens[index];
    const token own = t;
    t = from.tokens[from_token];
    t.pos         = own.pos;
    t.pinned      = own.pinned;
    t.wake        = rebase(t.wake);
    t.grace       = rebase(t.grace);
    t.frozen_at   = rebase(t.frozen_at);
    t.recalled_at = 0;
    frozen_count += t.frozen - own.frozen;
    protection_changed = true;
    if (frozen_copy) {
        set_frozen_copy(index);
    }
}

inline void plain_policy::set_frozen_copy(uint32_t index) {
    token & t = tokens[index];
    if (!t.frozen) {
        t.frozen = t.returns = returning = protection_changed = true;
        t.wake = decision;
        frozen_count++;
    }
}

inline void plain_policy::move_to(uint32_t index, int32_t pos) {
    tokens[index].pos  = pos;
    protection_changed = true;
}

inline void plain_policy::reorder(const std::vector<uint32_t> & order) {
    std::vector<token> before = std::move(tokens);
    tokens.clear();
    for (const uint32_t i : order) {
        tokens.push_back(before[i]);
    }
}

inline void plain_policy::erase(uint32_t begin, uint32_t end) {
    for (uint32_t i = begin; i < end; ++i) {
        frozen_count -= tokens[i].frozen;
    }
    tokens.erase(tokens.begin() + begin, tokens.begin() + end);
    protection_changed = true; // the window moved back over tokens that may be frozen
}

inline void plain_policy::clear() {
    tokens.clear();
    frozen_count = decision = tokens_since_decide = tokens_since_score = 0;
    redundant_count    = 0;
    protection_changed = returning = false;
}

inline void plain_policy::set_pinned(uint32_t index, bool pinned) {
    tokens[index].pinned = pinned;
    protection_changed   = true;
}

inline void plain_policy::set_frozen(uint32_t index, bool frozen, bool held) {
    token & t = tokens[index];
    frozen_count += uint32_t(frozen) - uint32_t(t.frozen);
    t.frozen  = frozen;
    t.held    = held;
    t.returns = false;
    t.grace   = 0;
    t.wake    = decision; // not frozen by a timer: none runs
}

inline float plain_policy::average_weight() const { return std::pow(params.ema, std::max(1.0f, float(tokens_of_score) / float(params.interval))); }

inline void plain_policy::observe(uint32_t index, float score, float peak, float keep) {
    token & t = tokens[index];
    if (!std::isfinite(score) || !std::isfinite(peak) || (t.frozen && !params.recall)) { // a NaN has no order, and would stay in the average
        return;
    }
    t.peak     = peak;
    t.score    = t.observed ? keep*t.score + (1 - keep)*score : score;
    t.observed = true;
}

inline void plain_policy::observe_own(uint32_t index, float attention) {
    token & t = tokens[index];
    if (!t.observed || !std::isfinite(attention)) {
        return;
    }
    const float least = 0.1f / float(n_tokens()), lean = std::min(8.0f, std::max(0.125f, (attention + least) / (t.score + least)));
    t.lean = t.lean == 1 ? lean : params.ema*t.lean + (1 - params.ema)*lean;
}

inline bool plain_policy::is_protected(uint32_t index, int32_t pos_end) const {
    const token & t = tokens[index];
    int64_t window = params.window, n_pinned = std::count_if(tokens.begin(), tokens.end(), [](const token & one) { return one.pinned; });
    if (params.half_window && n_pinned > 0) { // pinned tokens take of it, down to a block, what the rest of the pool lacks
        window = std::min(window, std::max<int64_t>(params.block, int64_t(params.pool_cells) - params.sinks - n_pinned - 3*int64_t(params.block)));
    }
    return index < params.sinks || t.pinned || t.pos >= pos_end - window;
}

inline float plain_policy::rank(uint32_t index) const {
    const token & t = tokens[index];
    switch (params.score) {
        case SCORE_RANDOM:  return float(mix_plainly(mix_plainly((uint64_t(params.seed) << 32) ^ decision) ^ uint64_t(t.pos)) >> 40);
        case SCORE_RECENCY: return float(index);
        case SCORE_NONE:    return 0;
        // a token that no step has scored yet is not known to be unimportant
        default:            return !t.observed ? std::numeric_limits<float>::max() : t.frozen ? t.score*t.lean : t.score*t.lean*(1 + params.hysteresis);
    }
}

// Sorting looks at them many times.
inline std::vector<float> plain_policy::all_ranks() const {
    std::vector<float> ranks(n_tokens());
    for (uint32_t i = 0; i < n_tokens(); ++i) {
        ranks[i] = rank(i);
    }
    return ranks;
}

inline uint32_t plain_policy::timer(uint32_t count) const {
    return uint32_t(std::min(std::floor(std::sqrt(double(count)) / params.softness), 1e9));
}

inline bool plain_policy::scores_due(uint32_t n_new) const {
    if (!params.wants_scores() || tokens_since_score + n_new < params.interval) {
        return false;
    }
    // a pool with room for this step, one like it, and a few decisions more has nothing to choose yet
    return params.threshold || params.cuts || n_tokens() + 2ull*n_new + 8ull*params.interval > params.pool_cells;
}

inline plan plain_policy::decide(uint32_t n_new, int32_t pos_new, occasion why, bool frugal) const {
    plan result;
    const int64_t n_free = int64_t(params.pool_cells) - n_active(); // below 0 where a share has shrunk
    const bool due = tokens_since_decide + n_new > params.interval;
    const bool nothing_comes = frozen_count == 0 || (params.cuts && !params.recall && why == occasion::step);
    const bool nothing_to_choose = nothing_comes && !params.threshold && n_free >= int64_t(n_new) + params.interval;
    if (!protection_changed && n_free >= int64_t(n_new) && (nothing_to_choose || (!due && why == occasion::step))) {
        return result;
    }
    const int32_t pos_end = pos_new + int32_t(n_new);

    uint64_t n_protected = 0;
    for (uint32_t i = 0; i < n_tokens(); ++i) {
        if (is_protected(i, pos_end)) {
            n_protected++;
            if (tokens[i].frozen) {
                result.restore.push_back({ i, cause::window });
            }
        }
    }
    if (n_protected + n_new > params.pool_cells) {
        throw error(ASRKF_POOL_FULL, format("pool of %u cells cannot hold %llu protected tokens (sinks, window, pinned) and %u new ones: "
                "raise kv_pool, lower window or n_batch, or unpin positions", params.pool_cells, (unsigned long long) n_protected, n_new));
    }
    // cells for the history; the slack lets the next steps pass without a decision
    const uint32_t most_room = uint32_t(params.pool_cells - n_protected);
    uint64_t room = n_new == 0 ? 0 : std::max(n_new, std::min(params.interval, most_room));
    if (why == occasion::second_look) { // free cells stay free
        room = n_free > 0 ? std::min(most_room, uint32_t(n_free)) : 0;
    }
    const uint32_t capacity = uint32_t(params.pool_cells - n_protected - room);

    result.decided = true;
    result.why     = why;
    if (params.threshold) {
        decide_by_threshold(result, capacity, pos_end);
    } else {
        decide_by_budget(result, capacity, pos_end, why, frugal);
    }
    std::sort(result.freeze.begin(), result.freeze.end());
    return result;
}

inline void plain_policy::commit(const plan & done) {
    if (!done.decided) {
        return;
    }
    for (const uint32_t i : done.flagged) {
        tokens[i].count++;
    }
    for (const uint32_t i : done.freeze) {
        token & t = tokens[i];
        if (!params.threshold) {
            t.count++;
        }
        t.frozen_at = decision;
        redundant_count += t.recalled_at != 0 && t.recalled_at + 1 >= decision;
        set_frozen(i, true, false);
        t.wake = decision + std::max(1u, timer(t.count));
    }
    if (done.why == occasion::full_reset) { // the paper's: all freeze durations are cleared
        for (token & t : tokens) {
            t.count = 0;
            t.wake  = decision;
        }
    }
    for (const restoration & r : done.restore) {
        set_frozen(r.token, false, false);
        tokens[r.token].recalled_at = r.why == cause::recall ? decision : 0;
        tokens[r.token].grace = r.why == cause::timer && !params.threshold ? decision + params.timer_grace : 0;
    }
    decision++;
    if (done.why != occasion::second_look) {
        tokens_since_decide = 0;
    }
    protection_changed  = false;
    if (returning) { // what has not fitted waits as the others do
        for (token & t : tokens) {
            t.returns = false;
        }
        returning = false;
    }
}

inline void plain_policy::advance(uint32_t n_new, bool scored) {
    tokens_since_decide += n_new;
    tokens_since_score += n_new;
    if (scored) {
        tokens_of_score    = tokens_since_score;
        tokens_since_score = 0;
    }
}

constexpr uint32_t RESET_DECISIONS = 8; // N of the paper's window reset

// Tokens of the blocks with the highest peaks, best block first, at most n_wanted.
inline std::vector<uint32_t> plain_policy::blocks_asked_for(int32_t pos_end, size_t n_wanted, bool with_neighbours) const {
    struct block { float peak; uint32_t index; };
    std::vector<block> blocks((n_tokens() + RECALL_BLOCK - 1) / RECALL_BLOCK);
    for (uint32_t b = 0; b < blocks.size(); ++b) {
        blocks[b] = { 0, b };
    }
    for (uint32_t i = 0; i < n_tokens(); ++i) {
        const token & t = tokens[i];
        if (!t.held && !is_protected(i, pos_end)) {
            float & peak = blocks[i / RECALL_BLOCK].peak;
            peak = std::max(peak, t.frozen ? t.peak : t.peak*(1 + params.hysteresis));
        }
    }
    const size_t n_best = std::min(blocks.size(), n_wanted / RECALL_BLOCK + 2);
    std::partial_sort(blocks.begin(), blocks.begin() + std::ptrdiff_t(n_best), blocks.end(),
            [](const block & a, const block & b) { return a.peak != b.peak ? a.peak > b.peak : a.index > b.index; });
    std::vector<uint32_t> result;
    std::vector<bool>     taken((n_tokens() + RECALL_BLOCK - 1) / RECALL_BLOCK, false);
    for (size_t b = 0; b < n_best && blocks[b].peak > 0; ++b) {
        const uint32_t first = blocks[b].index - (with_neighbours && blocks[b].index > 0), last = blocks[b].index + with_neighbours;
        for (uint32_t n = first; n <= last && n < taken.size(); ++n) {
            if (taken[n]) {
                continue;
            }
            taken[n] = true;
            for (uint32_t i = n*RECALL_BLOCK; i < std::min(n_tokens(), (n + 1)*RECALL_BLOCK); ++i) {
                if (!tokens[i].held && !is_protected(i, pos_end)) {
                    result.push_back(i);
                }
            }
            if (result.size() >= n_wanted) {
                result.resize(n_wanted);
                return result;
            }
        }
    }
    return result;
}

// One decision on its way.
struct plain_policy::choice {
    choice(const plain_policy & p, plan & result, uint32_t capacity, int32_t pos_end, occasion why, bool frugal)
        : p(p), result(result), capacity(capacity), pos_end(pos_end), why(why), frugal(frugal), ranks(p.all_ranks()), chosen(p.n_tokens(), false), left(capacity) {}

    bool is_step() const { return why == occasion::step; }
    bool is_free(uint32_t i) const { return !chosen[i] && !p.is_protected(i, pos_end); }
    // Ties go to the later token, so the order is total and the choice repeatable.
    auto better() const {
        return [this](uint32_t a, uint32_t b) { return ranks[a] != ranks[b] ? ranks[a] > ranks[b] : a > b; };
    }

    void take(uint32_t i, cause c);
    void take_returning();
    void take_asked_for();
    void sort_the_rest();
    void take_timers();
    void take_best();
    void freeze_others();

    const plain_policy & p;
    plan &         result;
    const uint32_t capacity;
    const int32_t  pos_end;
    const occasion why;
    const bool     frugal;
    const std::vector<float> ranks;
    std::vector<bool>     chosen;
    size_t                left;          // cells
    size_t                n_recalls = 0; // restores that recall may still make
    std::vector<uint32_t> judged;        // active history on its score
    std::vector<uint32_t> probation;     // back by timer, not judged yet
    std::vector<uint32_t> expired;       // frozen, timer ended
    std::vector<uint32_t> resting;       // frozen, timer running
};

inline void plain_policy::choice::take(uint32_t i, cause c) {
    if (left == 0 || chosen[i]) {
        return;
    }
    chosen[i] = true;
    left--;
    if (p.tokens[i].frozen) {
        result.restore.push_back({ i, c });
    }
}

inline void plain_policy::choice::take_returning() {
    std::vector<uint32_t> back;
    for (uint32_t i = 0; p.returning && i < p.n_tokens(); ++i) {
        if (p.tokens[i].returns && p.tokens[i].frozen && !p.is_protected(i, pos_end)) {
            back.push_back(i);
        }
    }
    if (back.size() > left) {
        select_best(back, left, better());
        back.resize(left);
    }
    for (const uint32_t i : back) {
        take(i, cause::refill);
    }
}

inline void plain_policy::choice::take_asked_for() {
    const size_t n_before = result.restore.size();
    n_recalls = frugal ? 0 : is_step() ? size_t(p.params.recall_limit)*p.params.interval : capacity;
    if (p.params.recall) {
        const bool is_all = why == occasion::full_reset || why == occasion::second_look;
        const float share = is_step() ? p.params.recall_share : is_all ? 1.0f : std::min(1.0f, 2*p.params.recall_share);
        const cause c     = is_step() || why == occasion::prompt_end ? cause::recall : cause::recovery;
        for (const uint32_t i : p.blocks_asked_for(pos_end, size_t(share*float(capacity)), !is_step())) {
            if (!p.tokens[i].frozen || result.restore.size() - n_before < n_recalls) {
                take(i, c);
            }
        }
    }
    if (why == occasion::window_reset && !frugal) { // what was frozen last
        for (uint32_t i = p.n_tokens(); i-- > 0; ) {
            const token & t = p.tokens[i];
            if (t.frozen && !t.held && !p.is_protected(i, pos_end) && t.frozen_at + RESET_DECISIONS > p.decision) {
                take(i, cause::recovery);
            }
        }
    }
    n_recalls -= std::min(n_recalls, result.restore.size() - n_before);
}

inline void plain_policy::choice::sort_the_rest() {
    for (uint32_t i = 0; i < p.n_tokens(); ++i) {
        const token & t = p.tokens[i];
        if (!is_free(i)) {
            continue;
        }
        if (!t.frozen) {
            (t.grace > p.decision ? probation : judged).push_back(i);
        } else if (!t.held) {
            (t.wake <= p.decision ? expired : resting).push_back(i);
        }
    }
}

// Those whose timer ended; they stay for their grace.
inline void plain_policy::choice::take_timers() {
    if (probation.size() > left) {
        select_best(probation, left, better());
        probation.resize(left);
    }
    for (const uint32_t i : probation) {
        take(i, cause::timer);
    }
    const size_t share = frugal ? 0 : std::min<size_t>(left + probation.size(), size_t(p.params.timer_share * float(p.params.pool_cells)));
    // the share is handed out over the grace period, not at once: the same occupancy, fewer moves
    const size_t per_decision = (share + p.params.timer_grace - 1) / p.params.timer_grace;
    const size_t n_back = share > probation.size() ? std::min({ share - probation.size(), per_decision, expired.size() }) : 0;
    select_best(expired, n_back, [this](uint32_t a, uint32_t b) { // who waits longer
        return p.tokens[a].wake != p.tokens[b].wake ? p.tokens[a].wake < p.tokens[b].wake : a < b;
    });
    for (size_t i = 0; i < n_back; ++i) {
        take(expired[i], cause::timer);
    }
    expired.erase(expired.begin(), expired.begin() + std::ptrdiff_t(n_back));
}

// With recall all compete, otherwise frozen tokens only get what active ones leave.
inline void plain_policy::choice::take_best() {
    const size_t n_most = p.params.cuts ? std::min(left, judged.size()) : left; // after a cut none comes for the sake of room
    std::vector<uint32_t> waiting = expired;
    waiting.insert(waiting.end(), resting.begin(), resting.end());
    if (p.params.recall) {
        select_best(waiting, n_recalls, better());
        const size_t n = std::min(n_recalls, waiting.size());
        judged.insert(judged.end(), waiting.begin(), waiting.begin() + std::ptrdiff_t(n));
        waiting.erase(waiting.begin(), waiting.begin() + std::ptrdiff_t(n));
    }
    select_best(judged, n_most, better());
    judged.resize(std::min(n_most, judged.size()));
    for (const uint32_t i : judged) {
        take(i, is_step() || why == occasion::prompt_end ? cause::recall : cause::recovery);
    }
    // room to spare (the sequence was cut back, or a long prompt step is over): the best frozen tokens return
    select_best(waiting, left, better());
    for (size_t i = 0; left > 0 && !p.params.cuts && i < waiting.size(); ++i) {
        take(waiting[i], cause::refill);
    }
}

inline void plain_policy::choice::freeze_others() {
    for (uint32_t i = 0; i < p.n_tokens(); ++i) {
        if (!p.tokens[i].frozen && is_free(i)) {
            result.freeze.push_back(i);
        }
    }
}

inline void plain_policy::decide_by_budget(plan & result, uint32_t capacity, int32_t pos_end, occasion why, bool frugal) const {
    choice c(*this, result, capacity, pos_end, why, frugal);
    c.take_returning();
    c.take_asked_for();
    c.sort_the_rest();
    c.take_timers();
    c.take_best();
    c.freeze_others();
}

inline void plain_policy::decide_by_threshold(plan & result, uint32_t capacity, int32_t pos_end) const {
    std::vector<uint32_t> stays;
    std::vector<uint32_t> expired;
    for (uint32_t i = 0; i < n_tokens(); ++i) {
        const token & t = tokens[i];
        if (is_protected(i, pos_end)) {
            continue;
        }
        if (t.frozen) {
            if (!t.held && (t.wake <= decision || t.returns)) {
                expired.push_back(i);
            }
        } else if (rank(i) < params.tau) {
            result.flagged.push_back(i);
            (timer(t.count + 1) >= 1 ? result.freeze : stays).push_back(i);
        } else {
            stays.push_back(i);
        }
    }
    // the hard bound, which the paper does not have
    const std::vector<float> ranks = all_ranks();
    const auto better = [&](uint32_t a, uint32_t b) { return ranks[a] != ranks[b] ? ranks[a] > ranks[b] : a > b; };
    if (stays.size() > capacity) {
        select_best(stays, capacity, better);
        result.freeze.insert(result.freeze.end(), stays.begin() + capacity, stays.end());
        stays.resize(capacity);
    }
    const size_t n_back = std::min<size_t>(expired.size(), capacity - stays.size());
    select_best(expired, n_back, [&](uint32_t a, uint32_t b) {
        return tokens[a].wake != tokens[b].wake ? tokens[a].wake < tokens[b].wake : a < b;
    });
    for (size_t i = 0; i < n_back; ++i) {
        result.restore.push_back({ expired[i], cause::timer });
    }
}

// As they lie in memory: a state is read by what wrote it, or refused by its sizes.
struct saved_head  { uint32_t token_bytes, n_tokens, decision, tokens_since_decide, tokens_since_score, tokens_of_score; };
struct saved_token { float score, peak, lean; uint32_t flags, count, wake, grace, frozen_at, recalled_at; };
constexpr uint32_t SAVED_OBSERVED = 1, SAVED_FROZEN = 2, SAVED_HELD = 4;

inline std::vector<uint8_t> plain_policy::save() const {
    const saved_head head = { sizeof(saved_token), n_tokens(), decision, tokens_since_decide, tokens_since_score, tokens_of_score };
    std::vector<uint8_t> bytes(sizeof(head) + tokens.size()*sizeof(saved_token));
    std::memcpy(bytes.data(), &head, sizeof(head));
    uint8_t * to = bytes.data() + sizeof(head);
    for (const token & t : tokens) {
        const uint32_t flags = (t.observed ? SAVED_OBSERVED : 0) | (t.frozen && !t.returns ? SAVED_FROZEN : 0) | (t.held ? SAVED_HELD : 0);
        const saved_token s = { t.score, t.peak, t.lean, flags, t.count, t.wake, t.grace, t.frozen_at, t.recalled_at };
        std::memcpy(to, &s, sizeof(s));
        to += sizeof(s);
    }
    return bytes;
}

inline bool plain_policy::fits(const std::vector<uint8_t> & bytes, uint32_t n_tokens) {
    saved_head head = {};
    if (bytes.size() >= sizeof(head)) {
        std::memcpy(&head, bytes.data(), sizeof(head));
    }
    return head.token_bytes == sizeof(saved_token) && head.n_tokens == n_tokens && bytes.size() == sizeof(head) + n_tokens*sizeof(saved_token);
}

inline void plain_policy::load(const std::vector<uint8_t> & bytes) {
    if (!fits(bytes, n_tokens())) {
        throw error(ASRKF_INVALID_ARGUMENT, "the scores and timers of a state are not those of its tokens");
    }
    saved_head head;
    std::memcpy(&head, bytes.data(), sizeof(head));
    decision            = head.decision;
    tokens_since_decide = head.tokens_since_decide;
    tokens_since_score  = head.tokens_since_score;
    tokens_of_score     = std::max(1u, head.tokens_of_score);
    for (uint32_t i = 0; i < n_tokens(); ++i) {
        token & t = tokens[i];
        saved_token s;
        std::memcpy(&s, bytes.data() + sizeof(head) + i*sizeof(s), sizeof(s));
        t.observed    = (s.flags & SAVED_OBSERVED) && std::isfinite(s.score) && std::isfinite(s.peak);
        t.score       = t.observed ? s.score : 0;
        t.peak        = t.observed ? s.peak : 0;
        t.lean        = s.lean;
        t.held        = t.frozen && (s.flags & SAVED_FROZEN) && (s.flags & SAVED_HELD);
        t.returns     = t.frozen && !(s.flags & SAVED_FROZEN);
        t.count       = s.count;
        t.wake        = t.returns ? decision : s.wake;
        t.grace       = s.grace;
        t.frozen_at   = s.frozen_at;
        t.recalled_at = s.recalled_at;
    }
    returning = protection_changed = true;
}

} // namespace asrkf
