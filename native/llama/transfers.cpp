#include "llama/transfers.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <unordered_set>
#include <utility>

namespace asrkf {

void transfers::synchronize() { ggml_backend_sched_synchronize(lctx->get_sched()); }

std::vector<ggml_backend_t> transfers::backends() const {
    std::vector<ggml_backend_t> found;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(lctx->get_sched()); ++i) {
        found.push_back(ggml_backend_sched_get_backend(lctx->get_sched(), i));
    }
    return found;
}

void transfers::prepare() {
    if (!lctx || config.no_alloc) {
        return; // nothing has been computed, so nothing is on a device
    }
    synchronize();
    groups.mover->settle();
    if (!groups.mover->is_attached()) {
        groups.mover->attach(backends());
        for (const std::string & note : groups.mover->notes()) {
            LLAMA_LOG_WARN("asrkf: %s\n", note.c_str());
        }
    }
    if (budget.is_pageable && !std::exchange(has_said_pageable, true)) {
        LLAMA_LOG_WARN("asrkf: memory for transfers could not be pinned; they are slower from pageable memory\n");
    }
}

static size_t n_without_copy(const group & g, const std::vector<uint32_t> & ids) {
    return size_t(std::count_if(ids.begin(), ids.end(), [&](uint32_t id) { return g.places[id].slot < 0; }));
}

static void make_unique(std::vector<uint32_t> & ids) {
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
}

void transfers::reserve_host_room(const records_by_group & ids) {
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        group & g = groups[ig];
        const size_t n = n_without_copy(g, ids[ig]);
        try {
            g.store->reserve(n);
        } catch (const error & e) {
            if (e.status != ASRKF_HOST_LIMIT) {
                throw;
            }
            std::vector<uint32_t> wanted = ids[ig];
            make_unique(wanted);
            for (uint32_t id = 0; id < tokens.records.size(); ++id) {
                if (g.is_active_for_all(id, tokens.records[id].users.count()) && !std::binary_search(wanted.begin(), wanted.end(), id)) {
                    g.release_copy(id);
                }
            }
            g.store->reserve(n);
        }
    }
}

void transfers::copy_to_host(const records_by_group & ids) {
    std::vector<row_mover::row> rows;
    records_by_group copied(groups.size());
    try {
        for (size_t ig = 0; ig < groups.size(); ++ig) {
            group & g = groups[ig];
            g.store->reserve(n_without_copy(g, ids[ig]));
            for (const uint32_t id : ids[ig]) {
                place & p = g.places[id];
                if (p.slot < 0) {
                    p.slot = int32_t(g.store->acquire());
                    copied[ig].push_back(id);
                    rows.push_back({ ig, uint32_t(p.cell), g.store->address(uint32_t(p.slot)) });
                }
            }
        }
        if (!rows.empty()) {
            groups.mover->get(rows);
        }
    } catch (...) {
        for (size_t ig = 0; ig < groups.size(); ++ig) {
            for (const uint32_t id : copied[ig]) {
                groups[ig].release_copy(id);
            }
        }
        throw;
    }
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        counted.moved_to_host_bytes += copied[ig].size()*groups[ig].token_bytes;
    }
    counted.moves_to_host_total += !rows.empty();
}

void transfers::freeze(group & g, uint32_t seq, const std::vector<uint32_t> & chosen) {
    for (const uint32_t t : chosen) {
        g.take_out(tokens.sequences[seq].records[t], seq);
    }
    counted.freezes_total += chosen.size();
}

transfers::fetched transfers::find_cells(const group & g, const wanted_tokens & wanted) const {
    fetched result;
    std::unordered_set<uint32_t> taken; // by another sequence before
    for (const auto & [seq, chosen] : wanted) {
        const size_t before = result.ids.size();
        for (const uint32_t t : chosen) {
            const uint32_t id = tokens.sequences[seq].records[t];
            if (g.places[id].cell < 0 && (wanted.size() == 1 || taken.insert(id).second)) {
                result.ids.push_back(id);
            }
        }
        const size_t n_new = result.ids.size() - before, n = config.unified ? result.ids.size() : n_new; // those given before are still free
        if (n_new == 0) {
            continue;
        }
        const std::vector<uint32_t> found = g.cache->free_cells(n, seq);
        if (found.size() < n) {
            throw error(ASRKF_POOL_FULL, format("pool of %u cells has %zu free, %zu tokens are to be restored: freeze others first, or raise kv_pool",
                    config.unified ? g.pool_cells : groups.floor_cells(g), found.size(), n));
        }
        result.cells.insert(result.cells.end(), found.end() - std::ptrdiff_t(n_new), found.end());
    }
    return result;
}

std::vector<transfers::fetched> transfers::fetch(const std::vector<wanted_tokens> & wanted) {
    std::vector<fetched> result;
    std::vector<row_mover::row> rows;
    uint64_t n_bytes = 0;
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        const group & g = groups[ig];
        result.push_back(find_cells(g, wanted[ig]));
        for (size_t i = 0; i < result[ig].ids.size(); ++i) {
            const uint32_t slot = uint32_t(g.places[result[ig].ids[i]].slot);
            rows.push_back({ ig, result[ig].cells[i], g.store->address(slot) });
        }
        n_bytes += result[ig].ids.size()*g.token_bytes;
        if (wanted[ig].size() > 1 && !result[ig].ids.empty()) {
            groups.mover->settle(); // what one sequence froze in this decision, another may want back
        }
    }
    if (!rows.empty()) {
        groups.mover->set(rows);
        counted.moved_to_device_bytes += n_bytes;
        counted.moves_to_device_total++;
    }
    return result;
}

void transfers::make_active(const std::vector<wanted_tokens> & wanted, const std::vector<fetched> & got) {
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        group & g = groups[ig];
        for (size_t i = 0; i < got[ig].ids.size(); ++i) {
            const uint32_t id = got[ig].ids[i];
            g.cache->put_in(got[ig].cells[i], tokens.records[id].pos, tokens.records[id].token);
            g.places[id].cell = int32_t(got[ig].cells[i]);
        }
        for (const auto & [seq, chosen] : wanted[ig]) {
            for (const uint32_t t : chosen) {
                const uint32_t id = tokens.sequences[seq].records[t];
                g.cache->activate(uint32_t(g.places[id].cell), seq);
                g.drop_needless_copy(id, tokens.records[id].users.count());
            }
        }
    }
}

//
// a decision
//

records_by_group transfers::leaving(const std::vector<demand> & demands, const plans_by_group & plans) const {
    records_by_group ids(groups.size());
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        for (size_t i = 0; i < demands.size(); ++i) {
            for (const uint32_t t : plans[ig][i].freeze) {
                ids[ig].push_back(tokens.sequences[demands[i].seq].records[t]);
            }
        }
        make_unique(ids[ig]);
    }
    return ids;
}

void transfers::carry_out(const std::vector<demand> & demands, const plans_by_group & plans, records_by_group leaving) {
    const std::vector<seal> sealed = add_sealed(demands, leaving);
    const auto moves = [](const plan & p) { return !p.freeze.empty() || !p.restore.empty(); };
    const auto is_any = [&](const std::vector<plan> & of_group) { return std::any_of(of_group.begin(), of_group.end(), moves); };
    if (!sealed.empty() || std::any_of(plans.begin(), plans.end(), is_any)) {
        prepare();
        copy_to_host(leaving);
        for (const seal & s : sealed) {
            groups[s.group].n_sealed[s.seq] = s.end;
        }
        bring_back(demands, plans);
    }
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        for (size_t i = 0; i < demands.size(); ++i) {
            count(plans[ig][i]);
            groups[ig].rules[demands[i].seq].commit(plans[ig][i]);
        }
    }
}

// What has its copies leaves, and what is wanted takes free cells.
void transfers::bring_back(const std::vector<demand> & demands, const plans_by_group & plans) {
    std::vector<wanted_tokens> back(groups.size());
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        for (size_t i = 0; i < demands.size(); ++i) {
            freeze(groups[ig], demands[i].seq, plans[ig][i].freeze);
            back[ig].push_back({ demands[i].seq, {} });
            std::vector<uint32_t> & chosen = back[ig].back().second;
            for (const restoration & r : plans[ig][i].restore) {
                chosen.push_back(r.token);
            }
            std::sort(chosen.begin(), chosen.end()); // in an empty pool they lie as when they were written
        }
    }
    try {
        make_active(back, fetch(back));
    } catch (...) { // what was frozen is safe on the host: book it, and leave the rest for the next step
        for (size_t ig = 0; ig < groups.size(); ++ig) {
            for (size_t i = 0; i < demands.size(); ++i) {
                plan frozen_only = plans[ig][i];
                frozen_only.restore.clear();
                groups[ig].rules[demands[i].seq].commit(frozen_only);
                groups[ig].rules[demands[i].seq].recheck();
            }
        }
        throw;
    }
}

// The blocks that have left the window go with what is copied anyway. Without room for copies ahead of time, not yet: what is
// frozen is copied then.
std::vector<transfers::seal> transfers::add_sealed(const std::vector<demand> & demands, records_by_group & copied) {
    std::vector<seal> sealed;
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        group & g = groups[ig];
        for (const demand & d : demands) {
            uint32_t end = g.n_sealed[d.seq];
            std::vector<uint32_t> ids = unsealed(g, d.seq, d.pos_end, end);
            if (end == g.n_sealed[d.seq]) {
                continue;
            }
            ids.insert(ids.end(), copied[ig].begin(), copied[ig].end());
            make_unique(ids);
            try {
                g.store->reserve(n_without_copy(g, ids));
            } catch (const error & e) {
                if (e.status != ASRKF_HOST_LIMIT) {
                    throw;
                }
                continue;
            }
            copied[ig] = ids;
            sealed.push_back({ ig, d.seq, end });
        }
    }
    return sealed;
}

// Records of whole blocks that have left the window, as far as they lack a copy; moves end behind the last block.
std::vector<uint32_t> transfers::unsealed(const group & g, uint32_t seq, llama_pos pos_end, uint32_t & end) const {
    const sequence & s = tokens.sequences[seq];
    std::vector<uint32_t> ids;
    if (!g.is_staged || config.n_ctx <= g.pool_cells) {
        return ids;
    }
    const llama_pos window_start = pos_end - llama_pos(g.rules[seq].window());
    for (; end + config.block <= s.n_tokens() && tokens.records[s.records[end + config.block - 1]].pos < window_start; end += config.block) {
        std::copy_if(s.records.begin() + end, s.records.begin() + end + config.block, std::back_inserter(ids), [&](uint32_t id) { return g.places[id].slot < 0; });
    }
    return ids;
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

void transfers::read(const row_part & part, uint32_t id, uint8_t * out) const {
    const place & p = groups[part.group].places[id];
    if (p.slot >= 0) {
        std::memcpy(out, groups[part.group].store->data(uint32_t(p.slot)) + part.offset, part.row_bytes);
    } else {
        ggml_backend_tensor_get(part.tensor, out, size_t(p.cell)*part.row_bytes, part.row_bytes);
    }
}

} // namespace asrkf
