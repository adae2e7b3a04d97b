// The budget driver, of `asrkf` and the controls `window` and `random`: which tokens of the history get the cells that are
// left beside protected and new tokens. Four kinds are chosen in turn, while there is room:
// 0. what was active when a state was saved; 1. what the newest queries ask for, in whole blocks; 2. a small share for tokens
// whose timer ended; 3. the rest by score. Who is active and not chosen is frozen.
#include "policy/policy.h"
#include "policy/selection.h"

namespace asrkf {

namespace {

constexpr uint32_t WINDOW_RESET_DECISIONS = 8; // N of the paper's window reset

} // namespace

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

// One decision on its way.
struct policy::choice {
    choice(const policy & p, plan & result, uint32_t capacity, int32_t pos_end, occasion why, bool frugal)
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

    const policy & p;
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

void policy::choice::take(uint32_t i, cause c) {
    if (left == 0 || chosen[i]) {
        return;
    }
    chosen[i] = true;
    left--;
    if (p.tokens[i].frozen) {
        result.restore.push_back({ i, c });
    }
}

void policy::choice::take_returning() {
    for (uint32_t i = 0; p.returning && i < p.n_tokens(); ++i) {
        if (p.tokens[i].returns && p.tokens[i].frozen && !p.is_protected(i, pos_end)) {
            take(i, cause::refill);
        }
    }
}

void policy::choice::take_asked_for() {
    const size_t n_before = result.restore.size();
    n_recalls = frugal ? 0 : is_step() ? size_t(p.params.recall_limit)*p.params.interval : capacity;
    if (p.params.recall) {
        const float share = is_step() ? p.params.recall_share : why == occasion::full_reset ? 1.0f : std::min(1.0f, 2*p.params.recall_share);
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
            if (t.frozen && !t.held && !p.is_protected(i, pos_end) && t.frozen_at + WINDOW_RESET_DECISIONS > p.decision) {
                take(i, cause::recovery);
            }
        }
    }
    n_recalls -= std::min(n_recalls, result.restore.size() - n_before);
}

void policy::choice::sort_the_rest() {
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
void policy::choice::take_timers() {
    if (probation.size() > left) {
        select(probation, left, better());
        probation.resize(left);
    }
    for (const uint32_t i : probation) {
        take(i, cause::timer);
    }
    const size_t share = frugal ? 0 : std::min<size_t>(left + probation.size(), size_t(p.params.timer_share * float(p.params.pool_cells)));
    // the share is handed out over the grace period, not at once: the same occupancy, fewer moves
    const size_t per_decision = (share + p.params.timer_grace - 1) / p.params.timer_grace;
    const size_t n_back = share > probation.size() ? std::min({ share - probation.size(), per_decision, expired.size() }) : 0;
    select(expired, n_back, [this](uint32_t a, uint32_t b) { // who waits longer
        return p.tokens[a].wake != p.tokens[b].wake ? p.tokens[a].wake < p.tokens[b].wake : a < b;
    });
    for (size_t i = 0; i < n_back; ++i) {
        take(expired[i], cause::timer);
    }
    expired.erase(expired.begin(), expired.begin() + std::ptrdiff_t(n_back));
}

// With recall all compete, otherwise frozen tokens only get what active ones leave.
void policy::choice::take_best() {
    std::vector<uint32_t> waiting = expired;
    waiting.insert(waiting.end(), resting.begin(), resting.end());
    if (p.params.recall) {
        select(waiting, n_recalls, better());
        const size_t n = std::min(n_recalls, waiting.size());
        judged.insert(judged.end(), waiting.begin(), waiting.begin() + std::ptrdiff_t(n));
        waiting.erase(waiting.begin(), waiting.begin() + std::ptrdiff_t(n));
    }
    select(judged, left, better());
    judged.resize(std::min(left, judged.size()));
    for (const uint32_t i : judged) {
        take(i, is_step() || why == occasion::prompt_end ? cause::recall : cause::recovery);
    }
    // room to spare (the sequence was cut back, or a long prompt step is over): the best frozen tokens return
    select(waiting, left, better());
    for (size_t i = 0; left > 0 && i < waiting.size(); ++i) {
        take(waiting[i], cause::refill);
    }
}

void policy::choice::freeze_others() {
    for (uint32_t i = 0; i < p.n_tokens(); ++i) {
        if (!p.tokens[i].frozen && is_free(i)) {
            result.freeze.push_back(i);
        }
    }
}

void policy::decide_by_budget(plan & result, uint32_t capacity, int32_t pos_end, occasion why, bool frugal) const {
    choice c(*this, result, capacity, pos_end, why, frugal);
    c.take_returning();
    c.take_asked_for();
    c.sort_the_rest();
    c.take_timers();
    c.take_best();
    c.freeze_others();
}

} // namespace asrkf
