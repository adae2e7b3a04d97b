// What decisions cost, without a model: seconds and bytes of the policies of one sequence in many layer groups, for
// scripts/bench_decisions. Arguments: tokens, groups, mean pool in cells, "shared" (native/policy) or "plain" (plain_policy.h: each
// group for itself, as before). Prints one line of figures.
#include "plain_policy.h"
#include "text_scores.h"

#include <ctime>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <malloc.h>

using namespace asrkf;

namespace {

double now() { return double(std::clock()) / CLOCKS_PER_SEC; } // of this process: others may run beside it
double bytes_in_use() { return double(mallinfo2().uordblks) + double(mallinfo2().hblkhd); }

// One sequence in many groups.
struct shared_policies {
    explicit shared_policies(const std::vector<policy_params> & params) : ranks(params[0].ema, params[0].interval) {
        for (const policy_params & p : params) {
            rules.emplace_back(p);
            rules.back().follow(ranks);
        }
    }
    uint32_t n_tokens() const { return ranks.n_tokens(); }
    void append(int32_t pos) {
        const uint32_t at = ranks.n_tokens();
        ranks.insert(at, pos);
        for (policy & rule : rules) {
            rule.insert(at);
        }
    }
    void advance(bool scored) {
        ranks.advance(1, scored);
        for (policy & rule : rules) {
            rule.advance(1);
        }
    }
    void fold(const scores_of_a_text & fresh) {
        const float keep = ranks.average_weight();
        for (uint32_t i = 0; i < ranks.n_tokens(); ++i) {
            ranks.observe(i, fresh.mean[i], fresh.peak[i], keep);
        }
    }
    ranking             ranks;
    std::vector<policy> rules;
};

struct plain_policies {
    explicit plain_policies(const std::vector<policy_params> & params) : rules(params.begin(), params.end()) {}
    uint32_t n_tokens() const { return rules[0].n_tokens(); }
    void append(int32_t pos) {
        for (plain_policy & rule : rules) {
            rule.append(pos);
        }
    }
    void advance(bool scored) {
        for (plain_policy & rule : rules) {
            rule.advance(1, scored);
        }
    }
    void fold(const scores_of_a_text & fresh) {
        for (plain_policy & rule : rules) {
            const float keep = rule.average_weight();
            for (uint32_t i = 0; i < rule.n_tokens(); ++i) {
                rule.observe(i, fresh.mean[i], fresh.peak[i], keep);
            }
        }
    }
    std::vector<plain_policy> rules;
};

template <typename Policies> int measure(const std::vector<policy_params> & params, uint32_t n_tokens) {
    const uint32_t n_steps = n_tokens > 300000 ? 64 : 256, n_first = 64;
    scores_of_a_text fresh(n_tokens);
    const double before = bytes_in_use();
    Policies all(params);
    double seconds = 0, fold_seconds = 0;
    size_t n_decisions = 0, n_frozen = 0, n_restored = 0;
    const uint32_t n_begin = n_tokens - n_steps - n_first;
    for (uint32_t i = 0; i < n_begin; ++i) {
        all.append(int32_t(i));
    }
    for (uint32_t step = 0; step < n_first + n_steps; ++step) {
        const bool counts = step >= n_first;
        if (step % params[0].interval == 0) {
            fresh.ask(all.n_tokens());
            const double begin = now();
            all.fold(fresh);
            fold_seconds += counts ? now() - begin : 0;
        }
        const double begin = now();
        for (auto & rule : all.rules) {
            const plan made = rule.decide(1, int32_t(all.n_tokens()));
            rule.commit(made);
            n_decisions += counts && made.decided;
            n_frozen    += counts ? made.freeze.size() : 0;
            n_restored  += counts ? made.restore.size() : 0;
        }
        seconds += counts ? now() - begin : 0;
        all.append(int32_t(all.n_tokens()));
        all.advance(step % params[0].interval == params[0].interval - 1);
    }
    std::printf("%zu,%.3f,%.3f,%.3e,%.3e,%.1f,,\n", n_decisions, double(n_frozen) / double(n_decisions), double(n_restored) / double(n_decisions),
            fold_seconds / n_steps, seconds / n_steps, (bytes_in_use() - before) / n_tokens);
    return 0;
}

} // namespace

int main(int argc, char ** argv) {
    if (argc != 6) {
        std::printf("bench_decisions POLICY TOKENS GROUPS POOL_CELLS shared|plain\n");
        return 2;
    }
    const uint32_t n_tokens = uint32_t(std::atoi(argv[2])), n_groups = uint32_t(std::atoi(argv[3])), pool = uint32_t(std::atoi(argv[4]));
    std::vector<policy_params> params;
    for (uint32_t g = 0; g < n_groups; ++g) { // from half of the mean to half more
        const uint32_t cells = std::max(1u, uint32_t(pool*(0.5 + double(g) / std::max(1u, n_groups - 1))) / 256)*256;
        params.push_back(make_policy_params(config_parse(std::string(argv[1]) + ",pool=" + std::to_string(cells)), cells));
    }
    return std::strcmp(argv[5], "plain") == 0 ? measure<plain_policies>(params, n_tokens) : measure<shared_policies>(params, n_tokens);
}
