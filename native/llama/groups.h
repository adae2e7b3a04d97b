// Layer groups: layers that share one set of active tokens, with their cells, pool, policies and host store; and how one
// pool is shared by several sequences. Knows no record but by its number.
#pragma once

#include "llama/group_cache.h"
#include "llama/settings.h"
#include "policy/policy.h"
#include "store/host_store.h"
#include "store/row_mover.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace asrkf {

// Where a record is in one group. On the device: cell >= 0. With a host copy: slot >= 0. Never neither.
struct place {
    int32_t cell = -1;
    int32_t slot = -1;
};

struct group {
    std::vector<uint32_t>        layers;
    uint32_t                     pool_cells   = 0;     // all sequences together
    bool                         keeps_window = false; // its layers have a sliding window, which it keeps whatever the policy
    std::unique_ptr<group_cache> cache;
    std::vector<policy>          rules;                // by sequence
    std::unique_ptr<host_store>  store;                // null in a context without memory (no_alloc)
    size_t                       token_bytes  = 0;     // 0 there
    bool                         is_staged    = false; // its rows cross to another memory
    std::vector<place>           places;               // by record
    std::vector<uint32_t>        n_sealed;             // by sequence: tokens in sealed blocks (staged moves only)

    // Host memory on both sides: a copy of what every one of n_users sequences has active would only cost RAM.
    void drop_needless_copy(uint32_t id, size_t n_users);
    bool is_active_for_all(uint32_t id, size_t n_users) const {
        return places[id].cell >= 0 && cache->n_active(uint32_t(places[id].cell)) == n_users;
    }
    void release_copy(uint32_t id);
    // Out of the sequence's attention, wherever it is.
    void take_out(uint32_t id, uint32_t seq);
    void unseal(uint32_t seq, uint32_t token, uint32_t block) { n_sealed[seq] = std::min(n_sealed[seq], token / block * block); }
};

// The rows of one layer's K or V.
struct row_part {
    size_t        group;
    ggml_tensor * tensor;
    size_t        row_bytes;
    size_t        offset; // within a token's bytes
};

class layer_groups {
public:
    layer_groups(const settings & config, std::vector<group> made, std::vector<uint32_t> of_layer)
        : config(config), all(std::move(made)), by_layer(std::move(of_layer)), rankings(config.n_seq_max, ranking(config.ema, config.interval)) {
        for (group & g : all) {
            for (size_t seq = 0; seq < g.rules.size(); ++seq) {
                g.rules[seq].follow(rankings[seq]);
            }
        }
    }

    size_t size() const { return all.size(); }
    auto begin()        { return all.begin(); }
    auto end()          { return all.end(); }
    auto begin()  const { return all.begin(); }
    auto end()    const { return all.end(); }
    group &       operator[](size_t ig)       { return all[ig]; }
    const group & operator[](size_t ig) const { return all[ig]; }
    const group & first() const { return all[0]; }
    uint32_t      of_layer(uint32_t il) const { return by_layer[il]; }
    ranking &     ranks_of(uint32_t seq) { return rankings[seq]; } // what the policies of one sequence know alike
    const group & named(uint32_t ig) const; // throws error(ASRKF_INVALID_ARGUMENT)

    // A sequence's share of the pool when all are there.
    uint32_t floor_cells(const group & g) const { return g.pool_cells / config.n_seq_max; }
    // A sequence must be able to live on its floor, with so many tokens pinned. Throws error(ASRKF_POOL_FULL).
    void check_pools(uint32_t n_pinned) const;
    // What each live sequence may have of each pool, given the tokens that each (by number), and all of them (shared ones
    // once), will have after a batch.
    void share(const std::vector<uint32_t> & n_tokens, uint32_t n_records);

    // A figure of the groups as the mean over the layers that the policy serves, rounded up: bytes, as if all had the same cells.
    template <typename Cells> uint32_t mean_cells(Cells cells) const {
        uint64_t sum = 0, n = 0;
        for (const group & g : all) {
            if (!g.keeps_window) {
                sum += uint64_t(cells(g))*g.layers.size();
                n   += g.layers.size();
            }
        }
        return uint32_t((sum + n - 1) / n);
    }

    // K of all layers, then V of all layers: upstream's order, over all groups.
    std::vector<row_part> row_parts() const;

private:
    void check_pool(const group & g, uint32_t n_pinned) const;

    const settings &      config;
    std::vector<group>    all;
    std::vector<uint32_t> by_layer;
    std::vector<ranking>  rankings; // by sequence

public:
    std::unique_ptr<row_mover> mover; // of all groups, whose stores it fills: the last member; null in a context without memory (no_alloc)
};

} // namespace asrkf
