#include "llama/transfers.h"

#include "llama-context.h"

#include <algorithm>
#include <cstring>

namespace asrkf {

void transfers::synchronize() { ggml_backend_sched_synchronize(lctx->get_sched()); }

void transfers::prepare() {
    if (!lctx || config.no_alloc) {
        return; // nothing has been computed, so nothing is on a device
    }
    synchronize();
    ggml_backend_sched_t sched = lctx->get_sched();
    for (group & g : groups) {
        if (!g.mover->is_attached()) {
            std::vector<ggml_backend_t> backends;
            for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
                backends.push_back(ggml_backend_sched_get_backend(sched, i));
            }
            g.mover->attach(backends);
        }
    }
}

void transfers::reserve_host_room(group & g, const std::vector<uint32_t> & ids) {
    if (ids.empty()) {
        return;
    }
    std::vector<bool> wanted(tokens.records.size(), false);
    size_t n = 0;
    for (const uint32_t id : ids) {
        n += !wanted[id] && g.places[id].slot < 0;
        wanted[id] = true;
    }
    if (n == 0) {
        return;
    }
    try {
        g.store->reserve(n);
    } catch (const error & e) {
        if (e.status != ASRKF_HOST_LIMIT) {
            throw;
        }
        for (uint32_t id = 0; id < tokens.records.size(); ++id) {
            if (!wanted[id] && g.is_active_for_all(id, tokens.records[id].users.count())) {
                g.release_copy(id);
            }
        }
        g.store->reserve(n);
    }
}

void transfers::copy_to_host(group & g, const std::vector<uint32_t> & ids) {
    std::vector<uint32_t> wanted, cells, slots;
    std::vector<bool> taken(tokens.records.size(), false);
    for (const uint32_t id : ids) {
        if (g.places[id].slot < 0 && !taken[id]) {
            taken[id] = true;
            wanted.push_back(id);
            cells.push_back(uint32_t(g.places[id].cell));
        }
    }
    if (wanted.empty()) {
        return;
    }
    g.store->reserve(wanted.size());
    std::vector<uint8_t *> hosts;
    for (size_t i = 0; i < wanted.size(); ++i) {
        slots.push_back(g.store->acquire());
        hosts.push_back(g.store->data(slots.back()));
    }
    try {
        g.mover->get(cells.data(), hosts.data(), cells.size());
    } catch (...) {
        for (const uint32_t slot : slots) {
            g.store->release(slot);
        }
        throw;
    }
    for (size_t i = 0; i < wanted.size(); ++i) {
        g.places[wanted[i]].slot = int32_t(slots[i]);
    }
    counted.moved_to_host_bytes += wanted.size()*g.mover->token_bytes();
    counted.moves_to_host_total++;
}

void transfers::freeze(group & g, uint32_t seq, const std::vector<uint32_t> & chosen) {
    for (const uint32_t t : chosen) {
        g.take_out(tokens.sequences[seq].records[t], seq);
    }
    counted.freezes_total += chosen.size();
}

transfers::fetched transfers::fetch(group & g, const wanted_tokens & wanted) {
    fetched result;
    std::vector<bool> taken(tokens.records.size(), false);
    for (const auto & [seq, chosen] : wanted) {
        const size_t before = result.ids.size();
        for (const uint32_t t : chosen) {
            const uint32_t id = tokens.sequences[seq].records[t];
            if (g.places[id].cell < 0 && !taken[id]) {
                taken[id] = true;
                result.ids.push_back(id);
            }
        }
        const size_t n_new = result.ids.size() - before, n = config.unified ? result.ids.size() : n_new; // those given before are still free
        const std::vector<uint32_t> found = g.cache->free_cells(n, seq);
        if (found.size() < n) {
            throw error(ASRKF_POOL_FULL, format("pool of %u cells has %zu free, %zu tokens are to be restored: freeze others first, or raise kv_pool",
                    config.unified ? g.pool_cells : groups.floor_cells(g), found.size(), n));
        }
        result.cells.insert(result.cells.end(), found.end() - std::ptrdiff_t(n_new), found.end());
    }
    if (!result.ids.empty()) {
        std::vector<const uint8_t *> hosts;
        for (const uint32_t id : result.ids) {
            hosts.push_back(g.store->data(uint32_t(g.places[id].slot)));
        }
        g.mover->set(result.cells.data(), hosts.data(), hosts.size());
        counted.moved_to_device_bytes += hosts.size()*g.mover->token_bytes();
        counted.moves_to_device_total++;
    }
    return result;
}

void transfers::make_active(group & g, const wanted_tokens & wanted, const fetched & got) {
    for (size_t i = 0; i < got.ids.size(); ++i) {
        g.cache->put_in(got.cells[i], tokens.records[got.ids[i]].pos, tokens.records[got.ids[i]].token);
        g.places[got.ids[i]].cell = int32_t(got.cells[i]);
    }
    for (const auto & [seq, chosen] : wanted) {
        for (const uint32_t t : chosen) {
            const uint32_t id = tokens.sequences[seq].records[t];
            g.cache->activate(uint32_t(g.places[id].cell), seq);
            g.drop_needless_copy(id, tokens.records[id].users.count());
        }
    }
}

void transfers::carry_out(group & g, const std::vector<demand> & demands, const std::vector<plan> & plans) {
    std::vector<uint32_t> leaving;
    wanted_tokens back;
    for (size_t i = 0; i < plans.size(); ++i) {
        back.push_back({ demands[i].seq, {} });
        for (const uint32_t t : plans[i].freeze) {
            leaving.push_back(tokens.sequences[demands[i].seq].records[t]);
        }
        for (const restoration & r : plans[i].restore) {
            back.back().second.push_back(r.token);
        }
        std::sort(back.back().second.begin(), back.back().second.end()); // in an empty pool they lie as when they were written
    }
    if (!leaving.empty() || std::any_of(back.begin(), back.end(), [](const auto & b) { return !b.second.empty(); })) {
        prepare();
        copy_to_host(g, leaving);
        for (size_t i = 0; i < plans.size(); ++i) {
            freeze(g, demands[i].seq, plans[i].freeze);
        }
        try {
            make_active(g, back, fetch(g, back));
        } catch (...) { // what was frozen is safe on the host: book it, and leave the rest for the next step
            for (size_t i = 0; i < plans.size(); ++i) {
                plan frozen_only = plans[i];
                frozen_only.restore.clear();
                g.rules[demands[i].seq].commit(frozen_only);
                g.rules[demands[i].seq].recheck();
            }
            throw;
        }
    }
    for (size_t i = 0; i < plans.size(); ++i) {
        count(plans[i]);
        g.rules[demands[i].seq].commit(plans[i]);
    }
}

void transfers::count(const plan & done) {
    for (const restoration & r : done.restore) {
        switch (r.why) {
            case cause::timer:    counted.restores_timer_total++;    break;
            case cause::window:   counted.restores_window_total++;   break;
            case cause::refill:   counted.restores_refill_total++;   break;
            case cause::recall:   counted.restores_recall_total++;   break;
            case cause::recovery: counted.restores_recovery_total++; break;
        }
    }
    counted.decisions_total += done.decided;
}

void transfers::seal(group & g, uint32_t seq, llama_pos pos_end) {
    const sequence & s = tokens.sequences[seq];
    if (!g.mover->is_staged() || config.n_ctx <= g.pool_cells) {
        return;
    }
    const llama_pos window_start = pos_end - llama_pos(g.rules[seq].params.window);
    std::vector<uint32_t> ids;
    uint32_t end = g.n_sealed[seq];
    for (; end + config.block <= s.n_tokens() && tokens.records[s.records[end + config.block - 1]].pos < window_start; end += config.block) {
        for (uint32_t i = end; i < end + config.block; ++i) {
            if (g.places[s.records[i]].slot < 0) {
                ids.push_back(s.records[i]);
            }
        }
    }
    if (!ids.empty()) {
        try {
            prepare();
            copy_to_host(g, ids);
        } catch (const error & e) {
            if (e.status != ASRKF_HOST_LIMIT) {
                throw;
            }
            return; // no room for copies ahead of time: what is frozen is copied then
        }
    }
    g.n_sealed[seq] = end;
}

void transfers::read(const row_part & part, uint32_t id, uint8_t * out) const {
    const place & p = groups[part.group].places[id];
    if (p.slot >= 0) {
        std::memcpy(out, groups[part.group].store->data(uint32_t(p.slot)) + part.offset, part.row_bytes);
    } else {
        ggml_backend_tensor_get(part.tensor, out, size_t(p.cell)*part.row_bytes, part.row_bytes);
    }
}

} // namespace asrkf
