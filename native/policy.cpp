#include "policy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
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
    if (n > 0 && n < indices.size()) {
        std::nth_element(indices.begin(), indices.begin() + std::ptrdiff_t(n), indices.end(), better);
    }
}

constexpr uint32_t WINDOW_RESET_DECISIONS = 8; // N of the paper's window reset

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

// Tokens of the blocks with the highest peaks, best block first, at most n_wanted.
std::vector<uint32_t> policy::blocks_asked_for(int32_t pos_end, size_t n_wanted, bool with_neighbours) const {
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

void policy::decide_by_budget(plan & result, uint32_t capacity, int32_t pos_end, occasion why, bool frugal) const {
    const std::vector<float> ranks = all_ranks();
    const auto better = [&](uint32_t a, uint32_t b) { return ranks[a] != ranks[b] ? ranks[a] > ranks[b] : a > b; };
    const auto waits_longer = [&](uint32_t a, uint32_t b) {
        return tokens[a].wake != tokens[b].wake ? tokens[a].wake < tokens[b].wake : a < b;
    };
    std::vector<bool> chosen(n_tokens(), false);
    size_t left = capacity;
    const auto choose = [&](uint32_t i, cause c) {
        if (left == 0 || chosen[i]) {
            return false;
        }
        chosen[i] = true;
        left--;
        if (tokens[i].frozen) {
            result.restore.push_back({ i, c });
        }
        return true;
    };

    // 0. what was active when the state was saved
    for (uint32_t i = 0; returning && i < n_tokens(); ++i) {
        if (tokens[i].returns && tokens[i].frozen && !is_protected(i, pos_end)) {
            choose(i, cause::refill);
        }
    }

    // 1. what the newest queries ask for, in whole blocks
    const bool   is_step  = why == occasion::step;
    const size_t n_before = result.restore.size();
    size_t       n_limit  = frugal ? 0 : is_step ? size_t(params.recall_limit)*params.interval : capacity; // restores by recall
    if (params.recall) {
        const float share = is_step ? params.recall_share : why == occasion::full_reset ? 1.0f : std::min(1.0f, 2*params.recall_share);
        const cause c     = is_step || why == occasion::prompt_end ? cause::recall : cause::recovery;
        for (const uint32_t i : blocks_asked_for(pos_end, size_t(share*float(capacity)), !is_step)) {
            if (!tokens[i].frozen || result.restore.size() - n_before < n_limit) {
                choose(i, c);
            }
        }
    }
    if (why == occasion::window_reset && !frugal) { // what was frozen last
        for (uint32_t i = n_tokens(); i-- > 0; ) {
            if (tokens[i].frozen && !tokens[i].held && !is_protected(i, pos_end) && tokens[i].frozen_at + WINDOW_RESET_DECISIONS > decision) {
                choose(i, cause::recovery);
            }
        }
    }
    n_limit -= std::min(n_limit, result.restore.size() - n_before);

    // 2. a small share for tokens whose timer ended; they stay for their grace
    std::vector<uint32_t> judged;    // active history on its score
    std::vector<uint32_t> probation; // back by timer, not judged yet
    std::vector<uint32_t> expired;   // frozen, timer ended
    std::vector<uint32_t> resting;   // frozen, timer running
    for (uint32_t i = 0; i < n_tokens(); ++i) {
        const token & t = tokens[i];
        if (chosen[i] || is_protected(i, pos_end)) {
            continue;
        }
        if (!t.frozen) {
            (t.grace > decision ? probation : judged).push_back(i);
        } else if (!t.held) {
            (t.wake <= decision ? expired : resting).push_back(i);
        }
    }
    if (probation.size() > left) {
        select(probation, left, better);
        probation.resize(left);
    }
    for (const uint32_t i : probation) {
        choose(i, cause::timer);
    }
    const size_t share = frugal ? 0 : std::min<size_t>(left + probation.size(), size_t(params.timer_share * float(params.pool_cells)));
    // the share is handed out over the grace period, not at once: the same occupancy, fewer moves
    const size_t per_decision = (share + params.timer_grace - 1) / params.timer_grace;
    const size_t n_back = share > probation.size() ? std::min({ share - probation.size(), per_decision, expired.size() }) : 0;
    select(expired, n_back, waits_longer);
    for (size_t i = 0; i < n_back; ++i) {
        choose(expired[i], cause::timer);
    }

    // 3. the rest by score: with recall all compete, otherwise frozen tokens only get what active ones leave
    std::vector<uint32_t> waiting(expired.begin() + std::ptrdiff_t(n_back), expired.end());
    waiting.insert(waiting.end(), resting.begin(), resting.end());
    if (params.recall) {
        select(waiting, n_limit, better);
        const size_t n = std::min(n_limit, waiting.size());
        judged.insert(judged.end(), waiting.begin(), waiting.begin() + std::ptrdiff_t(n));
        waiting.erase(waiting.begin(), waiting.begin() + std::ptrdiff_t(n));
    }
    select(judged, left, better);
    judged.resize(std::min(left, judged.size()));
    for (const uint32_t i : judged) {
        choose(i, is_step || why == occasion::prompt_end ? cause::recall : cause::recovery);
    }
    // room to spare (the sequence was cut back, or a long prompt step is over): the best frozen tokens return
    select(waiting, left, better);
    for (size_t i = 0; left > 0 && i < waiting.size(); ++i) {
        choose(waiting[i], cause::refill);
    }
    for (uint32_t i = 0; i < n_tokens(); ++i) {
        if (!tokens[i].frozen && !chosen[i] && !is_protected(i, pos_end)) {
            result.freeze.push_back(i);
        }
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

namespace {

// As they lie in memory: a state is read by what wrote it, or refused by its sizes.
struct saved_head  { uint32_t token_bytes, n_tokens, decision, tokens_since_decide, tokens_since_score, tokens_of_score; };
struct saved_token { float score, peak; uint32_t flags, count, wake, grace, frozen_at, recalled_at; };
constexpr uint32_t SAVED_OBSERVED = 1, SAVED_FROZEN = 2, SAVED_HELD = 4;

} // namespace

std::vector<uint8_t> policy::save() const {
    const saved_head head = { sizeof(saved_token), n_tokens(), decision, tokens_since_decide, tokens_since_score, tokens_of_score };
    std::vector<uint8_t> bytes(sizeof(head) + tokens.size()*sizeof(saved_token));
    std::memcpy(bytes.data(), &head, sizeof(head));
    uint8_t * to = bytes.data() + sizeof(head);
    for (const token & t : tokens) {
        const uint32_t flags = (t.observed ? SAVED_OBSERVED : 0) | (t.frozen && !t.returns ? SAVED_FROZEN : 0) | (t.held ? SAVED_HELD : 0);
        const saved_token s = { t.score, t.peak, flags, t.count, t.wake, t.grace, t.frozen_at, t.recalled_at };
        std::memcpy(to, &s, sizeof(s));
        to += sizeof(s);
    }
    return bytes;
}

bool policy::fits(const std::vector<uint8_t> & bytes, uint32_t n_tokens) {
    saved_head head = {};
    if (bytes.size() >= sizeof(head)) {
        std::memcpy(&head, bytes.data(), sizeof(head));
    }
    return head.token_bytes == sizeof(saved_token) && head.n_tokens == n_tokens && bytes.size() == sizeof(head) + n_tokens*sizeof(saved_token);
}

void policy::load(const std::vector<uint8_t> & bytes) {
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
        t.held        = t.frozen && (s.flags & SAVED_FROZEN) && (s.flags & SAVED_HELD);
        t.returns     = t.frozen && !(s.flags & SAVED_FROZEN);
        t.count       = s.count;
        t.wake        = s.wake;
        t.grace       = s.grace;
        t.frozen_at   = s.frozen_at;
        t.recalled_at = s.recalled_at;
    }
    returning = protection_changed = true;
}

} // namespace asrkf
