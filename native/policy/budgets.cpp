#include "policy/budgets.h"

#include <algorithm>

namespace asrkf {

namespace {

struct split {
    std::vector<group_budget> groups;
    double                    loss = 0;
};

split hand_out(const std::vector<std::vector<layer_budget>> & members, uint32_t mean_cells, uint32_t least_cells, uint32_t n_ctx, uint32_t unit_cells) {
    least_cells = std::min(mean_cells / POOL_PAD_CELLS, (least_cells + POOL_PAD_CELLS - 1) / POOL_PAD_CELLS)*POOL_PAD_CELLS;
    split result;
    std::vector<double>   sensitivity;
    std::vector<uint64_t> cell_bytes;
    uint64_t left_bytes = 0;
    for (const auto & layers : members) {
        result.groups.push_back({ {}, least_cells });
        sensitivity.push_back(0);
        cell_bytes.push_back(0);
        for (const layer_budget & l : layers) {
            result.groups.back().layers.push_back(l.il);
            sensitivity.back() += l.sensitivity;
            cell_bytes.back()  += l.token_bytes;
        }
        std::sort(result.groups.back().layers.begin(), result.groups.back().layers.end());
        left_bytes += (mean_cells - least_cells)*cell_bytes.back();
    }
    const auto loss = [&](size_t g, uint32_t cells) { return predicted_loss(sensitivity[g], double(std::min(cells, n_ctx)) / n_ctx); };
    while (true) {
        size_t best = members.size();
        double most = -1;
        for (size_t g = 0; g < members.size(); ++g) {
            const uint32_t cells = result.groups[g].pool_cells;
            if (cells + unit_cells <= n_ctx && unit_cells*cell_bytes[g] <= left_bytes) {
                const double gain = (loss(g, cells) - loss(g, cells + unit_cells)) / double(cell_bytes[g]);
                if (gain > most) {
                    most = gain;
                    best = g;
                }
            }
        }
        if (best == members.size()) {
            break;
        }
        result.groups[best].pool_cells += unit_cells;
        left_bytes -= unit_cells*cell_bytes[best];
    }
    for (size_t g = 0; g < members.size(); ++g) {
        result.loss += loss(g, result.groups[g].pool_cells);
    }
    return result;
}

} // namespace

double predicted_loss(double sensitivity, double active_ratio) { return sensitivity * (1 / active_ratio - 1) / (1 / 0.2 - 1); }

std::vector<group_budget> split_each(const std::vector<layer_budget> & layers, uint32_t mean_cells, uint32_t least_cells, uint32_t n_ctx, bool apart) {
    std::vector<std::vector<layer_budget>> members;
    for (const layer_budget & l : layers) {
        members.push_back({ l });
    }
    const uint32_t unit_cells = std::max(1u, mean_cells / (4*POOL_PAD_CELLS))*POOL_PAD_CELLS;
    std::vector<group_budget> merged;
    for (const group_budget & own : hand_out(members, mean_cells, least_cells, n_ctx, unit_cells).groups) {
        auto same = std::find_if(merged.begin(), merged.end(), [&](const group_budget & g) { return g.pool_cells == own.pool_cells; });
        if (apart || same == merged.end()) {
            merged.push_back(own);
        } else {
            same->layers.push_back(own.layers[0]);
        }
    }
    return merged;
}

std::vector<group_budget> split_two(const std::vector<layer_budget> & layers, uint32_t mean_cells, uint32_t least_cells, uint32_t n_ctx) {
    std::vector<layer_budget> sorted = layers;
    std::stable_sort(sorted.begin(), sorted.end(), [](const layer_budget & a, const layer_budget & b) { return a.sensitivity > b.sensitivity; });
    split best = hand_out({ sorted }, mean_cells, least_cells, n_ctx, POOL_PAD_CELLS);
    for (size_t n = 1; n < sorted.size(); ++n) {
        split s = hand_out({ { sorted.begin(), sorted.begin() + std::ptrdiff_t(n) }, { sorted.begin() + std::ptrdiff_t(n), sorted.end() } }, mean_cells, least_cells, n_ctx, POOL_PAD_CELLS);
        if (s.loss < best.loss) {
            best = std::move(s);
        }
    }
    return best.groups;
}

std::vector<uint32_t> default_scoring_layers(uint32_t n_layers) {
    const uint32_t n_parts = std::clamp(n_layers / 4, 1u, 4u);
    std::vector<uint32_t> chosen;
    for (uint32_t part = 0; part < n_parts; ++part) { // of four: 0.2, 0.45, 0.7 and 0.95 of the depth
        chosen.push_back(uint32_t((part + 0.8)/n_parts*double(n_layers - 1) + 0.5));
    }
    return chosen;
}

double prior_sensitivity(double depth_ratio) { return depth_ratio > 0.2 && depth_ratio < 0.8 ? 2.0 : 1.0; }

std::vector<uint32_t> fair_shares(uint32_t pool_cells, const std::vector<uint32_t> & demands) {
    std::vector<uint32_t> shares(demands.size(), 0), order(demands.size());
    for (uint32_t i = 0; i < order.size(); ++i) {
        order[i] = i;
    }
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return demands[a] != demands[b] ? demands[a] < demands[b] : a < b; });
    uint32_t left = pool_cells, n = uint32_t(order.size());
    for (const uint32_t i : order) { // the modest first: what they leave is for the others
        shares[i] = std::min(demands[i], left / n--);
        left -= shares[i];
    }
    n = uint32_t(order.size());
    for (const uint32_t i : order) {
        shares[i] += left / n;
        left -= left / n--;
    }
    return shares;
}

} // namespace asrkf
