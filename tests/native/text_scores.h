// Scores as those of a text that goes on, for benches: each token has an importance of its own, which is log-normal, and at each
// scoring the queries want it more or less.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

struct scores_of_a_text {
    explicit scores_of_a_text(uint32_t n_most) : mean(n_most), peak(n_most), own(n_most), factor(n_most) {
        for (uint32_t i = 0; i < n_most; ++i) {
            own[i]    = std::exp(2.0f*normal(random));
            factor[i] = 1 + std::exp(normal(random));
        }
        for (int i = 0; i < 1 << 14; ++i) {
            wanted.push_back(std::exp(0.03f*normal(random)));
        }
    }
    void ask(uint32_t n_tokens) {
        for (uint32_t i = 0, at = uint32_t(random()); i < n_tokens; ++i, at += at % 977 == 0 ? 3 : 1) {
            mean[i] = own[i]*wanted[at % wanted.size()] / float(n_tokens);
            peak[i] = mean[i]*factor[i];
        }
    }
    std::mt19937                    random { 1 };
    std::normal_distribution<float> normal;
    std::vector<float>              mean, peak, own, factor, wanted;
};
