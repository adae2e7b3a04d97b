#include "policy/kept_attention.h"

#include "policy/budgets.h"

#include <algorithm>
#include <map>

namespace asrkf {

namespace {

constexpr uint32_t SINKS = 4;
constexpr float    SCORER_KEEP_RATIO = 0.33f; // a pool of usual size: at a fifth the sets' order is a little further from the measured one

} // namespace

std::vector<float> kept_tokens(const std::vector<const chunk_attention *> & layers, size_t chunk, uint32_t chunk_tokens, float keep_ratio) {
    const uint32_t n_history = uint32_t(chunk)*chunk_tokens, n_kept = uint32_t(keep_ratio*float(n_history)), n_window = n_kept / 2;
    std::vector<float> kept(n_history + chunk_tokens, 0);
    std::fill(kept.begin(), kept.begin() + std::min(SINKS, n_history), 1.0f);
    std::fill(kept.begin() + (n_history - n_window), kept.end(), 1.0f);
    std::vector<float> score(n_history, 0);
    for (const chunk_attention * layer : layers) {
        for (size_t before = chunk > 2 ? chunk - 2 : 0; before < chunk; ++before) {
            for (size_t i = 0; i < std::min(score.size(), (*layer)[before].size()); ++i) {
                score[i] += (*layer)[before][i];
            }
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

std::vector<double> lost_attention(const std::vector<chunk_attention> & layers, const std::vector<uint32_t> & scoring, size_t first_chunk, uint32_t chunk_tokens, float keep_ratio) {
    std::vector<const chunk_attention *> ranking;
    for (const uint32_t i : scoring) {
        ranking.push_back(&layers[i]);
    }
    const size_t n_chunks = layers[0].size();
    std::vector<double> lost(layers.size(), 0);
    for (size_t chunk = first_chunk; chunk < n_chunks; ++chunk) {
        const std::vector<float> kept = kept_tokens(ranking, chunk, chunk_tokens, keep_ratio);
        for (size_t l = 0; l < layers.size(); ++l) {
            float sum = 0;
            for (size_t i = 0; i < kept.size(); ++i) {
                sum += kept[i] == 0 ? layers[l][chunk][i] : 0;
            }
            lost[l] += double(sum) / double(n_chunks - first_chunk);
        }
    }
    return lost;
}

std::vector<uint32_t> best_scoring_layers(const std::vector<chunk_attention> & layers, const std::vector<double> & losses, size_t first_chunk, uint32_t chunk_tokens) {
    const uint32_t n_layers = uint32_t(layers.size());
    std::vector<double> own_lost;
    for (uint32_t i = 0; i < n_layers; ++i) {
        own_lost.push_back(std::max(1e-6, lost_attention({ layers[i] }, { 0 }, first_chunk, chunk_tokens, SCORER_KEEP_RATIO)[0]));
    }
    std::map<std::vector<uint32_t>, double> known;
    const auto loss = [&](std::vector<uint32_t> set) {
        std::sort(set.begin(), set.end());
        set.erase(std::unique(set.begin(), set.end()), set.end());
        if (const auto found = known.find(set); found != known.end()) {
            return found->second;
        }
        const std::vector<double> lost = lost_attention(layers, set, first_chunk, chunk_tokens, SCORER_KEEP_RATIO);
        double sum = 0;
        for (uint32_t i = 0; i < n_layers; ++i) {
            sum += losses[i]*(lost[i] / own_lost[i])*(lost[i] / own_lost[i]);
        }
        return known[set] = sum;
    };
    std::vector<uint32_t> chosen = default_scoring_layers(n_layers);
    const uint32_t n_parts = uint32_t(chosen.size());
    for (uint32_t turn = 0; turn < 2*n_parts; ++turn) { // twice, since the best of a part depends on the others
        const uint32_t part = turn % n_parts;
        std::vector<uint32_t> best = chosen;
        for (uint32_t il = part*n_layers / n_parts; il < (part + 1)*n_layers / n_parts; ++il) {
            std::vector<uint32_t> other = chosen;
            other[part] = il;
            best = loss(other) < loss(best) ? other : best;
        }
        chosen = best;
    }
    std::sort(chosen.begin(), chosen.end());
    chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
    return chosen;
}

} // namespace asrkf
