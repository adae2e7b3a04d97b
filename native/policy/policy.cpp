#include "policy/policy.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace asrkf {

namespace {

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
    p.score       = score_kind(config.score);
    p.ema         = config.ema;
    p.hysteresis  = config.hysteresis;
    p.recall      = config.recall != RECALL_OFF && !p.threshold && p.wants_scores();
    p.recall_share = config.recall_share;
    p.recall_limit = config.recall_limit;
    p.softness    = config.softness;
    p.timer_share = config.timer_share;
    p.timer_grace = config.timer_grace;
    p.tau         = config.policy == ASRKF_POLICY_FLAG_ALL ? std::numeric_limits<float>::infinity() : config.tau;
    p.seed        = config.seed;
    return p;
}

uint64_t policy::required_cells(const policy_params & params, uint32_t n_ubatch, uint32_t n_pinned) {
    return uint64_t(params.sinks) + params.window + n_pinned + std::min(n_ubatch, params.block) + 2ull*params.block;
}

uint32_t policy::max_ubatch() const { return std::max(params.block, params.window / 2); }

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

void policy::insert(uint32_t index, int32_t pos) {
    token t;
    t.pos = pos;
    tokens.insert(tokens.begin() + index, t);
}

void policy::copy_token(uint32_t index, const policy & from, uint32_t from_token, bool frozen_copy) {
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

void policy::set_frozen_copy(uint32_t index) {
    token & t = tokens[index];
    if (!t.frozen) {
        t.frozen = t.returns = returning = protection_changed = true;
        frozen_count++;
    }
}

void policy::move_to(uint32_t index, int32_t pos) {
    tokens[index].pos  = pos;
    protection_changed = true;
}

void policy::reorder(const std::vector<uint32_t> & order) {
    std::vector<token> before = std::move(tokens);
    tokens.clear();
    for (const uint32_t i : order) {
        tokens.push_back(before[i]);
    }
}

void policy::erase(uint32_t begin, uint32_t end) {
    for (uint32_t i = begin; i < end; ++i) {
        frozen_count -= tokens[i].frozen;
    }
    tokens.erase(tokens.begin() + begin, tokens.begin() + end);
    protection_changed = true; // the window moved back over tokens that may be frozen
}

void policy::clear() {
    tokens.clear();
    frozen_count = decision = tokens_since_decide = tokens_since_score = 0;
    redundant_count    = 0;
    protection_changed = returning = false;
}

void policy::set_pinned(uint32_t index, bool pinned) {
    tokens[index].pinned = pinned;
    protection_changed   = true;
}

void policy::set_frozen(uint32_t index, bool frozen, bool held) {
    token & t = tokens[index];
    frozen_count += uint32_t(frozen) - uint32_t(t.frozen);
    t.frozen  = frozen;
    t.held    = held;
    t.returns = false;
}

float policy::average_weight() const { return std::pow(params.ema, std::max(1.0f, float(tokens_of_score) / float(params.interval))); }

void policy::observe(uint32_t index, float score, float peak, float keep) {
    token & t = tokens[index];
    if (!std::isfinite(score) || !std::isfinite(peak) || (t.frozen && !params.recall)) { // a NaN has no order, and would stay in the average
        return;
    }
    t.peak     = peak;
    t.score    = t.observed ? keep*t.score + (1 - keep)*score : score;
    t.observed = true;
}

bool policy::is_protected(uint32_t index, int32_t pos_end) const {
    const token & t = tokens[index];
    return index < params.sinks || t.pinned || t.pos >= pos_end - int64_t(params.window);
}

float policy::rank(uint32_t index) const {
    const token & t = tokens[index];
    switch (params.score) {
        case SCORE_RANDOM:  return float(mix(mix((uint64_t(params.seed) << 32) ^ decision) ^ uint64_t(t.pos)) >> 40);
        case SCORE_RECENCY: return float(index);
        case SCORE_NONE:    return 0;
        // a token that no step has scored yet is not known to be unimportant
        default:            return !t.observed ? std::numeric_limits<float>::max() : t.frozen ? t.score : t.score*(1 + params.hysteresis);
    }
}

// Sorting looks at them many times.
std::vector<float> policy::all_ranks() const {
    std::vector<float> ranks(n_tokens());
    for (uint32_t i = 0; i < n_tokens(); ++i) {
        ranks[i] = rank(i);
    }
    return ranks;
}

uint32_t policy::timer(uint32_t count) const {
    return uint32_t(std::min(std::floor(std::sqrt(double(count)) / params.softness), 1e9));
}

bool policy::scores_due(uint32_t n_new) const {
    if (!params.wants_scores() || tokens_since_score + n_new < params.interval) {
        return false;
    }
    // a pool with room for this step, one like it, and a few decisions more has nothing to choose yet
    return params.threshold || n_tokens() + 2ull*n_new + 8ull*params.interval > params.pool_cells;
}

plan policy::decide(uint32_t n_new, int32_t pos_new, occasion why, bool frugal) const {
    plan result;
    const int64_t n_free = int64_t(params.pool_cells) - n_active(); // below 0 where a share has shrunk
    const bool due = tokens_since_decide + n_new > params.interval;
    const bool nothing_to_choose = frozen_count == 0 && !params.threshold && n_free >= int64_t(n_new) + params.interval;
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
    const uint64_t room     = n_new == 0 ? 0 : std::max(n_new, std::min(params.interval, uint32_t(params.pool_cells - n_protected)));
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

void policy::commit(const plan & done) {
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
        t.wake      = decision + std::max(1u, timer(t.count));
        t.frozen_at = decision;
        redundant_count += t.recalled_at != 0 && t.recalled_at + 1 >= decision;
        set_frozen(i, true, false);
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
    tokens_since_decide = 0;
    protection_changed  = false;
    if (returning) { // what has not fitted waits as the others do
        for (token & t : tokens) {
            t.returns = false;
        }
        returning = false;
    }
}

void policy::advance(uint32_t n_new, bool scored) {
    tokens_since_decide += n_new;
    tokens_since_score += n_new;
    if (scored) {
        tokens_of_score    = tokens_since_score;
        tokens_since_score = 0;
    }
}

} // namespace asrkf
