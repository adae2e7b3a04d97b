#include "policy.h"

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

// Leave the n best in front; ties go to the later token, so the order is total and the choice repeatable.
template <typename Better>
void select(std::vector<uint32_t> & indices, size_t n, Better better) {
    if (n < indices.size()) {
        std::nth_element(indices.begin(), indices.begin() + std::ptrdiff_t(n), indices.end(), better);
    }
}

} // namespace

policy_params make_policy_params(const asrkf_config & config, uint32_t pool_cells) {
    policy_params p;
    p.pool_cells  = pool_cells;
    p.sinks       = config.sinks;
    p.window      = config.window ? config.window : pool_cells / 2;
    p.interval    = config.interval;
    p.block       = config.block;
    p.threshold   = config.policy == ASRKF_POLICY_PAPER || config.policy == ASRKF_POLICY_FLAG_ALL;
    p.score       = score_kind(config.score);
    p.ema         = config.ema;
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

void policy::append(int32_t pos) {
    token t;
    t.pos = pos;
    tokens.push_back(t);
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
    protection_changed = false;
}

void policy::set_pinned(uint32_t index, bool pinned) {
    tokens[index].pinned = pinned;
    protection_changed   = true;
}

void policy::set_frozen(uint32_t index, bool frozen, bool held) {
    token & t = tokens[index];
    frozen_count += uint32_t(frozen) - uint32_t(t.frozen);
    t.frozen = frozen;
    t.held   = held;
}

void policy::observe(uint32_t index, float score) {
    if (!std::isfinite(score)) { // an overflowing q.k; a NaN would stay in the average, and has no order
        return;
    }
    token & t  = tokens[index];
    t.score    = t.observed ? params.ema*t.score + (1 - params.ema)*score : score;
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
        default:            return t.observed ? t.score : std::numeric_limits<float>::max();
    }
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

plan policy::decide(uint32_t n_new, int32_t pos_new) const {
    plan result;
    const uint32_t n_free = params.pool_cells - n_active();
    const bool due = tokens_since_decide + n_new > params.interval;
    if (!protection_changed && n_free >= n_new && (!due || (frozen_count == 0 && !params.threshold && n_free >= n_new + params.interval))) {
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
    const uint64_t room     = std::max(n_new, std::min(params.interval, uint32_t(params.pool_cells - n_protected)));
    const uint32_t capacity = uint32_t(params.pool_cells - n_protected - room);

    result.decided = true;
    if (params.threshold) {
        decide_by_threshold(result, capacity, pos_end);
    } else {
        decide_by_budget(result, capacity, pos_end);
    }
    std::sort(result.freeze.begin(), result.freeze.end());
    return result;
}

void policy::decide_by_budget(plan & result, uint32_t capacity, int32_t pos_end) const {
    std::vector<uint32_t> judged;    // active history on its score
    std::vector<uint32_t> probation; // back by timer, not judged yet
    std::vector<uint32_t> expired;   // frozen, timer ended
    std::vector<uint32_t> resting;   // frozen, timer running
    for (uint32_t i = 0; i < n_tokens(); ++i) {
        const token & t = tokens[i];
        if (is_protected(i, pos_end)) {
            continue;
        }
        if (!t.frozen) {
            (t.grace > decision ? probation : judged).push_back(i);
        } else if (!t.held) {
            (t.wake <= decision ? expired : resting).push_back(i);
        }
    }
    const auto better = [&](uint32_t a, uint32_t b) {
        const float ra = rank(a), rb = rank(b);
        return ra != rb ? ra > rb : a > b;
    };
    const auto waits_longer = [&](uint32_t a, uint32_t b) {
        return tokens[a].wake != tokens[b].wake ? tokens[a].wake < tokens[b].wake : a < b;
    };

    if (probation.size() > capacity) {
        select(probation, capacity, better);
        result.freeze.insert(result.freeze.end(), probation.begin() + capacity, probation.end());
        probation.resize(capacity);
    }
    const size_t share = std::min<size_t>(capacity, size_t(params.timer_share * float(params.pool_cells)));
    // the share is handed out over the grace period, not at once: the same occupancy, fewer moves
    const size_t per_decision = (share + params.timer_grace - 1) / params.timer_grace;
    const size_t n_back = share > probation.size() ? std::min({ share - probation.size(), per_decision, expired.size() }) : 0;
    size_t left = capacity - probation.size() - n_back;
    select(expired, n_back, waits_longer);
    for (size_t i = 0; i < n_back; ++i) {
        result.restore.push_back({ expired[i], cause::timer });
    }

    if (judged.size() > left) {
        select(judged, left, better);
        result.freeze.insert(result.freeze.end(), judged.begin() + std::ptrdiff_t(left), judged.end());
        return;
    }
    // room to spare (the sequence was cut back, or a long prompt step is over): the best frozen tokens return
    left -= judged.size();
    std::vector<uint32_t> waiting(expired.begin() + std::ptrdiff_t(n_back), expired.end());
    waiting.insert(waiting.end(), resting.begin(), resting.end());
    select(waiting, left, better);
    for (size_t i = 0; i < std::min(left, waiting.size()); ++i) {
        result.restore.push_back({ waiting[i], cause::refill });
    }
}

void policy::decide_by_threshold(plan & result, uint32_t capacity, int32_t pos_end) const {
    std::vector<uint32_t> stays;
    std::vector<uint32_t> expired;
    for (uint32_t i = 0; i < n_tokens(); ++i) {
        const token & t = tokens[i];
        if (is_protected(i, pos_end)) {
            continue;
        }
        if (t.frozen) {
            if (!t.held && t.wake <= decision) {
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
    const auto better = [&](uint32_t a, uint32_t b) {
        const float ra = rank(a), rb = rank(b);
        return ra != rb ? ra > rb : a > b;
    };
    if (stays.size() > capacity) {
        select(stays, capacity, better);
        result.freeze.insert(result.freeze.end(), stays.begin() + capacity, stays.end());
        stays.resize(capacity);
    }
    const size_t n_back = std::min<size_t>(expired.size(), capacity - stays.size());
    select(expired, n_back, [&](uint32_t a, uint32_t b) {
        return tokens[a].wake != tokens[b].wake ? tokens[a].wake < tokens[b].wake : a < b;
    });
    for (size_t i = 0; i < n_back; ++i) {
        result.restore.push_back({ expired[i], cause::timer });
    }
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
        t.wake = decision + std::max(1u, timer(t.count));
        set_frozen(i, true, false);
    }
    for (const restoration & r : done.restore) {
        set_frozen(r.token, false, false);
        tokens[r.token].grace = r.why == cause::timer && !params.threshold ? decision + params.timer_grace : 0;
    }
    decision++;
    tokens_since_decide = 0;
    protection_changed  = false;
}

void policy::advance(uint32_t n_new, bool scored) {
    tokens_since_decide += n_new;
    tokens_since_score = scored ? 0 : tokens_since_score + n_new;
}

} // namespace asrkf
