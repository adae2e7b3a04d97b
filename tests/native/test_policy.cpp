// The policy alone: exact decisions, no tensors.
#include "check.h"

#include "policy/occasions.h"
#include "policy/policy.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>

using namespace asrkf;

static policy_params small(uint32_t pool, uint32_t sinks, uint32_t window, uint32_t interval) {
    policy_params p;
    p.pool_cells = pool;
    p.sinks      = sinks;
    p.window     = window;
    p.interval   = interval;
    p.block      = 8;
    p.softness   = 1;
    return p;
}

// A policy with a ranking of its own, as where all layers are one group.
struct one_group : policy {
    explicit one_group(const policy_params & p) : policy(p), ranks(std::make_shared<ranking>(p.ema, p.interval)) { follow(*ranks); }

    void append(int32_t pos) {
        ranks->insert(n_tokens(), pos);
        insert(n_tokens());
    }
    void observe(uint32_t token, float score, float peak, float keep) {
        ranks->observe(token, score, peak, keep);
        if (has_own_scores() && !is_frozen(token)) {
            policy::observe(token, score, peak, keep);
        }
    }
    void set_pinned(uint32_t token, bool pinned) {
        ranks->set_pinned(token, pinned);
        recheck();
    }
    void copy_token(uint32_t token, const one_group & from, uint32_t from_token, bool frozen_copy) {
        ranks->copy_token(token, *from.ranks, from_token);
        policy::copy_token(token, from, from_token, frozen_copy);
    }
    void reorder(const std::vector<uint32_t> & order) {
        ranks->reorder(order);
        policy::reorder(order);
    }
    void erase(uint32_t begin, uint32_t end) {
        ranks->erase(begin, end);
        policy::erase(begin, end);
    }
    void clear() {
        ranks->clear();
        policy::clear();
    }
    void advance(uint32_t n_new, bool scored) {
        ranks->advance(n_new, scored);
        policy::advance(n_new);
    }
    void load(const std::vector<uint8_t> & bytes) {
        ranks->load(bytes);
        policy::load(bytes);
    }
    int32_t pos(uint32_t token) const { return ranks->pos(token); }
    float   average_weight() const { return ranks->average_weight(); }

    std::shared_ptr<ranking> ranks;
};

// Place n tokens the way the engine does; returns the plan that made room for them.
static plan step(one_group & rule, uint32_t n) {
    const int32_t pos = rule.n_tokens() ? rule.pos(rule.n_tokens() - 1) + 1 : 0;
    plan p = rule.decide(n, pos);
    rule.commit(p);
    for (uint32_t i = 0; i < n; ++i) {
        rule.append(pos + int32_t(i));
    }
    rule.advance(n, rule.scores_due(n));
    return p;
}

// A score that every head shares, on its own.
static void observe(one_group & rule, uint32_t token, float score) { rule.observe(token, score, score, rule.params.ema); }

static std::vector<uint32_t> tokens_of(const std::vector<restoration> & list) {
    std::vector<uint32_t> result;
    for (const auto & r : list) {
        result.push_back(r.token);
    }
    std::sort(result.begin(), result.end());
    return result;
}

TEST(pool_with_room, "nothing is decided while the pool has room") {
    one_group rule(small(64, 2, 16, 4));
    for (int i = 0; i < 60; ++i) {
        CHECK(!step(rule, 1).decided);
    }
    CHECK(rule.n_frozen() == 0);
}

TEST(lowest_scores, "the lowest scores are frozen, sinks and window are not") {
    policy_params p = small(24, 2, 8, 4);
    one_group rule(p);
    step(rule, 20);
    for (uint32_t i = 0; i < 20; ++i) {
        observe(rule, i, i == 5 || i == 7 ? 0.001f : i < 2 || i >= 18 ? 0.0f : 0.5f + 0.01f*float(i));
    }
    step(rule, 4);
    CHECK(rule.n_frozen() == 0); // 20 + 4 fit exactly
    const plan made = step(rule, 2);
    // protected: sinks 0-1 and positions 18-25; capacity = 24 - 8 existing protected - 4 (slack of an interval) = 12
    // of the 16 history tokens 2-17: the 4 lowest go
    CHECK(made.decided);
    CHECK((made.freeze == std::vector<uint32_t>{ 2, 3, 5, 7 }));
    CHECK(made.restore.empty());
    CHECK(rule.n_active() <= p.pool_cells);
}

TEST(hard_bound, "the pool is never exceeded, whatever the steps and scores") {
    for (uint32_t seed = 1; seed <= 20; ++seed) {
        std::mt19937 random(seed);
        for (const bool threshold : { false, true }) {
            policy_params p = small(128, 4, 32, 8);
            p.threshold = threshold;
            p.tau = 0.4f;
            p.timer_share = 0.2f;
            p.timer_grace = 2;
            p.ema = 0.5f;
            one_group rule(p);
            for (int i = 0; i < 400; ++i) {
                const uint32_t n = random() % 5 == 0 ? 1 + random() % 32 : 1;
                step(rule, n);
                CHECK(rule.n_active() <= p.pool_cells);
                const int32_t end = rule.pos(rule.n_tokens() - 1) + 1;
                for (uint32_t t = 0; t < rule.n_tokens(); ++t) {
                    if (rule.is_frozen(t) && rule.is_protected(t, end)) {
                        std::printf("seed %u: protected token %u is frozen\n", seed, t);
                        CHECK(false);
                    }
                    if (!rule.is_frozen(t)) {
                        observe(rule, t, float(random() % 1000) / 1000);
                    }
                }
                if (random() % 50 == 0) {
                    const uint32_t keep = random() % rule.n_tokens();
                    rule.erase(keep, rule.n_tokens());
                }
                if (rule.n_tokens() == 0) {
                    rule.clear();
                }
            }
            CHECK(rule.n_active() + rule.n_frozen() == rule.n_tokens());
        }
    }
}

TEST(timers, "a freeze timer runs floor(sqrt(c)/k) decisions, then the token is back for its grace") {
    policy_params p = small(32, 0, 8, 1);
    p.timer_share = 0.25f; // 8 cells
    p.timer_grace = 2;
    p.softness    = 0.5f;  // c = 1: 2 decisions
    one_group rule(p);
    step(rule, 30);
    for (uint32_t i = 0; i < 30; ++i) {
        observe(rule, i, i == 3 ? 0.0f : 1.0f);
    }
    plan made;
    int frozen_at = -1, back_at = -1, frozen_again_at = -1;
    for (int i = 0; i < 12; ++i) {
        made = step(rule, 1);
        observe(rule, rule.n_tokens() - 1, 1.0f);
        if (std::count(made.freeze.begin(), made.freeze.end(), 3u)) {
            (frozen_at < 0 ? frozen_at : frozen_again_at) = i;
            if (frozen_again_at >= 0) {
                break;
            }
        }
        for (const auto & r : made.restore) {
            if (r.token == 3) {
                CHECK(r.why == cause::timer);
                back_at = i;
            }
        }
    }
    CHECK(frozen_at >= 0);
    CHECK(back_at == frozen_at + 2);       // floor(sqrt(1)/0.5) = 2
    CHECK(frozen_again_at == back_at + 2); // its grace, then it is judged and loses
}

TEST(window_moves_back, "after the tail is removed the new window is restored before the next step") {
    one_group rule(small(32, 0, 8, 1));
    step(rule, 32);
    for (uint32_t i = 0; i < 32; ++i) {
        observe(rule, i, 32.0f - float(i)); // the newest history scores lowest
    }
    step(rule, 8);
    CHECK(rule.is_frozen(31));
    CHECK(rule.is_frozen(30));
    rule.erase(32, rule.n_tokens());
    const plan made = rule.decide(1, 32);
    CHECK(made.decided);
    const auto back = tokens_of(made.restore);
    for (uint32_t i = 25; i < 32; ++i) {
        CHECK(!rule.is_frozen(i) || std::count(back.begin(), back.end(), i) == 1);
    }
    rule.commit(made);
    for (uint32_t i = 25; i < 32; ++i) {
        CHECK(!rule.is_frozen(i));
    }
}

TEST(refill, "room in the pool is given back to the best frozen tokens") {
    one_group rule(small(32, 0, 8, 1));
    step(rule, 32);
    for (uint32_t i = 0; i < 32; ++i) {
        observe(rule, i, float(i % 7));
    }
    for (int i = 0; i < 12; ++i) {
        step(rule, 1);
    }
    CHECK(rule.n_frozen() > 0);
    rule.erase(20, rule.n_tokens());
    const plan made = rule.decide(1, 20);
    rule.commit(made);
    CHECK(rule.n_frozen() == 0); // 20 tokens fit into 32 cells
    CHECK(std::any_of(made.restore.begin(), made.restore.end(), [](const restoration & r) { return r.why == cause::refill; }));
}

TEST(window_preset, "recency keeps sinks and the newest") {
    policy_params p = small(16, 2, 4, 1);
    p.score = SCORE_RECENCY;
    one_group rule(p);
    for (int i = 0; i < 40; ++i) {
        step(rule, 1);
    }
    for (uint32_t i = 0; i < 40; ++i) {
        CHECK(rule.is_frozen(i) == (i >= 2 && i < 26)); // 2 sinks + 14 newest = 16
    }
}

TEST(random_repeats, "the random control repeats for a seed and differs between seeds") {
    const auto frozen = [](uint32_t seed) {
        policy_params p = small(64, 4, 16, 4);
        p.score = SCORE_RANDOM;
        p.seed  = seed;
        one_group rule(p);
        for (int i = 0; i < 200; ++i) {
            step(rule, 1);
        }
        std::vector<bool> result;
        for (uint32_t i = 0; i < rule.n_tokens(); ++i) {
            result.push_back(rule.is_frozen(i));
        }
        return result;
    };
    CHECK(frozen(1) == frozen(1));
    CHECK(frozen(1) != frozen(2));
}

TEST(flag_all, "flag-all freezes about two thirds of the history without any score (method: the null control)") {
    // -66 % after 500 steps at K = 64, k = 2, with a pool that sets no bound
    policy_params p = make_policy_params(config_parse("flag-all,pool=4096"), 4096);
    one_group rule(p);
    double active = 0;
    int n = 0;
    for (int i = 0; i < 500; ++i) {
        step(rule, 1);
        if (i >= 450) {
            active += double(rule.n_active()) / rule.n_tokens();
            n++;
        }
    }
    CHECK(active / n > 0.25);
    CHECK(active / n < 0.45);
}

TEST(paper, "the paper preset freezes what scores below tau for floor(sqrt(c)/k) checks") {
    policy_params p = small(64, 0, 4, 1);
    p.threshold = true;
    p.score     = SCORE_MAGNITUDE;
    p.tau       = 1.0f;
    p.softness  = 2;
    one_group rule(p);
    step(rule, 8);
    for (uint32_t i = 0; i < 8; ++i) {
        observe(rule, i, i == 1 ? 0.5f : 2.0f);
    }
    int first = -1;
    for (int i = 0; i < 20 && first < 0; ++i) {
        const plan made = step(rule, 1);
        if (!made.freeze.empty()) {
            CHECK((made.freeze == std::vector<uint32_t>{ 1 }));
            first = i;
        }
    }
    CHECK(first == 3); // c = 1, 2, 3 give floor(sqrt(c)/2) = 0, c = 4 gives 1: the fourth check
}

TEST(never_fits, "protected tokens that leave no room are refused and nothing changes") {
    one_group rule(small(16, 0, 4, 1));
    step(rule, 12);
    for (uint32_t i = 0; i < 12; ++i) {
        rule.set_pinned(i, true);
    }
    const std::string text = thrown([&] { rule.decide(8, 12); });
    CHECK(text.find("pool of 16 cells") != std::string::npos);
    CHECK(rule.n_frozen() == 0 && rule.n_tokens() == 12);
}

TEST(required, "the smallest pool holds sinks, window, pinned, one batch and two blocks") {
    policy_params p = small(512, 4, 256, 8);
    p.block = 32;
    CHECK(policy::least_cells(p, 512, 100) == 4 + 256 + 100 + 32 + 64);
    CHECK(policy::least_cells(p, 8, 0) == 4 + 256 + 8 + 64);
    p.half_window = true;
    CHECK(policy::least_cells(p, 512, 0) == 2*(4 + 32 + 64));
    CHECK(policy::least_cells(p, 512, 60) == 2*(4 + 32 + 64)); // of the window's half
    CHECK(policy::least_cells(p, 512, 100) == 4 + 32 + 64 + 100 + 32);
}

TEST(pins_and_window, "pinned tokens take of an automatic window what the rest of the pool lacks, down to a block; unpinned, it is whole again") {
    policy_params p = make_policy_params(config_parse("window,pool=256"), 256);
    one_group rule(p);
    for (int32_t i = 0; i < 250; ++i) {
        rule.append(i);
    }
    const auto pin = [&](uint32_t begin, uint32_t end, bool pinned) {
        for (uint32_t i = begin; i < end; ++i) {
            rule.set_pinned(i, pinned);
        }
        rule.recheck();
    };
    const auto active = [&](uint32_t begin, uint32_t end) {
        uint32_t n = 0;
        for (uint32_t i = begin; i < end; ++i) {
            n += !rule.is_frozen(i);
        }
        return n;
    };
    CHECK(rule.window() == 128);
    pin(4, 24, true);
    CHECK(rule.window() == 128);
    pin(24, 84, true);
    CHECK(rule.window() == 256 - 4 - 80 - 3*32 && rule.max_ubatch() == 38);
    pin(84, 120, true);
    CHECK(rule.window() == 40 && rule.max_ubatch() == 32);
    pin(120, 128, true);
    CHECK(rule.window() == 32); // 124 pinned tokens are the most that least_cells() lets through
    CHECK(policy::least_cells(p, 512, 124) == 256);
    rule.commit(rule.decide(32, 250));
    CHECK(rule.n_active() <= 256 - 32 && active(0, 128) == 128 && active(250, 250) == 0);
    for (int32_t i = 250; i < 282; ++i) {
        rule.append(i);
    }
    CHECK(active(250, 282) == 32);
    policy_params gates = make_policy_params(config_parse("kvzip,pool=1024"), 1024); // whose steps are a quarter of the pool
    one_group other(gates);
    for (int32_t i = 0; i < 1000; ++i) {
        other.append(i);
    }
    CHECK(other.max_ubatch() == 256);
    for (uint32_t i = 4; i < 896; ++i) {
        other.set_pinned(i, true);
    }
    CHECK(other.max_ubatch() == 32 && other.max_ubatch(false) == 256 && other.decide(32, 1000).decided);
    pin(4, 128, false);
    CHECK(rule.window() == 128);
    rule.commit(rule.decide(1, 282));
    CHECK(active(282 - 127, 282) == 127); // what the window covers again has come back
}

TEST(gate_threshold, "what scores below a gate's threshold is frozen when it leaves the window, whatever room there is; a full pool lowers nobody's") {
    policy_params p = make_policy_params(config_parse("kvzip,window=32,gate_threshold=0.5"), 512);
    one_group rule(p);
    const auto score = [](uint32_t i) { return i % 4 == 0 ? 0.75f : i % 4 == 1 ? 0.5f : 0.25f; }; // half of them stay
    const auto read = [&](uint32_t n) {
        for (uint32_t end = rule.n_tokens() + n; rule.n_tokens() < end; ) {
            step(rule, 8);
            for (uint32_t i = rule.n_tokens() - 8; i < rule.n_tokens(); ++i) {
                rule.policy::observe(i, score(i), 0, 0);
            }
        }
    };
    read(256);
    rule.commit(rule.decide(8, 256));
    for (uint32_t i = 0; i < 256; ++i) {
        CHECK(rule.is_frozen(i) == (i >= 4 && i < 256 + 8 - 32 && score(i) < 0.5f));
    }
    rule.set_pinned(6, true); // comes back, and stays while it is pinned
    rule.commit(rule.decide(8, 256));
    CHECK(!rule.is_frozen(6));
    rule.set_pinned(6, false);
    rule.commit(rule.decide(8, 256));
    CHECK(rule.is_frozen(6));
    read(1024); // more than 512 cells hold of the better half: the bound is the pool
    CHECK(rule.n_active() <= 512 && rule.n_active() > 512 - 2*32);
    uint32_t n_low = 0, n_best = 0, n_middle = 0;
    for (uint32_t i = 4; i < rule.n_tokens() - 32; ++i) {
        n_low    += !rule.is_frozen(i) && score(i) < 0.5f;
        n_best   += rule.is_frozen(i) && score(i) > 0.5f;
        n_middle += rule.is_frozen(i) && score(i) == 0.5f;
    }
    CHECK(n_low == 0 && n_best == 0 && n_middle > 100);
    rule.erase(1000, rule.n_tokens()); // room again: the middle comes back, the rest does not
    for (int i = 0; i < 4; ++i) {
        rule.commit(rule.decide(8, 1000));
    }
    for (uint32_t i = 4; i < 1000 + 8 - 32; ++i) {
        CHECK(rule.is_frozen(i) == (score(i) < 0.5f) || score(i) == 0.5f);
    }
}

TEST(held, "a token frozen by request comes back by request only") {
    policy_params p = small(64, 0, 8, 1);
    p.timer_share = 0.5f;
    one_group rule(p);
    step(rule, 30);
    rule.set_frozen(5, true, true);
    for (int i = 0; i < 20; ++i) {
        CHECK(step(rule, 1).restore.empty());
    }
    CHECK(rule.is_frozen(5));
    rule.set_frozen(5, false, false);
    CHECK(!rule.is_frozen(5) && rule.n_frozen() == 0);
}

TEST(scores_when, "scores are asked for every interval, once the pool is nearly full") {
    one_group rule(small(256, 0, 32, 8));
    int n_scored = 0;
    for (int i = 0; i < 100; ++i) {
        n_scored += rule.scores_due(1);
        step(rule, 1);
    }
    CHECK(n_scored == 0);
    for (int i = 0; i < 160; ++i) {
        n_scored += rule.scores_due(1);
        step(rule, 1);
    }
    CHECK(n_scored >= 8 && n_scored <= 13);
}

// A pool of 64 for 128 tokens whose scores are all the same, but for one block that is asked for.
static one_group recalling(float share, uint32_t limit) {
    policy_params p = small(64, 4, 16, 8);
    p.recall       = true;
    p.recall_share = share;
    p.recall_limit = limit;
    one_group rule(p);
    for (int i = 0; i < 128; ++i) {
        step(rule, 1);
        observe(rule, rule.n_tokens() - 1, 0.1f);
    }
    return rule;
}

TEST(recall_block, "a frozen block that one head asks for comes back whole, however low its average") {
    one_group rule = recalling(0.5f, 12);
    for (uint32_t i = 32; i < 48; ++i) {
        CHECK(rule.is_frozen(i));
        rule.observe(i, 0.0f, i == 37 ? 0.9f : 0.0f, 0);
    }
    plan made;
    for (int i = 0; i < 8 && !made.decided; ++i) {
        made = step(rule, 1);
    }
    CHECK(made.decided);
    for (uint32_t i = 32; i < 48; ++i) {
        CHECK(!rule.is_frozen(i));
    }
    for (const auto & r : made.restore) {
        CHECK(r.why == cause::recall);
    }
    CHECK(rule.n_active() <= rule.params.pool_cells);
}

TEST(recall_limit, "a decision recalls no more than its limit, the end of a prompt as many as its share") {
    one_group rule = recalling(0.25f, 1);
    for (uint32_t i = 4; i < 100; ++i) {
        if (rule.is_frozen(i)) {
            observe(rule, i, 0.9f);
        }
    }
    CHECK(tokens_of(rule.decide(1, 128, occasion::step).restore).size() <= 8); // 1 a token, interval 8
    CHECK(tokens_of(rule.decide(0, 128, occasion::prompt_end).restore).size() > 16);
}

TEST(recall_off, "without recall frozen tokens keep the score that they were frozen with") {
    policy_params p = small(64, 4, 16, 8);
    one_group rule(p);
    for (int i = 0; i < 128; ++i) {
        step(rule, 1);
        observe(rule, rule.n_tokens() - 1, 0.1f);
    }
    for (uint32_t i = 32; i < 48; ++i) {
        observe(rule, i, 0.9f); // nobody can have seen this
    }
    for (int i = 0; i < 8; ++i) {
        CHECK(step(rule, 1).restore.empty());
    }
}

TEST(hysteresis, "an active token is not exchanged for one that is hardly better") {
    for (const float margin : { 0.0f, 0.5f }) {
        policy_params p = small(64, 0, 16, 8);
        p.recall       = true;
        p.recall_limit = 8;
        p.hysteresis   = margin;
        one_group rule(p);
        for (int i = 0; i < 100; ++i) {
            step(rule, 1);
            observe(rule, rule.n_tokens() - 1, 0.10f);
        }
        for (uint32_t i = 0; i < rule.n_tokens(); ++i) {
            if (rule.is_frozen(i)) {
                rule.observe(i, 0.12f, 0.12f, 0);
            }
        }
        const plan made = rule.decide(8, 100);
        CHECK(made.decided);
        CHECK(made.restore.empty() == (margin > 0));
    }
}

TEST(full_reset, "a full reset clears the timers and gives the whole history to what the newest queries ask for") {
    one_group rule = recalling(0.0f, 1);
    std::vector<uint32_t> wanted;
    for (uint32_t i = 16; i < 48; ++i) {
        rule.observe(i, 0.1f, 0.5f, 1); // the averages stay as they are
        wanted.push_back(i);
    }
    const plan made = rule.decide(1, 128, occasion::full_reset);
    rule.commit(made);
    for (const uint32_t i : wanted) {
        CHECK(!rule.is_frozen(i));
    }
    CHECK(rule.n_active() <= rule.params.pool_cells);
}

TEST(second_look, "a second look exchanges tokens for what the newest query asks for; free cells and the next decision stay as they were") {
    one_group rule = recalling(0.0f, 1), without = recalling(0.0f, 1);
    step(rule, 1); // there are free cells now, and the interval has begun
    step(without, 1);
    const uint32_t n_active = rule.n_active();
    CHECK(n_active < rule.params.pool_cells);
    std::vector<uint32_t> wanted;
    for (uint32_t i = 16; i < 48; ++i) {
        rule.observe(i, 0.1f, 0.5f, 1);
        wanted.push_back(i);
    }
    const int32_t pos_end = rule.pos(rule.n_tokens() - 1) + 1;
    const plan made = rule.decide(0, pos_end, occasion::second_look);
    CHECK(made.decided && !made.restore.empty() && made.restore.size() == made.freeze.size());
    for (const auto & r : made.restore) {
        CHECK(r.why == cause::recovery);
    }
    rule.commit(made);
    for (const uint32_t i : wanted) {
        CHECK(!rule.is_frozen(i));
    }
    CHECK(rule.n_active() == n_active && !rule.is_frozen(rule.n_tokens() - 1));
    int n_decided = 0;
    for (int i = 0; i < 20; ++i) {
        const bool decided = step(rule, 1).decided;
        CHECK(decided == step(without, 1).decided);
        n_decided += decided;
    }
    CHECK(n_decided >= 2 && n_decided <= 3);
}

TEST(average, "the average's weight is for an interval: a long step leaves less of the old score") {
    policy_params p = small(64, 0, 16, 8);
    p.ema = 0.5f;
    one_group rule(p);
    rule.advance(8, true);
    CHECK(std::fabs(rule.average_weight() - 0.5f) < 1e-6f);
    rule.advance(32, true);
    CHECK(std::fabs(rule.average_weight() - 0.0625f) < 1e-6f);
}

TEST(smaller_share, "a share that shrinks is kept to at the next decision, also by a sequence that nothing comes to; one that grows is used") {
    policy_params p = make_policy_params(config_parse("asrkf,pool=256"), 256);
    one_group rule(p);
    for (int32_t i = 0; i < 200; ++i) {
        rule.append(i);
        rule.observe(uint32_t(i), float(i % 17), float(i % 17), 0);
    }
    rule.resize(100);
    CHECK(rule.params.window == 50);
    const plan less = rule.decide(0, 200);
    CHECK(less.decided && less.freeze.size() >= 100 && less.restore.empty());
    rule.commit(less);
    CHECK(rule.n_active() <= 100 && !rule.is_frozen(0) && !rule.is_frozen(199) && !rule.is_frozen(150));
    rule.resize(256);
    const plan more = rule.decide(1, 200);
    CHECK(more.restore.size() == less.freeze.size() && more.freeze.empty());
}

TEST(copied_tokens, "a token of another sequence brings its score and timer along, and as a frozen copy it comes back first") {
    one_group from(make_policy_params(config_parse("asrkf,pool=64"), 64)), to(from.params);
    for (int32_t i = 0; i < 10; ++i) {
        from.append(i);
        from.observe(uint32_t(i), float(i), float(i), 0);
    }
    from.set_frozen(3, true, true);
    for (uint32_t i = 0; i < 10; ++i) {
        to.append(int32_t(i) + 100);
        to.copy_token(i, from, i, i == 5);
    }
    CHECK(to.n_frozen() == 2 && to.is_frozen(3) && to.is_frozen(5) && to.pos(5) == 105);
    to.reorder({ 9, 8, 7, 6, 5, 4, 3, 2, 1, 0 });
    CHECK(to.pos(0) == 109 && to.is_frozen(6) && to.is_frozen(4));
}

TEST(saved_policy, "saved and loaded, scores and timers decide as before; a damaged one, or of other tokens, is refused") {
    policy_params p = make_policy_params(config_parse("asrkf,pool=64,sinks=2,window=8,recall_limit=64"), 64);
    one_group rule(p);
    const auto score = [](int32_t i) { return float((i*37) % 101); };
    for (int32_t i = 0; i < 150; ++i) {
        const plan next = rule.decide(1, i);
        rule.commit(next);
        rule.append(i);
        rule.observe(uint32_t(i), score(i), score(i), 0);
        rule.advance(1, true);
    }
    rule.set_frozen(20, true, true);
    const std::vector<uint8_t> bytes = rule.save();
    one_group loaded(p);
    for (int32_t i = 0; i < 150; ++i) {
        loaded.append(i);
        loaded.set_frozen(uint32_t(i), true, false);
    }
    CHECK(policy::fits(bytes, 150) && !policy::fits(bytes, 149) && !policy::fits({ bytes.begin(), bytes.end() - 1 }, 150));
    CHECK(!thrown([&] { one_group(p).load(bytes); }).empty());
    loaded.load(bytes);
    loaded.commit(loaded.decide(1, 150));
    rule.commit(rule.decide(1, 150));
    uint32_t n_same = 0;
    for (uint32_t i = 0; i < 150; ++i) {
        n_same += loaded.is_frozen(i) == rule.is_frozen(i);
    }
    CHECK(n_same >= 150 - 2*p.interval && loaded.is_frozen(20)); // what its slack leaves
    auto wild = bytes; // any bytes of the right size are safe
    for (size_t i = 24; i < wild.size(); ++i) {
        wild[i] = uint8_t(i*131 + 7);
    }
    one_group other(p);
    for (int32_t i = 0; i < 150; ++i) {
        other.append(i);
        other.set_frozen(uint32_t(i), true, false);
    }
    other.load(wild);
    other.commit(other.decide(1, 150));
    CHECK(other.n_active() < 64);
}

TEST(occasions_of_a_sequence, "a reset is asked for once, and comes again behind a cut no further than a rewalk") {
    occasions why;
    CHECK(why.at(100, 48) == occasion::step);
    why.ask_for(occasion::full_reset);
    CHECK(why.at(100, 48) == occasion::full_reset);
    why.decided(occasion::full_reset, 100);
    CHECK(why.at(100, 48) == occasion::step && why.at(101, 48) == occasion::step);
    CHECK(why.at(99, 48) == occasion::full_reset && why.at(52, 48) == occasion::full_reset && why.at(51, 48) == occasion::step);
    why.decided(occasion::step, 101); // an ordinary decision does not change where the reset was
    CHECK(why.at(99, 48) == occasion::full_reset && why.at(99, 0) == occasion::step);
    why.ask_for(occasion::soft_reset); // what is asked for now comes first
    CHECK(why.at(99, 48) == occasion::soft_reset);
    why.decided(occasion::soft_reset, 99);
    why.forget_reset();
    CHECK(why.at(98, 48) == occasion::step);
    why.ask_for(occasion::window_reset);
    why.clear();
    CHECK(why.at(98, 48) == occasion::step);
}

TEST(who_scores, "as many sequences score as their queries fit a step, in the order of the batch, and at least one") {
    using list = std::vector<uint32_t>;
    CHECK((choose_scored({ 7, 2, 5 }, 4, 32) == list { 7, 2, 5 }));
    CHECK((choose_scored({ 7, 2, 5 }, 16, 32) == list { 7, 2 })); // in the order of the batch
    CHECK((choose_scored({ 7, 2, 5 }, 64, 32) == list { 7 }));
    CHECK(choose_scored({}, 4, 32).empty());
}

int main() { return run_all_tests(); }
