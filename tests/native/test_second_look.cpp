// Which tokens are computed a second time: the rule by itself.
#include "check.h"

#include "policy/second_look.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>

using namespace asrkf;

namespace {

constexpr int N_TOKENS = 5000;

// By token: was it looked at?
std::vector<bool> looks_of(look_rule & rule, const std::function<double(int)> & figure, int n = N_TOKENS) {
    std::vector<bool> looks;
    for (int i = 0; i < n; ++i) {
        looks.push_back(rule.observe(figure(i)));
    }
    return looks;
}

size_t count(const std::vector<bool> & looks) { return size_t(std::count(looks.begin(), looks.end(), true)); }

} // namespace

TEST(share, "of figures in no order about the share is looked at, and these are the largest") {
    for (const float share : { 0.02f, 0.1f, 0.25f, 0.5f }) {
        look_rule rule(LOOK_MISSED, share, 0);
        std::mt19937 random(3);
        std::uniform_real_distribution<double> any(0, 1);
        std::vector<double> figures;
        for (int i = 0; i < N_TOKENS; ++i) {
            figures.push_back(any(random));
        }
        const std::vector<bool> looks = looks_of(rule, [&](int i) { return figures[size_t(i)]; });
        CHECK(double(count(looks)) > 0.7*double(share)*N_TOKENS && double(count(looks)) <= double(share)*N_TOKENS);
        for (size_t i = 0; i < looks.size(); ++i) {
            CHECK(!looks[i] || figures[i] > 1 - double(share) - 0.15); // the newest 256 are a sample
        }
    }
}

TEST(bound, "there are never more looks than the share of the tokens so far, whatever the figures do") {
    const std::vector<std::function<double(int)>> runs = {
        [](int i) { return double(i); },                               // each the largest so far
        [](int i) { return std::exp2(i % 1000); },                     // and again
        [](int i) { return i < 2000 ? 0.0 : double(i); },              // after a long rest
        [](int i) { return i / 64 % 2 ? 1.0 : 0.0; },
        [](int i) { return i % 3 == 0 ? INFINITY : i % 3 == 1 ? NAN : double(i); },
    };
    for (const auto & figure : runs) {
        for (const look_trigger_kind kind : { LOOK_MISSED, LOOK_ENTROPY, LOOK_RANDOM }) {
            look_rule rule(kind, 0.1f, 5);
            const std::vector<bool> looks = looks_of(rule, figure);
            size_t n = 0, n_in_100 = 0;
            for (size_t i = 0; i < looks.size(); ++i) {
                n += looks[i];
                n_in_100 += looks[i];
                n_in_100 -= i >= 100 && looks[i - 100];
                CHECK(double(n) <= 0.1*double(i + 1) + 1e-6 && double(n_in_100) <= 0.1*100 + look_rule::SAVED + 1e-6);
            }
        }
    }
    look_rule rising(LOOK_MISSED, 0.1f, 0);
    CHECK(count(looks_of(rising, runs[0])) > N_TOKENS*9/100); // and it is used
}

TEST(nothing, "equal figures, no figures, and a share of 0 call for no look") {
    look_rule same(LOOK_MISSED, 0.5f, 0), none(LOOK_MISSED, 0.5f, 0), never(LOOK_MISSED, 0.0f, 0), by_chance(LOOK_RANDOM, 0.0f, 0);
    CHECK(count(looks_of(same, [](int) { return 0.25; })) == 0);
    CHECK(count(looks_of(none, [](int) { return NAN; })) == 0);
    CHECK(count(looks_of(never, [](int i) { return i; })) == 0 && count(looks_of(by_chance, [](int i) { return i; })) == 0);
}

TEST(start, "too early nothing can be judged") {
    look_rule rule(LOOK_MISSED, 0.5f, 0);
    CHECK(count(looks_of(rule, [](int i) { return i; }, int(look_rule::LEAST))) == 0);
    CHECK(rule.observe(1e9));
}

TEST(again, "the same run has the same looks, also after a clear; another seed has other chances") {
    for (const look_trigger_kind kind : { LOOK_MISSED, LOOK_RANDOM }) {
        look_rule rule(kind, 0.2f, 7), other(kind, 0.2f, 8);
        const auto figure = [](int i) { return std::sin(i*i); };
        const auto first = looks_of(rule, figure, 700);
        rule.clear();
        CHECK(looks_of(rule, figure, 700) == first && count(first) > 70);
        CHECK((looks_of(other, figure, 700) == first) == (kind == LOOK_MISSED));
    }
}

int main() { return run_all_tests(); }
