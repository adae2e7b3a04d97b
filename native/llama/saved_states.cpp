#include "llama/saved_states.h"

#include "llama/creation.h"
#include "llama/engine.h"
#include "llama/refusal.h"

#include <algorithm>

namespace asrkf {

namespace {

constexpr llama_pos MAX_POS = 1 << 30; // so that positions can be counted on from
// Upstream's partial states are what a sliding window forgets; here it forgets nothing.
constexpr uint32_t STATE_NOTHING = 0x4e525341;

} // namespace

const std::string & saved_states::model_name() const {
    if (own_name.empty()) {
        own_name = fingerprint(config.model);
    }
    return own_name;
}

void saved_states::check(llama_seq_id seq_id, llama_state_seq_flags flags) const {
    std::string text;
    if (seq_id >= 0 && uint32_t(seq_id) >= config.n_seq_max) {
        text = format("there is no sequence %d: this context has %u (n_seq_max, -np)", seq_id, config.n_seq_max);
    } else if (flags & ~uint32_t(LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY | LLAMA_STATE_SEQ_FLAGS_ON_DEVICE)) {
        text = format("states with flags %u are unknown here", flags);
    } else if (config.no_alloc) {
        text = "a context without memory has no state";
    }
    for (const sequence & s : tokens.sequences) {
        if (text.empty() && (seq_id < 0 || s.id == uint32_t(seq_id))) {
            text = s.fault;
        }
    }
    if (!text.empty()) {
        set_last_error(text, ASRKF_UNSUPPORTED);
        unsupported(text);
    }
}

//
// writing
//

void saved_states::write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    check(seq_id, flags);
    scored.gated.fold_in(); // no later step scores these tokens
    if (config.is_windowed && flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) {
        write_u32(io, STATE_NOTHING);
        return;
    }
    if (state_kind(config.state) == STATE_OWN) {
        write_policies(io, model_name(), policies_of(seq_id));
    }
    const uint32_t n_stream = config.unified ? 1 : config.n_seq_max;
    write_u32(io, n_stream);
    for (uint32_t stream = 0; stream < n_stream; ++stream) {
        const std::vector<uint32_t> ids = records_of(seq_id, stream);
        write_u32(io, uint32_t(ids.size()));
        if (ids.empty()) {
            continue;
        }
        write_users(io, seq_id, ids);
        const std::vector<row_part> parts = groups.row_parts();
        write_u32(io, 0); // V is not transposed
        write_u32(io, uint32_t(parts.size() / 2));
        for (const row_part & part : parts) {
            write_rows(io, part, ids, flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE);
        }
    }
}

std::vector<saved_sequence> saved_states::policies_of(llama_seq_id seq_id) const {
    std::vector<saved_sequence> saved;
    for (const sequence & s : tokens.sequences) {
        if (s.n_tokens() == 0 || (seq_id >= 0 && s.id != uint32_t(seq_id))) {
            continue;
        }
        saved.push_back({ s.id, s.pinned, {} });
        for (const group & g : groups) {
            saved.back().rules.push_back(g.rules[s.id].save());
        }
    }
    return saved;
}

// Each once, however many sequences have it.
std::vector<uint32_t> saved_states::records_of(llama_seq_id seq_id, uint32_t stream) const {
    std::vector<uint32_t> ids;
    std::vector<bool> taken(tokens.records.size(), false);
    for (const sequence & s : tokens.sequences) {
        if ((seq_id >= 0 && s.id != uint32_t(seq_id)) || (!config.unified && s.id != stream)) {
            continue;
        }
        for (const uint32_t id : s.records) {
            if (!taken[id]) {
                taken[id] = true;
                ids.push_back(id);
            }
        }
    }
    return ids;
}

void saved_states::write_users(llama_io_write_i & io, llama_seq_id seq_id, const std::vector<uint32_t> & ids) const {
    for (const uint32_t id : ids) {
        const record & r = tokens.records[id];
        io.write(&r.pos, sizeof(llama_pos));
        write_u32(io, seq_id < 0 ? uint32_t(r.users.count()) : 1);
        for (uint32_t seq = 0; seq < config.n_seq_max; ++seq) {
            if (r.users.test(seq) && (seq_id < 0 || seq == uint32_t(seq_id))) {
                write_u32(io, seq);
            }
        }
    }
}

// through_host: upstream's reader of states that stay on the device takes no tensors of ours, since frozen rows are on the host.
void saved_states::write_rows(llama_io_write_i & io, const row_part & part, const std::vector<uint32_t> & ids, bool through_host) const {
    const group & g = groups[part.group];
    const int32_t  type = int32_t(part.tensor->type);
    const uint64_t row_bytes = part.row_bytes;
    std::vector<uint8_t> copied;
    io.write(&type, sizeof(type));
    io.write(&row_bytes, sizeof(row_bytes));
    for (size_t i = 0; i < ids.size(); ) {
        const place & p = g.places[ids[i]];
        if (p.cell < 0) {
            io.write(g.store->data(uint32_t(p.slot)) + part.offset, row_bytes);
            i++;
            continue;
        }
        size_t run = 1; // cells beside each other go together
        while (i + run < ids.size() && g.places[ids[i + run]].cell == p.cell + int32_t(run)) {
            run++;
        }
        if (through_host) {
            copied.resize(run*row_bytes);
            ggml_backend_tensor_get(part.tensor, copied.data(), size_t(p.cell)*row_bytes, copied.size());
            io.write(copied.data(), copied.size());
        } else {
            io.write_tensor(part.tensor, size_t(p.cell)*row_bytes, run*row_bytes);
        }
        i += run;
    }
}

//
// reading
//

// Everything is read to the host first; only then is what was there given up.
void saved_states::read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    slots_by_group slots(groups.size()); // of each token as it comes
    try {
        check(seq_id, flags);
        uint32_t n_stream = read_u32(io);
        if (config.is_windowed && flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY && n_stream == STATE_NOTHING) {
            return;
        }
        std::vector<saved_sequence> saved;
        if (n_stream == STATE_MARK) {
            saved    = read_policies(io, model_name(), (uint64_t(1) << 20) + uint64_t(config.n_ctx)*config.n_seq_max*64*1024);
            n_stream = read_u32(io);
        }
        if (n_stream == 0 || n_stream > LLAMA_MAX_SEQ) {
            unfit(format("it claims %u streams", n_stream));
        }
        std::vector<arrival> arrivals;
        for (uint32_t stream = 0; stream < n_stream; ++stream) {
            read_stream(io, seq_id, arrivals, slots);
        }
        std::stable_sort(arrivals.begin(), arrivals.end(), [](const arrival & a, const arrival & b) { return a.pos < b.pos; }); // they come in the order of cells
        check_fit(seq_id, arrivals, saved);
        replace(seq_id, arrivals, saved, slots);
    } catch (const std::exception & e) {
        for (size_t ig = 0; ig < slots.size(); ++ig) {
            for (const uint32_t slot : slots[ig]) {
                groups[ig].store->release(slot);
            }
        }
        refuse(e);
        throw;
    }
}

void saved_states::read_stream(llama_io_read_i & io, llama_seq_id seq_id, std::vector<arrival> & arrivals, slots_by_group & slots) const {
    const uint32_t n = read_u32(io), before = uint32_t(arrivals.size());
    uint32_t n_kept = 0; // records of other sequences
    for (const record & r : tokens.records) {
        n_kept += seq_id >= 0 && r.users.count() > size_t(r.users.test(size_t(seq_id)));
    }
    if (n > config.n_ctx || n_kept + before + n > config.n_ctx) {
        const std::string others = n_kept ? format("other sequences %u, and ", n_kept) : "";
        throw error(ASRKF_POOL_FULL, format("the state has %u tokens, %sn_ctx is %u: raise n_ctx", before + n, others.c_str(), config.n_ctx));
    }
    if (n == 0) {
        return;
    }
    for (uint32_t i = 0; i < n; ++i) {
        arrivals.push_back(read_token(io, seq_id, before + i));
    }
    if (read_u32(io) != 0) {
        unfit("its V is transposed (flash attention was off)");
    }
    const size_t n_layers = groups.row_parts().size() / 2;
    if (const uint32_t n_saved = read_u32(io); n_saved != n_layers) {
        unfit(format("it has %u layers, not %zu", n_saved, n_layers));
    }
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        groups[ig].store->reserve(n);
        for (uint32_t i = 0; i < n; ++i) {
            slots[ig].push_back(groups[ig].store->acquire());
        }
    }
    read_rows(io, before, n, slots);
}

saved_states::arrival saved_states::read_token(llama_io_read_i & io, llama_seq_id seq_id, uint32_t at) const {
    arrival a = { 0, at, {} };
    io.read(&a.pos, sizeof(a.pos));
    const uint32_t n_users = read_u32(io);
    if (a.pos > MAX_POS) {
        unfit(format("a token has position %d", a.pos));
    }
    if (a.pos < 0 || n_users == 0 || n_users > (seq_id < 0 && config.unified ? config.n_seq_max : 1)) {
        unfit(a.pos < 0 ? "a token has no position" : format("a token belongs to %u sequences", n_users));
    }
    for (uint32_t j = 0; j < n_users; ++j) {
        a.users.push_back(read_u32(io));
        if (seq_id >= 0) {
            a.users.back() = uint32_t(seq_id);
        } else if (a.users.back() >= config.n_seq_max || std::count(a.users.begin(), a.users.end(), a.users.back()) > 1) {
            unfit(format("a token belongs to sequence %u, and this context has %u", a.users.back(), config.n_seq_max));
        }
    }
    return a;
}

// Tokens [first, first + n) of those that come, into their slots.
void saved_states::read_rows(llama_io_read_i & io, uint32_t first, uint32_t n, const slots_by_group & slots) const {
    for (const row_part & part : groups.row_parts()) {
        int32_t  type;
        uint64_t row_bytes;
        io.read(&type, sizeof(type));
        io.read(&row_bytes, sizeof(row_bytes));
        if (type != int32_t(part.tensor->type) || row_bytes != part.row_bytes) {
            unfit("its cache type or row size is another one");
        }
        for (uint32_t i = first; i < first + n; ++i) {
            io.read(groups[part.group].store->data(slots[part.group][i]) + part.offset, row_bytes);
        }
    }
}

void saved_states::check_fit(llama_seq_id seq_id, const std::vector<arrival> & arrivals, std::vector<saved_sequence> & saved) const {
    std::vector<uint32_t> n_of(config.n_seq_max, 0);
    for (const arrival & a : arrivals) {
        for (const uint32_t seq : a.users) {
            if (++n_of[seq] > config.n_ctx_seq) {
                throw error(ASRKF_POOL_FULL, format("the state has more than %u tokens of sequence %u: raise n_ctx", config.n_ctx_seq, seq));
            }
        }
    }
    for (saved_sequence & s : saved) {
        s.id = seq_id >= 0 ? uint32_t(seq_id) : s.id;
        const auto fits = [&](const std::vector<uint8_t> & rule) { return policy::fits(rule, n_of[s.id]); };
        if (s.id >= config.n_seq_max || !std::all_of(s.rules.begin(), s.rules.end(), fits)) {
            unfit("its scores and timers are not those of its tokens");
        }
    }
}

// Nothing fails here once there is memory for the books.
void saved_states::replace(llama_seq_id seq_id, const std::vector<arrival> & arrivals, const std::vector<saved_sequence> & saved, slots_by_group & slots) {
    tokens.reserve_records(arrivals.size());
    for (const sequence & s : tokens.sequences) {
        tokens.reserve_tokens(s, size_t(std::count_if(arrivals.begin(), arrivals.end(), [&](const arrival & a) { return std::count(a.users.begin(), a.users.end(), s.id) > 0; })));
    }
    for (sequence & s : tokens.sequences) {
        if (seq_id >= 0 && s.id != uint32_t(seq_id)) {
            continue;
        }
        sequences.forget_all(s, /*keep_store*/ true);
        s.why.clear();
        s.trigger.clear();
    }
    for (const saved_sequence & s : saved) {
        take_pins(s);
    }
    std::vector<uint32_t> ids;
    ids.reserve(arrivals.size());
    for (const arrival & a : arrivals) {
        ids.push_back(tokens.new_record(a.pos, LLAMA_TOKEN_NULL, a.users)); // a state does not say which token
        for (size_t ig = 0; ig < groups.size(); ++ig) {
            groups[ig].places[ids.back()].slot = int32_t(slots[ig][a.at]);
            for (const uint32_t seq : a.users) { // in order of position: it is the last
                groups[ig].rules[seq].set_frozen(tokens.sequences[seq].n_tokens() - 1, true, false);
                groups[ig].rules[seq].recheck(); // the next step brings back what the pool holds
            }
        }
    }
    slots.clear();
    for (const saved_sequence & s : saved) {
        if (!s.rules.empty()) {
            groups.ranks_of(s.id).load(s.rules[0]); // all groups have the same scores
        }
        for (size_t ig = 0; ig < groups.size() && !s.rules.empty(); ++ig) { // of other groups: one ranking serves them all
            groups[ig].rules[s.id].load(s.rules[std::min(ig, s.rules.size() - 1)]);
        }
    }
    scored.index_records(ids);
}

void saved_states::take_pins(const saved_sequence & s) {
    try {
        groups.check_pools(count_positions(s.pinned));
        tokens.sequences[s.id].pinned = s.pinned;
    } catch (const error &) {} // this pool is too small for its pins: it keeps its own
}

} // namespace asrkf
