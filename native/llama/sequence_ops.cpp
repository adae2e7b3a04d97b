#include "llama/sequence_ops.h"

#include "store/host_memory.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace asrkf {

void sequence_ops::forget(sequence & s, uint32_t begin, uint32_t end, bool keep_store) {
    const uint32_t seq = s.id;
    scored.fold_in(); // they belong to rows that may change hands
    s.output = 0;
    s.rings.forget_from(tokens.records[s.records[begin]].pos); // queries of what goes, or of what would have seen it
    s.newest.forget_from(tokens.records[s.records[begin]].pos);
    for (uint32_t i = begin; i < end; ++i) {
        const uint32_t id = s.records[i];
        tokens.records[id].users.reset(seq);
        for (group & g : groups) {
            g.take_out(id, seq);
        }
        if (tokens.records[id].users.none()) {
            tokens.release(id);
        } else {
            for (group & g : groups) {
                g.drop_needless_copy(id, tokens.records[id].users.count());
            }
        }
    }
    s.records.erase(s.records.begin() + begin, s.records.begin() + end);
    s.seen.clear();
    groups.ranks_of(seq).erase(begin, end);
    if (s.records.empty()) {
        groups.ranks_of(seq).clear();
    }
    bool frees = false;
    for (group & g : groups) {
        g.rules[seq].erase(begin, end);
        g.unseal(seq, begin, config.block);
        if (s.records.empty()) { // timers of a sequence that is gone, and host memory when all are
            s.why.clear();
            s.look.clear();
            s.cuts.clear();
            s.fault.clear();
            g.rules[seq].clear();
            if (g.store && !keep_store && tokens.n_records() == 0) {
                frees |= g.store->clear();
            }
        }
    }
    if (frees) {
        give_back_freed_ram();
    }
}

void sequence_ops::undo_step() {
    const std::vector<uint32_t> failed = std::move(tokens.in_flight);
    tokens.in_flight.clear();
    for (auto id = failed.rbegin(); id != failed.rend(); ++id) {
        for (sequence & s : tokens.sequences) {
            if (!tokens.records[*id].users.test(s.id)) {
                continue;
            }
            const uint32_t i = uint32_t(std::find(s.records.rbegin(), s.records.rend(), *id).base() - s.records.begin()) - 1;
            forget(s, i, i + 1);
        }
    }
}

void sequence_ops::remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;
    for (sequence & s : tokens.sequences) {
        if (seq_id >= 0 && s.id != uint32_t(seq_id)) {
            continue;
        }
        if (p0 == 0 && s.n_tokens() == 0) {
            s.fault.clear();
        }
        if (p0 > tokens.pos_max(s)) { // llama-cpp-python asks before every token
            continue;
        }
        if (tokens.rewalk_begin >= 0 && p0 == tokens.rewalk_begin) {
            // llama_decode() takes a step that failed back by its positions; those of earlier calls were only computed again
            p0 = std::max(p0, s.call_begin);
            tokens.rewalk_begin = -1;
        }
        const uint32_t begin = tokens.lower_bound(s, p0), end = tokens.lower_bound(s, p1);
        if (begin < end) {
            forget(s, begin, end);
        }
    }
}

void sequence_ops::keep(llama_seq_id seq_id) {
    for (sequence & s : tokens.sequences) {
        if (s.id != uint32_t(seq_id)) {
            forget_all(s);
        }
    }
}

void sequence_ops::copy(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    sequence & from = tokens.named(src);
    sequence & to   = tokens.named(dst);
    scored.gated.fold_in(); // a copy has them from its token, or never
    const uint32_t begin = tokens.lower_bound(from, std::max(p0, 0)), end = p1 < 0 ? from.n_tokens() : tokens.lower_bound(from, p1);
    std::vector<uint32_t> ids(from.records.begin() + begin, from.records.begin() + std::max(begin, end));
    if (!config.unified) {
        forget_all(to);
        ids = clone(ids);
    }
    tokens.reserve_tokens(to, ids.size());
    for (uint32_t i = 0; i < ids.size(); ++i) {
        if (config.unified && tokens.records[ids[i]].users.test(size_t(dst))) {
            continue;
        }
        const uint32_t at = tokens.insert(to, ids[i]);
        groups.ranks_of(to.id).copy_token(at, groups.ranks_of(from.id), begin + i);
        for (group & g : groups) {
            g.rules[size_t(dst)].copy_token(at, g.rules[size_t(src)], begin + i, !config.unified);
            if (config.unified && !g.rules[size_t(dst)].is_frozen(at)) {
                g.cache->activate(uint32_t(g.places[ids[i]].cell), uint32_t(dst));
            }
        }
    }
    if (!config.unified) {
        scored.index_records(ids);
    }
}

void sequence_ops::clear(bool data) {
    tokens.in_flight.clear();
    scored.drop_pending();
    for (sequence & s : tokens.sequences) {
        forget_all(s);
        s.rings.forget_from(0);
        s.newest.forget_from(0);
        s.trigger.clear();
        s.look.clear();
        s.cuts.clear();
        s.output = 0;
        s.why.clear();
        s.fault.clear();
        groups.ranks_of(s.id).clear();
    }
    for (group & g : groups) {
        g.cache->clear(data);
        for (policy & rule : g.rules) {
            rule.clear();
        }
    }
}

std::vector<uint32_t> sequence_ops::clone(const std::vector<uint32_t> & ids) {
    if (ids.empty()) {
        return {};
    }
    if (tokens.n_records() + ids.size() > config.n_ctx) {
        throw error(ASRKF_POOL_FULL, format("context is full: %u tokens and copies of %zu do not fit into n_ctx %u", tokens.n_records(), ids.size(), config.n_ctx));
    }
    moves.prepare();
    for (group & g : groups) { // room for all, then copies of those that are on the device only
        size_t n = ids.size();
        for (const uint32_t id : ids) {
            n += g.places[id].slot < 0;
        }
        g.store->reserve(n);
    }
    moves.copy_to_host(records_by_group(groups.size(), ids));
    std::vector<uint32_t> copies;
    copies.reserve(ids.size());
    tokens.reserve_records(ids.size());
    for (const uint32_t id : ids) {
        copies.push_back(tokens.new_copy(id, copies.empty() ? -1 : int64_t(copies.back())));
        for (group & g : groups) {
            const uint32_t slot = g.store->acquire();
            std::memcpy(g.store->data(slot), g.store->data(uint32_t(g.places[id].slot)), g.token_bytes);
            g.places[copies.back()].slot = int32_t(slot);
        }
    }
    for (group & g : groups) {
        for (const uint32_t id : ids) {
            g.drop_needless_copy(id, tokens.records[id].users.count());
        }
    }
    return copies;
}

} // namespace asrkf
