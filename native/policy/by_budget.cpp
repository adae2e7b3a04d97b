// The budget driver, of `asrkf`, of the controls `window` and `random`, of `kvzip`, and of `refreekv` between its cuts: which tokens of the
// history get the cells that are left beside protected and new tokens. Four kinds are chosen in turn, while there is room:
// 0. what was active when a state was saved; 1. what the newest queries ask for, in whole blocks; 2. a small share for tokens
// whose timer ended; 3. the rest by score. Who is active and not chosen is frozen.
//
// Who stays active is the rule and is not looked at: the cells are counted, and only those who may have to go and those who
// may come are lined up.
#include "policy/policy.h"
#include "policy/selection.h"

namespace asrkf {

namespace {

constexpr uint32_t WINDOW_RESET_DECISIONS = 8; // N of the paper's window reset

} // namespace

// One decision on its way.
struct policy::choice {
    struct ranked { float rank; uint32_t token; };
    // Ties go to the later token, so the order is total and the choice repeatable.
    struct better_one {
        bool operator()(const ranked & a, const ranked & b) const { return a.rank != b.rank ? a.rank > b.rank : a.token > b.token; }
    };
    struct worse_one {
        bool operator()(const ranked & a, const ranked & b) const { return better_one()(b, a); }
    };

    bool is_step() const { return why == occasion::step; }
    // Of the history's cells: for whole blocks that are asked for.
    float part_for_blocks() const {
        switch (why) {
            case occasion::step:        return p.params.recall_share;
            case occasion::full_reset:
            case occasion::second_look: return 1;
            default:                    return std::min(1.0f, 2*p.params.recall_share);
        }
    }
    // In the history, and not chosen yet.
    bool is_open(uint32_t i) const { return p.history_of(i / 64, h) >> (i % 64) & 1 && !chosen.has(i); }
    // Word after word of the history: those of its open tokens that are active, or are not, and in one set and not in another,
    // which are given by words (null: in, and not in). The loop that a decision spends its time in.
    template <bool is_active, typename Body> void each_open(const uint64_t * in, const uint64_t * not_in, Body body) const {
        const uint64_t * active = p.active.data(), * taken = chosen.data();
        const uint32_t first = h.begin / 64, last = (h.end - 1) / 64;
        for (uint32_t w = first; w*64 < h.end; ++w) {
            uint64_t bits = (is_active ? active[w] : ~active[w]) & ~taken[w] & (in ? in[w] : ~uint64_t(0)) & (not_in ? ~not_in[w] : ~uint64_t(0));
            if (bits && (w == first || w == last || h.has_pins)) {
                bits &= p.history_of(w, h);
            }
            token_set::each(w, bits, body);
        }
    }

    void take(uint32_t i, cause c);
    void take_returning();
    void take_asked_for();
    void take_block(uint32_t index, size_t & n_wanted, cause c);
    void take_last_frozen();
    void take_timers();
    void leave_below_threshold();
    void take_best();
    std::vector<uint32_t> blocks_asked_for(size_t n) const;
    float peak_of(const ranking::block & b) const;
    std::vector<ranked> worst_active(size_t n, size_t n_leave) const;
    std::vector<ranked> best_frozen(size_t n, uint32_t lowest_level) const;

    const policy & p;
    plan &         result;
    const span     h;
    const occasion why;
    const bool     frugal;
    token_set      chosen;
    size_t         left;          // cells
    size_t         n_judged;      // active history that is not chosen yet
    size_t         n_recalls = 0; // restores that recall may still make
};

void policy::choice::take(uint32_t i, cause c) {
    if (left == 0 || chosen.has(i)) {
        return;
    }
    chosen.put(i, true);
    left--;
    if (p.is_frozen(i)) {
        result.restore.push_back({ i, c });
    } else {
        n_judged--;
    }
}

void policy::choice::take_returning() {
    if (!p.returning) {
        return;
    }
    std::vector<ranked> back;
    each_open<false>(p.returns.data(), nullptr, [&](uint32_t i) { back.push_back({ p.rank(i), i }); });
    if (back.size() > left) { // this step has more tokens than the one before the state was saved
        select(back, left, better_one());
        back.resize(left);
    }
    for (const ranked & r : back) {
        take(r.token, cause::refill);
    }
}

//
// what the newest queries ask for
//

// The highest peak of a block's tokens that may be chosen; those that are active count more.
float policy::choice::peak_of(const ranking::block & b) const {
    const uint32_t w = b.top / 64, begin = b.top / RECALL_BLOCK*RECALL_BLOCK;
    const uint64_t top = uint64_t(1) << (b.top % 64);
    const uint64_t eligible = token_set::within(w, begin, begin + RECALL_BLOCK) & p.history_of(w, h) & ~p.held.word(w), active = eligible & p.active.word(w);
    if (active & top) {
        return p.in_pool(b.peak);
    }
    float peak = 0;
    token_set::each(w, active, [&](uint32_t i) { peak = std::max(peak, p.in_pool(p.ranks->peak(i))); });
    token_set::each(w, eligible & top ? top : eligible & ~active, [&](uint32_t i) { peak = std::max(peak, p.ranks->peak(i)); });
    return peak;
}

// The n blocks with the highest peaks, the best first. The ranking lines blocks up without regard to who is active: once n are
// at least as high here as there, one that could not reach them if all of it were active ends the search.
std::vector<uint32_t> policy::choice::blocks_asked_for(size_t n) const {
    std::vector<ranked> found;
    size_t n_full = 0;
    float  least  = 0;
    for (size_t k = 0; ; ++k) {
        const ranking::block b = p.ranks->best_block(k);
        if (b.peak <= 0 || (n_full >= n && p.in_pool(b.peak) < least)) {
            break;
        }
        const float peak = peak_of(b);
        if (peak > 0) {
            found.push_back({ peak, b.top / RECALL_BLOCK });
        }
        if (n_full < n && peak >= b.peak) {
            n_full++;
            least = b.peak;
        }
    }
    n = std::min(n, found.size());
    select(found, n, better_one());
    std::sort(found.begin(), found.begin() + std::ptrdiff_t(n), better_one());
    std::vector<uint32_t> blocks;
    for (size_t i = 0; i < n; ++i) {
        blocks.push_back(found[i].token);
    }
    return blocks;
}

// A block's tokens, as many as are still wanted.
void policy::choice::take_block(uint32_t index, size_t & n_wanted, cause c) {
    const uint32_t w = index*RECALL_BLOCK / 64;
    uint64_t bits = token_set::within(w, index*RECALL_BLOCK, (index + 1)*RECALL_BLOCK) & p.history_of(w, h) & ~p.held.word(w);
    while (token_set::count(bits) > n_wanted) {
        bits &= ~(uint64_t(1) << (63 - __builtin_clzll(bits))); // its first ones
    }
    n_wanted -= token_set::count(bits);
    if (left >= RECALL_BLOCK) { // room for all: those that are active at once
        const uint64_t kept = bits & p.active.word(w) & ~chosen.word(w);
        chosen.put_in(w, kept);
        left     -= token_set::count(kept);
        n_judged -= token_set::count(kept);
        bits &= ~p.active.word(w);
    }
    token_set::each(w, bits, [&](uint32_t i) {
        if (!p.is_frozen(i)) {
            take(i, c);
        } else if (n_recalls > 0 && left > 0 && !chosen.has(i)) {
            take(i, c);
            n_recalls--;
        }
    });
}

void policy::choice::take_asked_for() {
    const size_t capacity = left + chosen.n_in();
    n_recalls = frugal ? 0 : is_step() ? size_t(p.params.recall_limit)*p.params.interval : capacity;
    if (p.params.recall) {
        const float share = part_for_blocks();
        const cause c     = is_step() || why == occasion::prompt_end ? cause::recall : cause::recovery;
        size_t n_wanted = size_t(share*float(capacity));
        const std::vector<uint32_t> blocks = blocks_asked_for(n_wanted / RECALL_BLOCK + 2);
        std::vector<bool> taken(is_step() ? 0 : (p.n_tokens() + RECALL_BLOCK - 1) / RECALL_BLOCK, false);
        for (const uint32_t b : blocks) {
            if (is_step()) {
                take_block(b, n_wanted, c);
                continue;
            }
            for (uint32_t n = b - (b > 0); n <= b + 1 && n < taken.size(); ++n) { // and the blocks beside it, each once
                if (!taken[n]) {
                    taken[n] = true;
                    take_block(n, n_wanted, c);
                }
            }
        }
    }
    if (why == occasion::window_reset && !frugal) {
        take_last_frozen();
    }
}

void policy::choice::take_last_frozen() {
    for (uint32_t i = h.end; i-- > h.begin; ) {
        if (p.is_frozen(i) && !p.held.has(i) && is_open(i) && p.age(i) < WINDOW_RESET_DECISIONS) {
            n_recalls -= left > 0 && n_recalls > 0;
            take(i, cause::recovery);
        }
    }
}

//
// timers
//

// Those whose timer ended; they stay for their grace.
void policy::choice::take_timers() {
    if (!p.has_timers()) {
        return;
    }
    std::vector<ranked> probation; // back by timer, not judged yet
    each_open<true>(nullptr, nullptr, [&](uint32_t i) {
        if (p.histories[i].until > p.decision) {
            probation.push_back({ p.rank(i), i });
        }
    });
    if (probation.size() > left) {
        select(probation, left, better_one());
        for (size_t i = left; i < probation.size(); ++i) {
            result.freeze.push_back(probation[i].token);
        }
        n_judged -= probation.size() - left;
        probation.resize(left);
    }
    for (const ranked & r : probation) {
        take(r.token, cause::timer);
    }
    const size_t share = frugal ? 0 : std::min<size_t>(left + probation.size(), size_t(p.params.timer_share * float(p.params.pool_cells)));
    // the share is handed out over the grace period, not at once: the same occupancy, fewer moves
    const size_t per_decision = (share + p.params.timer_grace - 1) / p.params.timer_grace;
    const size_t n_back = share > probation.size() ? std::min(share - probation.size(), per_decision) : 0;
    for (const uint32_t i : p.first_expired(n_back, [&](uint32_t i) { return is_open(i); })) {
        take(i, cause::timer);
    }
}

//
// the rest by score
//

// Every one that is active is looked at: a score never changes, but tokens leave the window, lose pins and come back otherwise.
void policy::choice::leave_below_threshold() {
    if (p.params.gate_threshold <= 0 || frugal) {
        return;
    }
    each_open<true>(nullptr, nullptr, [&](uint32_t i) {
        if (p.histories[i].score < p.params.gate_threshold) {
            result.freeze.push_back(i);
            chosen.put(i, true); // decided, and without a cell
            n_judged--;
        }
    });
}

// The n worst of the active tokens that are judged: n_leave in any order, then the others, the worst first. They are looked for
// from the lowest level up, and found where the n-th is worse than any of a higher level can be.
std::vector<policy::choice::ranked> policy::choice::worst_active(size_t n, size_t n_leave) const {
    const bool has_timers = p.has_timers();
    n_best<ranked, worse_one> worst(n, {});
    const uint64_t * seen = nullptr; // all below this level
    // with leans any may be the worst
    uint32_t level = p.params.recall && !p.params.leans && n < n_judged ? p.ranks->level_of(p.highest_going) + 1 : uint32_t(ranking::LEVELS);
    for (uint32_t up = 1; n > 0; up *= 2) {
        const uint64_t * above = level < ranking::LEVELS ? p.ranks->at_least(level) : nullptr;
        each_open<true>(seen, above, [&](uint32_t i) {
            if (!has_timers || p.histories[i].until <= p.decision) {
                worst.offer({ p.rank_active(i), i });
            }
        });
        if (!above || (worst.has_all() && worst.last().rank < p.in_pool(p.ranks->least(level)))) {
            break;
        }
        seen   = above;
        level += up;
    }
    return worst.sorted_after(n_leave);
}

// The n best of the frozen tokens that may come back, the best first; those below lowest_level need not be among them. They are
// looked for from the highest level down: no token of a lower level is better, or with leans better than its level allows.
std::vector<policy::choice::ranked> policy::choice::best_frozen(size_t n, uint32_t lowest_level) const {
    n_best<ranked, better_one> best(n, {});
    const uint64_t * seen = nullptr; // all from this level on
    uint32_t level = p.params.recall ? std::max(lowest_level, p.ranks->level_of(p.lowest_coming)) : 0;
    for (uint32_t down = 1; n > 0; down *= 2) {
        const uint64_t * above = level > 0 ? p.ranks->at_least(level) : nullptr;
        each_open<false>(above, seen, [&](uint32_t i) {
            if (!p.held.has(i)) {
                best.offer({ p.rank_frozen(i), i });
            }
        });
        if (best.has_all()) {
            lowest_level = p.params.leans ? std::max(lowest_level, p.ranks->level_of(best.last().rank / MOST_LEAN)) : level;
        }
        if (level <= lowest_level) {
            break;
        }
        seen  = above;
        level = !best.has_all() && level > lowest_level + down ? level - down : lowest_level;
    }
    return best.sorted_after(0);
}

// The best of all stay or come: the worst active tokens that have no cell go, and then, with recall, the best frozen token
// changes places with the worst active one, and so on as long as it is the better of the two. Without recall frozen tokens
// only get what active ones leave.
void policy::choice::take_best() {
    const size_t n_leave   = n_judged > left ? n_judged - left : 0, n_room = left > n_judged && !p.params.cuts ? left - n_judged : 0;
    const size_t n_compete = p.params.recall ? n_recalls : 0;
    const size_t n_looked_at = n_leave + (n_compete > n_room ? n_compete - n_room : 0);
    const std::vector<ranked> going = worst_active(std::min(n_judged, n_looked_at), n_leave);
    std::vector<ranked> coming;
    if (n_room > 0) {
        coming = best_frozen(std::max(n_compete, n_room), 0);
    } else if (n_compete > 0 && n_leave < going.size()) { // a worse one than this has no place to take
        coming = best_frozen(n_compete, p.ranks->level_of(p.params.leans ? going[n_leave].rank / MOST_LEAN : going[n_leave].rank));
    }
    // those stay frozen though there is room
    coming.erase(std::find_if(coming.begin(), coming.end(), [&](const ranked & r) { return r.rank < p.params.gate_threshold; }), coming.end());
    size_t n_exchanged = 0;
    while (n_room + n_exchanged < std::min(n_compete, coming.size()) && n_leave + n_exchanged < going.size()
            && better_one()(coming[n_room + n_exchanged], going[n_leave + n_exchanged])) {
        n_exchanged++;
    }
    for (size_t i = 0; i < std::min(coming.size(), n_room + n_exchanged); ++i) { // room to spare: the sequence was cut back, or a long step is over
        const cause by_score = is_step() || why == occasion::prompt_end ? cause::recall : cause::recovery;
        result.restore.push_back({ coming[i].token, i < n_compete ? by_score : cause::refill });
    }
    for (size_t i = 0; i < n_leave + n_exchanged; ++i) {
        result.freeze.push_back(going[i].token);
    }
    const auto last = std::max_element(going.begin(), going.end(), worse_one());
    result.highest_going = last != going.end() ? p.ranks->score(last->token) : p.highest_going;
    result.lowest_coming = coming.empty() ? p.lowest_coming : coming.back().rank;
}

void policy::decide_by_budget(plan & result, uint32_t capacity, span h, uint32_t n_judged, occasion why, bool frugal) const {
    choice c = { *this, result, h, why, frugal, {}, capacity, n_judged };
    c.chosen.assign(n_tokens());
    c.take_returning();
    c.take_asked_for();
    c.take_timers();
    c.leave_below_threshold();
    c.take_best();
}

} // namespace asrkf
