#include "llama/groups.h"

#include "policy/budgets.h"

namespace asrkf {

void group::release_copy(uint32_t id) {
    place & p = places[id];
    if (p.slot >= 0) {
        store->release(uint32_t(p.slot));
        p.slot = -1;
    }
}

void group::drop_needless_copy(uint32_t id, size_t n_users) {
    if (!is_staged && places[id].slot >= 0 && is_active_for_all(id, n_users)) {
        release_copy(id);
    }
}

void group::take_out(uint32_t id, uint32_t seq) {
    place & p = places[id];
    if (p.cell >= 0 && cache->is_active(uint32_t(p.cell), seq) && cache->take_out(uint32_t(p.cell), seq)) {
        p.cell = -1;
    }
}

const group & layer_groups::named(uint32_t ig) const {
    if (ig >= all.size()) {
        throw error(ASRKF_INVALID_ARGUMENT, format("group %u: there are %zu", ig, all.size()));
    }
    return all[ig];
}

void layer_groups::check_pools(uint32_t n_pinned) const {
    for (const group & g : all) {
        if (!g.keeps_window) {
            check_pool(g, n_pinned);
        }
    }
}

void layer_groups::check_pool(const group & g, uint32_t n_pinned) const {
    const uint32_t cells = floor_cells(g);
    if ((config.unified ? g.pool_cells : cells) >= (config.unified ? config.n_ctx : config.n_ctx_seq)) {
        return; // it holds whatever there may be
    }
    const policy_params p = make_policy_params(config, cells);
    const uint64_t least = policy::least_cells(p, config.n_ubatch, n_pinned);
    if (least <= cells) {
        return;
    }
    const uint64_t unit  = config.unified ? POOL_PAD_CELLS : config.n_seq_max*POOL_PAD_CELLS;
    const std::string whose = config.n_seq_max == 1 ? "" : format(", of which each of %u sequences must get %u,", config.n_seq_max, cells);
    // kv_pool is the mean of the groups: raising it may leave the smallest as it is
    const std::string raise = all.size() == 1 ? "raise kv_pool to at least" : format("these are %zu of the layers; use layers=shared with a kv_pool of at least", g.layers.size());
    throw error(ASRKF_POOL_FULL, format("pool of %u cells%s cannot hold sinks %u + window %u + pinned %u + batch %u + two blocks of %u: %s %llu or lower %s",
            g.pool_cells, whose.c_str(), p.sinks, policy::window_beside(p, n_pinned), n_pinned, std::min(config.n_ubatch, p.block), p.block, raise.c_str(),
            (unsigned long long) ((config.n_seq_max*least + unit - 1) / unit * unit),
            config.n_seq_max > 1 ? "the number of sequences (-np)" : config.window ? "window" : "the pinned ranges"));
}

// Demands go in units, so that shares change now and then, not with every token.
void layer_groups::share(const std::vector<uint32_t> & n_tokens, uint32_t n_records) {
    if (!config.unified) {
        return; // each has its own cells
    }
    std::vector<uint32_t> live, demands;
    for (uint32_t seq = 0; seq < n_tokens.size(); ++seq) {
        if (n_tokens[seq] > 0) {
            live.push_back(seq);
            demands.push_back((n_tokens[seq] + config.interval + POOL_PAD_CELLS - 1) / POOL_PAD_CELLS * POOL_PAD_CELLS);
        }
    }
    for (group & g : all) {
        // records that are shared count once: where all fits, nobody has to give anything up
        const bool fits = n_records <= g.pool_cells;
        const std::vector<uint32_t> shares = fits ? std::vector<uint32_t>(live.size(), g.pool_cells) : fair_shares(g.pool_cells, demands);
        for (size_t i = 0; i < live.size(); ++i) {
            g.rules[live[i]].resize(shares[i]);
        }
    }
}

std::vector<row_part> layer_groups::row_parts() const {
    std::vector<row_part> k, v;
    for (uint32_t il = 0; il < by_layer.size(); ++il) {
        const group & g = all[by_layer[il]];
        size_t offset = 0;
        for (ggml_tensor * tensor : g.cache->row_tensors()) {
            const size_t row_bytes = ggml_row_size(tensor->type, tensor->ne[0]);
            if (tensor == g.cache->k_of(il)) {
                k.push_back({ by_layer[il], tensor, row_bytes, offset });
            } else if (tensor == g.cache->v_of(il)) {
                v.push_back({ by_layer[il], tensor, row_bytes, offset });
            }
            offset += row_bytes;
        }
    }
    k.insert(k.end(), v.begin(), v.end());
    return k;
}

} // namespace asrkf
