// Entropy of an output row, and what it triggers.
#include "check.h"

#include "policy/entropy.h"

#include <cmath>
#include <limits>
#include <random>

using namespace asrkf;

namespace {

double entropy(const std::vector<float> & logits) { return entropy_of(logits.data(), logits.size()).entropy; }

// A run of n outputs with noise around 2 nats.
recovery_trigger after_a_run(recovery_kind highest, trigger_kind kind, int n, std::vector<int> * levels = nullptr) {
    recovery_trigger t(highest, kind, 0.05f, 16, 7);
    std::mt19937 random(3);
    std::normal_distribution<double> noise(2, 0.2);
    for (int i = 0; i < n; ++i) {
        const int level = t.observe(noise(random), i);
        if (levels) {
            levels->push_back(level);
        }
    }
    return t;
}

} // namespace

TEST(known_values, "uniform, certain and two-way outputs have the entropy that they must have") {
    CHECK(std::fabs(entropy(std::vector<float>(50000, 3.0f)) - std::log(50000.0)) < 1e-6);
    std::vector<float> certain(1000, -100.0f);
    certain[3] = 100.0f;
    CHECK(entropy(certain) == 0);
    CHECK(std::fabs(entropy({ 5, 5, -1000 }) - std::log(2.0)) < 1e-9);
    const double p = 1 / (1 + std::exp(-1.0));
    CHECK(std::fabs(entropy({ 1, 0 }) + p*std::log(p) + (1 - p)*std::log(1 - p)) < 1e-6);
}

TEST(extremes, "huge logits do not overflow, minus infinity is a token that cannot be, NaN is told") {
    CHECK(std::fabs(entropy({ 1e30f, 1e30f }) - std::log(2.0)) < 1e-9);
    CHECK(std::fabs(entropy({ -1e30f, -1e30f }) - std::log(2.0)) < 1e-9);
    const float inf = std::numeric_limits<float>::infinity();
    CHECK(std::fabs(entropy({ 0, -inf, 0 }) - std::log(2.0)) < 1e-9);
    CHECK(entropy({ -inf, -inf }) == 0);
    CHECK(std::isnan(entropy({ 0, NAN })));
    CHECK(std::isnan(entropy({})));
}

TEST(figures, "the top token's probability and the log of the sum fit the entropy, also for a vocabulary of one token") {
    const std::vector<float> one = { -7.5f }, four = { 2, 2, 2, 2 };
    const asrkf_output only = entropy_of(one.data(), 1), even = entropy_of(four.data(), 4);
    CHECK(only.log_sum_exp == -7.5 && only.entropy == 0 && only.top_probability == 1);
    CHECK(std::fabs(even.log_sum_exp - 2 - std::log(4.0)) < 1e-9 && std::fabs(even.entropy - std::log(4.0)) < 1e-9 && even.top_probability == 0.25);
    const float nan[] = { 1, NAN }, none[] = { -INFINITY, -INFINITY }, certain[] = { 1, INFINITY };
    CHECK(std::isnan(entropy_of(nan, 2).log_sum_exp) && std::isnan(entropy_of(nan, 2).top_probability));
    CHECK(entropy_of(none, 2).log_sum_exp == double(-INFINITY) && entropy_of(none, 2).top_probability == 0);
    CHECK(entropy_of(certain, 2).log_sum_exp == double(INFINITY) && entropy_of(certain, 2).top_probability == 1);
}

TEST(shift, "adding a constant to all logits changes nothing") {
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0, 3);
    std::vector<float> a(32000), b;
    for (float & x : a) {
        x = normal(random);
    }
    for (const float x : a) {
        b.push_back(x + 64); // exact in binary for most
    }
    CHECK(std::fabs(entropy(a) - entropy(b)) < 1e-4);
}

TEST(spike, "a jump far above the run's own changes is due, once, then there is a pause") {
    std::vector<int> levels;
    recovery_trigger t = after_a_run(RECOVERY_SOFT, TRIGGER_ENTROPY, 31, &levels);
    for (const int level : levels) {
        CHECK(level == RECOVERY_OFF); // too early to judge
    }
    for (int i = 0; i < 20; ++i) {
        t.observe(2, 100 + i);
    }
    CHECK(t.observe(6, 200) == RECOVERY_SOFT);
    CHECK(t.observe(9, 201) == RECOVERY_OFF);
}

TEST(escalation, "levels escalate while one trigger follows another, up to the highest that is allowed") {
    for (const recovery_kind highest : { RECOVERY_SOFT, RECOVERY_WINDOW, RECOVERY_FULL }) {
        recovery_trigger t = after_a_run(highest, TRIGGER_ENTROPY, 64);
        std::vector<int> seen;
        for (int i = 0; i < 80 && seen.size() < 4; ++i) {
            const int level = t.observe(i % 17 == 0 ? 10 + i : 2, 1000 + i);
            if (level) {
                seen.push_back(level);
            }
        }
        CHECK(seen.size() >= 3);
        for (size_t i = 0; i < seen.size(); ++i) {
            CHECK(seen[i] == std::min(int(i) + 1, int(highest)));
        }
    }
}

TEST(loop, "a text that repeats itself with low entropy is due, though nothing spikes") {
    recovery_trigger t = after_a_run(RECOVERY_SOFT, TRIGGER_ENTROPY, 200);
    int fired = 0;
    double falling = 1;
    for (int i = 0; i < 80; ++i) {
        falling *= 0.99; // never a rise
        fired += t.observe(falling, i % 7) != RECOVERY_OFF;
    }
    CHECK(fired > 0);
    recovery_trigger u = after_a_run(RECOVERY_SOFT, TRIGGER_ENTROPY, 200);
    falling = 1;
    for (int i = 0; i < 80; ++i) {
        falling *= 0.99;
        CHECK(u.observe(falling, 5000 + i) == RECOVERY_OFF); // no repetition
    }
}

TEST(off, "off never fires, and the statistics run all the same") {
    std::vector<int> levels;
    recovery_trigger t = after_a_run(RECOVERY_OFF, TRIGGER_ENTROPY, 500, &levels);
    for (const int level : levels) {
        CHECK(level == RECOVERY_OFF);
    }
    CHECK(t.count() == 500);
    CHECK(std::fabs(t.mean() - 2) < 0.05 && std::fabs(t.deviation() - 0.2) < 0.03);
    CHECK(t.percentile(0.1) < t.percentile(0.5) && t.percentile(0.5) < t.percentile(0.9));
}

TEST(control, "the random trigger fires at about the same rate, at no moment in particular") {
    std::vector<int> levels, spikes;
    after_a_run(RECOVERY_SOFT, TRIGGER_RANDOM, 4000, &levels);
    after_a_run(RECOVERY_SOFT, TRIGGER_ENTROPY, 4000, &spikes);
    const auto fired = [](const std::vector<int> & v) { int n = 0; for (const int x : v) { n += x != 0; } return n; };
    CHECK(fired(levels) > 60 && fired(levels) < 200);
    CHECK(fired(spikes) > 60 && fired(spikes) < 200);
}

int main() { return run_all_tests(); }
