// Decisions on shared scores and sets of tokens (native/policy) against the plain policy, token for token, over random lives of
// a sequence in several layer groups.
#include "check.h"
#include "plain_policy.h"

#include <cmath>
#include <random>
#include <tuple>

using namespace asrkf;

namespace {

using entry = std::tuple<uint32_t, cause>;

std::vector<entry> sorted(const std::vector<restoration> & list) {
    std::vector<entry> result;
    for (const restoration & r : list) {
        result.emplace_back(r.token, r.why);
    }
    std::sort(result.begin(), result.end());
    return result;
}

// One sequence, in groups with pools of their own: both ways.
struct life {
    life(const std::vector<policy_params> & params, uint32_t seed) : random(seed), ranks(params[0].ema, params[0].interval) {
        for (const policy_params & p : params) {
            rules.emplace_back(p);
            plain.emplace_back(p);
        }
        for (policy & rule : rules) {
            rule.follow(ranks);
        }
    }

    uint32_t below(uint32_t n) { return uint32_t(random() % n); }
    bool     one_in(uint32_t n) { return below(n) == 0; }
    uint32_t n() const { return ranks.n_tokens(); }
    int32_t  next_pos() const { return n() ? ranks.pos(n() - 1) + 1 : 0; }

    void insert(uint32_t at, int32_t pos) {
        ranks.insert(at, pos);
        for (size_t g = 0; g < rules.size(); ++g) {
            rules[g].insert(at);
            plain[g].insert(at, pos);
        }
    }

    void erase(uint32_t begin, uint32_t end) {
        ranks.erase(begin, end);
        for (size_t g = 0; g < rules.size(); ++g) {
            rules[g].erase(begin, end);
            plain[g].erase(begin, end);
        }
        if (n() == 0) {
            ranks.clear();
            for (size_t g = 0; g < rules.size(); ++g) {
                rules[g].clear();
                plain[g].clear();
            }
        }
    }

    // The same plan, or the same refusal. False: refused.
    bool decide(size_t g, uint32_t n_new, int32_t pos, occasion why, bool frugal) {
        plan ours, theirs;
        const std::string refused = thrown([&] { ours = rules[g].decide(n_new, pos, why, frugal); });
        const std::string plainly = thrown([&] { theirs = plain[g].decide(n_new, pos, why, frugal); });
        std::sort(ours.flagged.begin(), ours.flagged.end());
        const bool same = refused == plainly && ours.decided == theirs.decided && ours.why == theirs.why && ours.freeze == theirs.freeze
            && ours.flagged == theirs.flagged && sorted(ours.restore) == sorted(theirs.restore);
        n_decided  += ours.decided;
        n_frozen   += ours.freeze.size();
        n_restored += ours.restore.size();
        if (!same) {
            std::printf("step %d, group %zu: freeze %zu and %zu, restore %zu and %zu, \"%s\" and \"%s\"\n", n_steps, g, ours.freeze.size(), theirs.freeze.size(),
                    ours.restore.size(), theirs.restore.size(), refused.c_str(), plainly.c_str());
        }
        CHECK(same);
        differs |= !same;
        rules[g].commit(ours);
        plain[g].commit(theirs);
        return refused.empty();
    }

    void step(uint32_t n_new, occasion why, bool frugal) {
        n_steps++;
        const int32_t pos = next_pos();
        bool fits = true;
        for (size_t g = 0; g < rules.size(); ++g) {
            CHECK(rules[g].scores_due(n_new) == plain[g].scores_due(n_new));
            fits &= decide(g, n_new, pos, why, frugal);
        }
        if (!fits) {
            erase(n() / 2, n());
            return;
        }
        const bool scored = rules[0].scores_due(n_new);
        for (uint32_t i = 0; i < n_new; ++i) {
            insert(n(), pos + int32_t(i));
        }
        ranks.advance(n_new, scored);
        for (size_t g = 0; g < rules.size(); ++g) {
            rules[g].advance(n_new);
            plain[g].advance(n_new, scored);
        }
        if (scored) {
            observe();
        }
    }

    // Scores as attention has them, some tokens wanted by all; or many ties; or none, or broken ones, among them.
    void observe() {
        const float keep = ranks.average_weight();
        CHECK(keep == plain[0].average_weight());
        const uint32_t kind = below(8);
        for (uint32_t i = 0; i < n(); ++i) {
            float score = std::exp(-10.0f*float(below(1000)) / 1000), peak = score*float(1 + below(20));
            score = kind == 0 ? float(below(3)) : kind == 1 && one_in(20) ? NAN : kind == 2 ? 0 : kind == 3 && one_in(50) ? 1e30f : score;
            peak  = kind == 0 ? float(below(3)) : kind == 1 && one_in(20) ? INFINITY : kind == 2 ? 0 : peak;
            if (kind == 4 && one_in(10)) {
                continue; // newer than the scores
            }
            ranks.observe(i, score, peak, keep);
            for (size_t g = 0; g < rules.size(); ++g) {
                if (rules[g].has_own_scores() && !rules[g].is_frozen(i)) {
                    rules[g].observe(i, score, peak, keep);
                }
                plain[g].observe(i, score, peak, keep);
                if (rules[g].params.leans && !rules[g].is_frozen(i) && !one_in(10)) {
                    const float attention = one_in(50) ? NAN : one_in(10) ? 0 : std::exp(-10.0f*float(below(1000)) / 1000);
                    rules[g].observe_own(i, attention);
                    plain[g].observe_own(i, attention);
                }
            }
        }
    }

    void pin(bool pinned) {
        const uint32_t begin = below(n()), end = std::min(n(), begin + below(20));
        for (uint32_t i = begin; i < end; ++i) {
            ranks.set_pinned(i, pinned);
            for (size_t g = 0; g < rules.size(); ++g) {
                rules[g].recheck();
                plain[g].set_pinned(i, pinned);
            }
        }
    }

    void request(bool frozen) {
        const uint32_t begin = below(n()), end = std::min(n(), begin + below(30));
        for (size_t g = 0; g < rules.size(); ++g) {
            for (uint32_t i = begin; i < end; ++i) {
                if (!frozen && rules[g].n_active() >= rules[g].params.pool_cells) {
                    break;
                }
                if (!frozen || !rules[g].is_protected(i, next_pos())) {
                    CHECK(!frozen || !plain[g].is_protected(i, next_pos()));
                    rules[g].set_frozen(i, frozen, frozen);
                    plain[g].set_frozen(i, frozen, frozen);
                }
            }
        }
    }

    void resize() {
        for (size_t g = 0; g < rules.size(); ++g) {
            const uint32_t cells = std::max(64u, sizes[g] - below(sizes[g] / 2));
            rules[g].resize(cells);
            plain[g].resize(cells);
        }
    }

    // A part moves to where it was, and positions across it to where they are not.
    void reorder() {
        std::vector<uint32_t> order(n());
        std::vector<int32_t>  positions(n());
        const uint32_t by = below(n());
        for (uint32_t i = 0; i < n(); ++i) {
            order[i]     = (i + by) % n();
            positions[i] = ranks.pos(i);
        }
        ranks.reorder(order);
        for (uint32_t i = 0; i < n(); ++i) {
            ranks.move_to(i, positions[i]);
        }
        for (size_t g = 0; g < rules.size(); ++g) {
            rules[g].reorder(order);
            rules[g].recheck();
            plain[g].reorder(order);
            for (uint32_t i = 0; i < n(); ++i) {
                plain[g].move_to(i, positions[i]);
            }
        }
    }

    // Either reads what either has written, also the previous version of this library.
    void save_and_load() {
        const bool ours = one_in(2);
        std::vector<std::vector<uint8_t>> bytes;
        for (size_t g = 0; g < rules.size(); ++g) {
            bytes.push_back(ours ? rules[g].save() : plain[g].save());
        }
        ranks.load(bytes[0]);
        for (size_t g = 0; g < rules.size(); ++g) {
            for (uint32_t i = 0; i < n(); ++i) {
                rules[g].set_frozen(i, true, false);
                plain[g].set_frozen(i, true, false);
            }
            rules[g].load(bytes[g]);
            plain[g].load(bytes[g]);
        }
    }

    void frozen_copy() {
        const uint32_t i = below(n());
        for (size_t g = 0; g < rules.size(); ++g) {
            rules[g].set_frozen_copy(i);
            plain[g].set_frozen_copy(i);
        }
    }

    void compare() {
        for (size_t g = 0; g < rules.size(); ++g) {
            CHECK(rules[g].n_tokens() == plain[g].n_tokens() && rules[g].n_frozen() == plain[g].n_frozen());
            for (uint32_t i = 0; i < n(); ++i) {
                if (rules[g].is_frozen(i) != plain[g].is_frozen(i)) {
                    differs = true;
                }
            }
        }
        CHECK(!differs);
    }

    std::mt19937              random;
    ranking                   ranks;
    std::vector<policy>       rules;
    std::vector<plain_policy> plain;
    std::vector<uint32_t>     sizes;
    int    n_steps = 0;
    size_t n_decided = 0, n_frozen = 0, n_restored = 0;
    bool   differs = false;
};

void one_operation(life & l, bool with_requests) {
    const uint32_t n = l.n();
    switch (l.below(40)) {
        case 0:  l.step(1 + l.below(24), occasion::step, false); break; // a piece of a prompt
        case 1:  l.step(1, occasion::step, true); break;
        case 2:  l.step(0, occasion::prompt_end, false); break;
        case 3:  l.step(1, occasion(1 + l.below(4)), l.one_in(4)); break;
        case 4:  l.erase(n - std::min(n, l.below(10)), n); break;
        case 5:  l.one_in(4) ? l.erase(l.below(n), n) : l.erase(n - std::min(n, 3u), n); break;
        case 6: {
            const uint32_t begin = l.below(n);
            if (l.one_in(2)) {
                l.erase(begin, std::min(n, begin + l.below(100)));
            }
            break;
        }
        case 7:  l.pin(true); break;
        case 8:  l.pin(false); break;
        case 9:  l.one_in(3) ? l.resize() : l.observe(); break;
        case 10: with_requests ? l.request(l.one_in(2)) : l.observe(); break;
        case 11: with_requests && l.one_in(3) ? l.save_and_load() : l.observe(); break;
        case 12: with_requests && l.one_in(3) ? l.reorder() : l.observe(); break;
        case 13: with_requests ? l.frozen_copy() : l.observe(); break;
        case 14: l.step(0, occasion::second_look, l.one_in(4)); break;
        default: l.step(1, occasion::step, false); break;
    }
}

// A life that grows to a few times its pools.
void live(const char * settings, uint32_t seed, bool with_requests, int n_operations = 700) {
    std::mt19937 random(seed);
    std::vector<policy_params> params;
    const uint32_t n_groups = 1 + seed % 3;
    for (uint32_t g = 0; g < n_groups; ++g) {
        params.push_back(make_policy_params(config_parse(std::string(settings) + ",pool=256"), 96 + uint32_t(random() % 160)));
    }
    life l(params, seed);
    for (const policy_params & p : params) {
        l.sizes.push_back(p.pool_cells);
    }
    for (int i = 0; i < n_operations && !l.differs; ++i) {
        if (l.n() < 200) {
            l.step(1 + l.below(16), occasion::step, false);
        } else {
            one_operation(l, with_requests);
        }
        if (l.n() > 900) {
            l.erase(300, 300 + l.below(600));
        }
        if (i % 50 == 0) {
            l.compare();
        }
    }
    if (l.differs) {
        std::printf("%s, seed %u\n", settings, seed);
    }
    CHECK(l.differs || (l.n_decided > 20 && l.n_frozen > 100 && l.n_restored > 20)); // it has lived
    for (size_t g = 0; g < l.rules.size() && !with_requests; ++g) {
        CHECK(l.rules[g].n_redundant() == l.plain[g].n_redundant());
    }
}

uint32_t n_seeds() {
    const char * text = std::getenv("ASRKF_TEST_SEEDS");
    return text ? uint32_t(std::atoi(text)) : 12;
}

void live_often(const char * settings) {
    for (uint32_t seed = 1; seed <= n_seeds(); ++seed) {
        live(settings, seed, seed % 2 == 0);
    }
}

} // namespace

TEST(recall, "with recall, decisions are those of the plain policy") {
    live_often("asrkf");
    live_often("asrkf,recall_share=0");
    live_often("asrkf,recall_share=1,hysteresis=0,interval=1");
    live_often("asrkf,recall_limit=1,ema=0,window=32,sinks=0");
    live_often("asrkf,timer_share=0.2");
    live_often("asrkf,score=magnitude,hysteresis=1,interval=16");
}

TEST(without_recall, "without recall, decisions are those of the plain policy") {
    live_often("asrkf,recall=off");
    live_often("asrkf,recall=off,timer_share=0.2,softness=2");
}

TEST(own_ranking, "where layer groups lean to tokens of their own, decisions are those of the plain policy") {
    live_often("asrkf,ranking=own");
    live_often("asrkf,ranking=own,recall_share=0,hysteresis=0");
    live_often("asrkf,ranking=own,recall_limit=1,ema=0,window=32,sinks=0");
    live_often("asrkf,ranking=own,timer_share=0.2,interval=1");
}

TEST(controls, "the controls decide as the plain policy does") {
    live_often("window");
    live_often("random,seed=7");
    live_often("random,timer_share=0.3,timer_grace=1,softness=1");
}

TEST(between_cuts, "between the cuts of refreekv only the bound is kept, as the plain policy keeps it") {
    live_often("refreekv,window=32");
    live_often("refreekv,window=16,order=relevance");
    live_often("refreekv,window=32,recall=exact");
}

TEST(threshold, "the paper's threshold decides as the plain policy does") {
    live_often("paper,tau=0.01,window=32");
    live_often("paper,tau=0.2,window=16,softness=0.5");
    live_often("flag-all,window=32");
}

TEST(copies, "a copy of a sequence goes on as the plain policy's copy does, also where its tokens are frozen copies") {
    for (const char * settings : { "asrkf", "asrkf,ranking=own", "asrkf,recall=off,timer_share=0.2", "random,seed=3", "paper,tau=0.2,window=16" }) {
        for (uint32_t seed = 1; seed <= 4; ++seed) {
            const policy_params p = make_policy_params(config_parse(std::string(settings) + ",pool=256"), 160);
            life from({ p, p }, seed), to({ p, p }, seed + 100);
            for (int i = 0; i < 400; ++i) {
                from.step(1, occasion::step, false);
            }
            for (uint32_t i = 0; i < from.n(); ++i) {
                to.insert(i, from.ranks.pos(i));
                to.ranks.copy_token(i, from.ranks, i);
                for (size_t g = 0; g < 2; ++g) {
                    const bool frozen_copy = seed % 2 == 0 || i % 7 == 0;
                    to.rules[g].copy_token(i, from.rules[g], i, frozen_copy);
                    to.plain[g].copy_token(i, from.plain[g], i, frozen_copy);
                }
            }
            to.compare();
            for (int i = 0; i < 200 && !to.differs; ++i) {
                to.step(1, occasion::step, false);
            }
            to.compare();
            CHECK(to.n_frozen > 50);
        }
    }
}

int main() { return run_all_tests(); }
