#include "policy/kept_attention.h"

#include <algorithm>

namespace asrkf {

namespace {

constexpr uint32_t SINKS = 4;

} // namespace

std::vector<float> kept_tokens(const chunk_attention & attention, size_t chunk, uint32_t chunk_tokens, float keep_ratio) {
    const uint32_t n_history = uint32_t(chunk)*chunk_tokens, n_kept = uint32_t(keep_ratio*float(n_history)), n_window = n_kept / 2;
    std::vector<float> kept(n_history + chunk_tokens, 0);
    std::fill(kept.begin(), kept.begin() + std::min(SINKS, n_history), 1.0f);
    std::fill(kept.begin() + (n_history - n_window), kept.end(), 1.0f);
    std::vector<float> score(n_history, 0);
    for (size_t before = chunk > 2 ? chunk - 2 : 0; before < chunk; ++before) {
        for (size_t i = 0; i < std::min(score.size(), attention[before].size()); ++i) {
            score[i] += attention[before][i];
        }
    }
    std::vector<uint32_t> rest;
    for (uint32_t i = 0; i < n_history; ++i) {
        if (kept[i] == 0) {
            rest.push_back(i);
        }
    }
    const size_t n_best = std::min(rest.size(), size_t(std::max(0, int(n_kept - n_window) - int(SINKS))));
    std::nth_element(rest.begin(), rest.begin() + std::ptrdiff_t(n_best), rest.end(), [&](uint32_t a, uint32_t b) { return score[a] != score[b] ? score[a] > score[b] : a > b; });
    for (size_t i = 0; i < n_best; ++i) {
        kept[rest[i]] = 1;
    }
    return kept;
}

} // namespace asrkf
