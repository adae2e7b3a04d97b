#include "llama/shifts.h"

#include "llama/refusal.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace asrkf {

void shifts::move(sequence & s, llama_pos p0, llama_pos p1, const std::function<llama_pos(llama_pos)> & moved) {
    for (const group & g : groups) {
        if (const std::string reason = g.cache->why_no_shift(); !reason.empty()) {
            unsupported(reason);
        }
    }
    const uint32_t begin = tokens.lower_bound(s, std::max(p0, 0));
    uint32_t end = p1 < 0 ? s.n_tokens() : tokens.lower_bound(s, p1);
    uint32_t n_gone = 0;
    while (begin + n_gone < end && moved(tokens.records[s.records[begin + n_gone]].pos) < 0) {
        n_gone++;
    }
    if (n_gone > 0) {
        sequences.forget(s, begin, begin + n_gone);
        end -= n_gone;
    }
    if (begin >= end) {
        return;
    }
    scored.fold_in();
    moves.prepare();
    own_shared(s, begin, end);
    const std::vector<uint32_t> ids(s.records.begin() + begin, s.records.begin() + end);
    std::vector<int32_t> by;
    for (const uint32_t id : ids) {
        by.push_back(moved(tokens.records[id].pos) - tokens.records[id].pos);
    }
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        rotate(ig, ids, by);
    }
    book(s, begin, ids, by);
    s.rings.forget_from(0);
    s.why.forget_reset();
    moves.prepare(); // the index is made of rows that may still be on their way, and CUDA reads them on another stream
    scored.index_records(ids);
}

// Records of tokens [begin, end) that others have, too, become copies of the sequence's own, frozen until a step wants them.
void shifts::own_shared(sequence & s, uint32_t begin, uint32_t end) {
    std::vector<uint32_t> shared, at;
    for (uint32_t i = begin; i < end; ++i) {
        if (tokens.records[s.records[i]].users.count() > 1) {
            shared.push_back(s.records[i]);
            at.push_back(i);
        }
    }
    const std::vector<uint32_t> own = shared.empty() ? shared : sequences.clone(shared);
    s.seen.clear();
    for (size_t n = 0; n < shared.size(); ++n) {
        tokens.records[shared[n]].users.reset(s.id);
        tokens.records[own[n]].users.set(s.id);
        s.records[at[n]] = own[n];
        for (group & g : groups) {
            g.take_out(shared[n], s.id);
            g.drop_needless_copy(shared[n], tokens.records[shared[n]].users.count());
            g.rules[s.id].set_frozen_copy(at[n]);
        }
    }
}

void shifts::book(sequence & s, uint32_t begin, const std::vector<uint32_t> & ids, const std::vector<int32_t> & by) {
    for (size_t n = 0; n < ids.size(); ++n) {
        tokens.records[ids[n]].pos += by[n];
        groups.ranks_of(s.id).move_to(begin + uint32_t(n), tokens.records[ids[n]].pos);
        for (group & g : groups) {
            if (g.places[ids[n]].cell >= 0) {
                g.cache->move_to(uint32_t(g.places[ids[n]].cell), tokens.records[ids[n]].pos);
            }
        }
    }
    reorder(s);
    s.newest.forget_from(0); // queries are of other positions
    for (uint32_t i = 0; i < s.n_tokens(); ++i) {
        groups.ranks_of(s.id).set_pinned(i, contains(s.pinned, tokens.records[s.records[i]].pos)); // pins are of positions
    }
    for (group & g : groups) {
        g.unseal(s.id, begin, config.block);
        g.rules[s.id].recheck();
    }
}

// Where tokens have moved across others.
void shifts::reorder(sequence & s) {
    std::vector<uint32_t> order(s.n_tokens());
    std::iota(order.begin(), order.end(), 0);
    const auto earlier = [&](uint32_t a, uint32_t b) { return tokens.records[s.records[a]].pos < tokens.records[s.records[b]].pos; };
    if (std::is_sorted(order.begin(), order.end(), earlier)) {
        return;
    }
    std::stable_sort(order.begin(), order.end(), earlier);
    std::vector<uint32_t> sorted;
    for (const uint32_t i : order) {
        sorted.push_back(s.records[i]);
    }
    s.records = sorted;
    s.seen.clear();
    groups.ranks_of(s.id).reorder(order);
    for (group & g : groups) {
        g.rules[s.id].reorder(order);
    }
}

// K of these records by so many positions, in batches through host memory.
void shifts::rotate(size_t ig, const std::vector<uint32_t> & ids, const std::vector<int32_t> & by) {
    constexpr size_t BATCH = 256;
    ggml_backend_ptr cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu.get()));
    if (auto set_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"))) {
        set_threads(cpu.get(), config.cparams.n_threads);
    }
    for (size_t from = 0; from < ids.size(); from += BATCH) {
        const auto begin = std::ptrdiff_t(from), end = std::ptrdiff_t(std::min(ids.size(), from + BATCH));
        rotate_batch(ig, cpu.get(), { ids.begin() + begin, ids.begin() + end }, { by.begin() + begin, by.begin() + end });
    }
}

void shifts::rotate_batch(size_t ig, ggml_backend_t cpu, const std::vector<uint32_t> & ids, const std::vector<int32_t> & by) {
    group & g = groups[ig];
    std::vector<uint8_t>        bytes(ids.size()*g.token_bytes);
    std::vector<uint8_t *>      hosts(ids.size());
    std::vector<row_mover::row> to_read, to_write;
    for (size_t i = 0; i < ids.size(); ++i) {
        const place & p = g.places[ids[i]];
        hosts[i] = p.slot >= 0 ? g.store->data(uint32_t(p.slot)) : bytes.data() + i*g.token_bytes;
        if (p.slot < 0) {
            to_read.push_back({ ig, uint32_t(p.cell), hosts[i] });
        }
        if (p.cell >= 0) {
            to_write.push_back({ ig, uint32_t(p.cell), hosts[i] });
        }
    }
    if (!to_read.empty()) {
        groups.mover->get(to_read);
        groups.mover->settle();
    }
    rotate_keys(g, cpu, hosts, by);
    if (!to_write.empty()) {
        groups.mover->set(to_write);
    }
}

// hosts: tokens' bytes, rotated where they lie, layer by layer.
void shifts::rotate_keys(group & g, ggml_backend_t cpu, const std::vector<uint8_t *> & hosts, const std::vector<int32_t> & by) {
    std::vector<uint8_t> keys;
    for (const row_part & part : groups.row_parts()) {
        const auto il = std::find_if(g.layers.begin(), g.layers.end(), [&](uint32_t l) { return g.cache->k_of(l) == part.tensor; });
        if (&groups[part.group] != &g || il == g.layers.end()) {
            continue; // another group's, or V
        }
        keys.resize(hosts.size()*part.row_bytes);
        for (size_t i = 0; i < hosts.size(); ++i) {
            std::memcpy(keys.data() + i*part.row_bytes, hosts[i] + part.offset, part.row_bytes);
        }
        g.cache->rotate(cpu, *il, keys, by);
        for (size_t i = 0; i < hosts.size(); ++i) {
            std::memcpy(hosts[i] + part.offset, keys.data() + i*part.row_bytes, part.row_bytes);
        }
    }
}

} // namespace asrkf
