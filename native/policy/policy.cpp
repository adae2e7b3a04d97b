#include "policy/policy.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace asrkf {

namespace {

constexpr float NO_LEAN    = 1;    // nothing is known
constexpr float LEAST_TOLD = 0.1f; // of the attention that a token would get if all got the same

// splitmix64: a fixed function of its argument, so that "random" needs no state and repeats for a seed
uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

} // namespace

policy_params make_policy_params(const asrkf_config & config, uint32_t pool_cells) {
    policy_params p;
    p.pool_cells  = pool_cells;
    p.sinks       = config.sinks;
    p.window      = config.window ? config.window : pool_cells / 2;
    p.half_window = config.window == 0;
    p.interval    = config.interval;
    p.block       = config.block;
    p.threshold   = config.policy == ASRKF_POLICY_PAPER || config.policy == ASRKF_POLICY_FLAG_ALL;
    p.cuts        = config.policy == ASRKF_POLICY_REFREEKV;
    p.cuts_by_score = p.cuts && config.order == ORDER_RELEVANCE;
    p.tolerance   = config.tolerance;
    // by position nobody asks for scores, and the bound is kept as a plain window keeps it
    p.score       = p.cuts && !p.cuts_by_score && config.recall == RECALL_OFF ? SCORE_RECENCY : score_kind(config.score);
    p.gate_threshold = p.score == SCORE_GATE ? config.gate_threshold : 0;
    p.ema         = config.ema;
    p.hysteresis  = config.hysteresis;
    p.recall      = config.recall != RECALL_OFF && !p.threshold && p.wants_scores();
    p.leans       = p.recall && config.ranking == RANKING_OWN && p.score == SCORE_ATTENTION;
    p.recall_share = config.recall_share;
    p.recall_limit = config.recall_limit;
    p.softness    = config.softness;
    p.timer_share = config.timer_share;
    p.timer_grace = config.timer_grace;
    p.tau         = config.policy == ASRKF_POLICY_FLAG_ALL ? std::numeric_limits<float>::infinity() : config.tau;
    p.seed        = config.seed;
    return p;
}

uint32_t policy::window_beside(const policy_params & params, uint32_t n_pinned) {
    if (!params.half_window || n_pinned == 0) {
        return params.window;
    }
    const uint64_t others = uint64_t(params.sinks) + n_pinned + 3ull*params.block; // a batch of a block, and two blocks
    const uint32_t left   = uint32_t(params.pool_cells > others ? params.pool_cells - others : 0);
    return std::min(params.window, std::max(left, params.block));
}

uint32_t policy::window() const { return window_beside(params, params.heeds_pins ? ranks->pinned().n_in() : 0); }

uint64_t policy::least_cells(const policy_params & params, uint32_t n_ubatch, uint32_t n_pinned) {
    const uint64_t others = uint64_t(params.sinks) + std::min(n_ubatch, params.block) + 2ull*params.block;
    if (!params.half_window) {
        return others + params.window + n_pinned;
    }
    return std::max(2*others, others + n_pinned + params.block); // of the window's half pinned tokens may take all but a block, nothing else may
}

uint32_t policy::max_ubatch(bool beside_pins) const {
    const bool may_be_small = (params.cuts || params.score == SCORE_GATE) && !params.half_window;
    return std::max(params.block, may_be_small ? params.pool_cells / 4 : (beside_pins ? window() : params.window) / 2);
}

void policy::resize(uint32_t pool_cells) {
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

void policy::reserve(size_t n_more) {
    for (token_set * set : { &active, &held, &returns }) {
        set->reserve(n_more);
    }
    make_room(since, n_more);
    if (has_histories()) {
        make_room(histories, n_more);
    }
    if (params.leans) {
        make_room(leans, n_more);
    }
}

void policy::insert(uint32_t i) {
    active.insert(i, true);
    held.insert(i, false);
    returns.insert(i, false);
    since.insert(since.begin() + i, uint16_t(0));
    if (has_histories()) {
        histories.insert(histories.begin() + i, history());
    }
    if (params.leans) {
        leans.insert(leans.begin() + i, NO_LEAN);
    }
    waiting_stale |= i + 1 < n_tokens();
}

void policy::copy_token(uint32_t i, const policy & from, uint32_t from_token, bool frozen_copy) {
    if (n_tokens() == 1) {
        decision = from.decision;
    }
    const auto rebase = [&](uint32_t at) { return uint32_t(std::max<int64_t>(0, int64_t(at) - from.decision + decision)); };
    const bool frozen = from.is_frozen(from_token);
    active.put(i, !frozen);
    held.put(i, from.held.has(from_token));
    returns.put(i, from.returns.has(from_token));
    returning |= returns.has(i);
    since[i] = frozen ? uint16_t(rebase(from.decision - from.age(from_token))) : uint16_t(0);
    if (has_histories()) {
        histories[i] = from.histories[from_token];
        histories[i].until = rebase(histories[i].until);
    }
    if (params.leans) {
        leans[i] = from.leans[from_token];
    }
    waiting_stale = protection_changed = true;
    if (frozen_copy) {
        set_frozen_copy(i);
    }
}

void policy::set_frozen_copy(uint32_t i) {
    if (is_frozen(i)) {
        return;
    }
    set_frozen(i, true, held.has(i));
    returns.put(i, true);
    returning = protection_changed = true;
}

void policy::reorder(const std::vector<uint32_t> & order) {
    active.reorder(order);
    held.reorder(order);
    returns.reorder(order);
    const auto moved = [&](auto & values) {
        const auto before = values;
        for (size_t i = 0; i < values.size(); ++i) {
            values[i] = before[order[i]];
        }
    };
    moved(since);
    moved(histories);
    moved(leans);
    waiting_stale = true;
}

void policy::erase(uint32_t begin, uint32_t end) {
    active.erase(begin, end);
    held.erase(begin, end);
    returns.erase(begin, end);
    since.erase(since.begin() + begin, since.begin() + end);
    if (has_histories()) {
        histories.erase(histories.begin() + begin, histories.begin() + end);
    }
    if (params.leans) {
        leans.erase(leans.begin() + begin, leans.begin() + end);
    }
    waiting_stale = true;
    protection_changed = true; // the window moved back over tokens that may be frozen
}

void policy::clear() {
    erase(0, n_tokens());
    decision = tokens_since_decide = 0;
    redundant_count    = 0;
    protection_changed = returning = false;
}

// Both average what a token would get if all got the same: what is far below that tells little. One query tells little, too, so the average
// is slow, however long the step was.
void policy::observe_own(uint32_t i, float attention) {
    const float score = ranks->score(i), least = LEAST_TOLD / float(n_tokens());
    const float now = std::clamp((attention + least) / (score + least), 1 / MOST_LEAN, MOST_LEAN);
    if (score != ranking::UNSEEN && attention - attention == 0) {
        leans[i] = leans[i] == NO_LEAN ? now : params.ema*leans[i] + (1 - params.ema)*now;
    }
}

void policy::set_frozen(uint32_t i, bool frozen, bool is_held) {
    active.put(i, !frozen);
    held.put(i, is_held);
    returns.put(i, false);
    since[i] = 0;
    if (has_timers()) { // nobody's timer: at once
        histories[i].until = frozen ? decision : 0;
        waiting_stale |= frozen && !is_held;
    }
}

policy::span policy::history_before(int32_t pos_end) const {
    const uint32_t begin = std::min(params.sinks, n_tokens());
    return { begin, std::max(begin, ranks->lower_bound(pos_end - int64_t(window()))), params.heeds_pins && ranks->pinned().n_in() > 0 };
}

bool policy::is_protected(uint32_t i, int32_t pos_end) const {
    const span h = history_before(pos_end);
    return i < h.begin || i >= h.end || (h.has_pins && ranks->pinned().has(i));
}

float policy::own_rank(uint32_t i) const {
    switch (params.score) {
        case SCORE_RANDOM:  return float(mix(mix((uint64_t(params.seed) << 32) ^ decision) ^ uint64_t(ranks->pos(i))) >> 40);
        case SCORE_RECENCY: return float(i);
        case SCORE_NONE:    return 0;
        default:            return rank_of(i, histories[i].score);
    }
}

uint32_t policy::timer(uint32_t count) const {
    return uint32_t(std::min(std::floor(std::sqrt(double(count)) / params.softness), 1e9));
}

// Timers anew, where tokens have other numbers than when theirs began.
void policy::start_timers() const {
    if (!waiting_stale) {
        return;
    }
    waiting.clear();
    for (uint32_t i = 0; i < histories.size(); ++i) {
        if (is_frozen(i) && !held.has(i)) {
            waiting[histories[i].until].push_back(i);
        }
    }
    waiting_stale = false;
}

bool policy::scores_due(uint32_t n_new) const {
    if (!params.wants_scores() || ranks->n_since_score() + n_new < params.interval) {
        return false;
    }
    // a pool with room for this step, one like it, and a few decisions more has nothing to choose yet
    return params.threshold || params.cuts || n_tokens() + 2ull*n_new + 8ull*params.interval > params.pool_cells;
}

plan policy::decide(uint32_t n_new, int32_t pos_new, occasion why, bool frugal) const {
    plan result;
    const int64_t n_free = int64_t(params.pool_cells) - n_active(); // below 0 where a share has shrunk
    const bool due = tokens_since_decide + n_new > params.interval;
    const bool nothing_comes = n_frozen() == 0 || (params.cuts && !params.recall && why == occasion::step);
    const bool nothing_to_choose = nothing_comes && !params.threshold && params.gate_threshold <= 0 && n_free >= int64_t(n_new) + params.interval;
    if (!protection_changed && n_free >= int64_t(n_new) && (nothing_to_choose || (!due && why == occasion::step))) {
        return result;
    }
    const span h = history_before(pos_new + int32_t(n_new));
    const uint64_t n_protected = this->n_protected(h);
    restore_protected(result, h);
    const uint32_t n_judged = n_active() - uint32_t(n_protected - result.restore.size()); // active history
    if (n_protected + n_new > params.pool_cells) {
        throw error(ASRKF_POOL_FULL, format("pool of %u cells cannot hold %llu protected tokens (sinks, window, pinned) and %u new ones: "
                "raise kv_pool, lower window or n_batch, or unpin positions", params.pool_cells, (unsigned long long) n_protected, n_new));
    }
    // cells for the history; the slack lets the next steps pass without a decision
    const uint64_t most_room = params.pool_cells - n_protected;
    const uint64_t room      = why == occasion::second_look ? std::min(most_room, uint64_t(std::max<int64_t>(0, n_free)))
                             : n_new == 0 ? 0 : std::max<uint64_t>(n_new, std::min<uint64_t>(params.interval, most_room));
    const uint32_t capacity = uint32_t(params.pool_cells - n_protected - room);

    result.decided = true;
    result.why     = why;
    if (params.threshold) {
        decide_by_threshold(result, capacity, h);
    } else {
        decide_by_budget(result, capacity, h, n_judged, why, frugal);
    }
    std::sort(result.freeze.begin(), result.freeze.end());
    return result;
}

uint64_t policy::n_protected(span h) const {
    return uint64_t(n_tokens()) - (h.end - h.begin) + (h.has_pins ? ranks->pinned().count(h.begin, h.end) : 0);
}

// Sinks, window and pinned tokens that are frozen come back whatever their score.
void policy::restore_protected(plan & result, span h) const {
    const auto look = [&](uint32_t begin, uint32_t end, bool pinned_only) {
        for (uint32_t w = begin / 64; w*64 < end; ++w) {
            const uint64_t frozen = token_set::within(w, begin, end) & ~active.word(w);
            token_set::each(w, pinned_only ? frozen & ranks->pinned().word(w) : frozen, [&](uint32_t i) { result.restore.push_back({ i, cause::window }); });
        }
    };
    look(0, h.begin, false);
    if (h.has_pins) {
        look(h.begin, h.end, true);
    }
    look(h.end, n_tokens(), false);
}

void policy::commit(const plan & done) {
    if (!done.decided) {
        return;
    }
    start_timers();
    for (const uint32_t i : done.flagged) {
        histories[i].count++;
    }
    for (const uint32_t i : done.freeze) {
        redundant_count += since[i] != 0 && age(i) <= 1;
        set_frozen(i, true, false);
        since[i] = uint16_t(decision);
        if (has_timers()) {
            histories[i].count += !params.threshold;
            histories[i].until  = decision + std::max(1u, timer(histories[i].count));
            waiting[histories[i].until].push_back(i);
        }
    }
    waiting_stale = done.why == occasion::full_reset && has_timers();
    for (uint32_t i = 0; waiting_stale && i < n_tokens(); ++i) { // the paper's: all freeze durations are cleared
        histories[i].count = 0;
        histories[i].until = is_frozen(i) ? decision : histories[i].until;
    }
    for (const restoration & r : done.restore) {
        set_frozen(r.token, false, false);
        since[r.token] = r.why == cause::recall ? uint16_t(decision) : uint16_t(0);
        if (has_timers() && r.why == cause::timer && !params.threshold) {
            histories[r.token].until = decision + params.timer_grace;
        }
    }
    forget_ended_timers();
    decision++;
    tokens_since_decide = done.why == occasion::second_look ? tokens_since_decide : 0;
    protection_changed  = false;
    highest_going       = done.highest_going;
    lowest_coming       = done.lowest_coming;
    if (returning) { // what has not fitted waits as the others do
        returns.assign(n_tokens());
        returning = false;
    }
}

// Of those that have ended, the entries of tokens that are back: so what is looked at first is still frozen.
void policy::forget_ended_timers() {
    while (!waiting.empty() && waiting.begin()->first <= decision) {
        const uint32_t ended = waiting.begin()->first;
        std::vector<uint32_t> & list = waiting.begin()->second;
        list.erase(std::remove_if(list.begin(), list.end(), [&](uint32_t i) { return !is_frozen(i) || histories[i].until != ended; }), list.end());
        if (!list.empty()) {
            break;
        }
        waiting.erase(waiting.begin());
    }
}

} // namespace asrkf
