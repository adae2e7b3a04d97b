#include "llama/steps.h"

#include "llama/refusal.h"
#include "llama/rewalk.h"

#include "llama-context.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace asrkf {

//
// a batch
//

steps::split_batch steps::split(llama_batch_allocr & balloc, uint32_t n_ubatch_max) {
    if (!fault.empty()) {
        unsupported(fault);
    }
    const llama_batch & batch = balloc.get_batch();
    const std::vector<uint32_t> n_new = new_tokens_of(batch);
    check_room(n_new, balloc.get_n_tokens());
    check_host_limit(balloc.get_n_tokens());
    read_entropy();
    std::vector<uint32_t> n_after = n_new;
    for (const sequence & s : tokens.sequences) {
        n_after[s.id] += s.n_tokens();
    }
    groups.share(n_after, tokens.n_records() + balloc.get_n_tokens());

    const uint32_t n_step = longest_step(n_new, n_ubatch_max);
    balloc.split_reset();
    split_batch result;
    const auto next = [&] { return config.unified ? balloc.split_simple(n_step) : balloc.split_equal(n_step, true, 0); };
    for (llama_ubatch ubatch = next(); ubatch.n_tokens > 0; ubatch = next()) {
        result.ubatches.push_back(std::move(ubatch));
    }
    if (result.ubatches.empty() || balloc.get_n_used() < balloc.get_n_tokens()) {
        throw error(ASRKF_INVALID_ARGUMENT, "the batch could not be split: tokens that belong to several sequences need one pool for all (kv_unified, -kvu)");
    }
    note_outputs(batch, int32_t(balloc.get_n_outputs()));
    cuts.note(batch, prompt_follows);
    result.has_output = balloc.get_n_outputs() > 0 && !prompt_follows; // in the middle of a prompt there is one only by habit
    if (!prompt_follows) {
        if (std::optional<llama_ubatch> again = rewalk_of(result.ubatches, config, groups, tokens)) { // the outputs are those of the second time
            result.ubatches.back().output[result.ubatches.back().n_tokens - 1] = 0;
            result.ubatches.push_back(std::move(*again));
            result.rewalks = true;
        }
    }
    return result;
}

// By sequence. Throws a sequence's fault, if it has one.
std::vector<uint32_t> steps::new_tokens_of(const llama_batch & batch) const {
    std::vector<uint32_t> n_new(config.n_seq_max, 0);
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t j = 0; j < batch.n_seq_id[i]; ++j) {
            if (const std::string & why = tokens.named(batch.seq_id[i][j]).fault; !why.empty()) {
                unsupported(why);
            }
            n_new[size_t(batch.seq_id[i][j])]++;
        }
    }
    return n_new;
}

void steps::check_room(const std::vector<uint32_t> & n_new, uint32_t n_batch) const {
    if (tokens.n_records() + n_batch > config.n_ctx) {
        throw error(ASRKF_POOL_FULL, format("context is full: %u tokens and %u new ones do not fit into n_ctx %u", tokens.n_records(), n_batch, config.n_ctx));
    }
    for (const sequence & s : tokens.sequences) {
        if (s.n_tokens() + n_new[s.id] > config.n_ctx_seq) {
            throw error(ASRKF_POOL_FULL, format("context is full: %u tokens of sequence %u and %u new ones do not fit into its %u", s.n_tokens(), s.id, n_new[s.id], config.n_ctx_seq));
        }
    }
}

// Refuse a batch that cannot end within host_limit before its first step: the store needs at least this much.
void steps::check_host_limit(uint32_t n_new) const {
    if (!budget.limit_bytes || config.no_alloc) {
        return;
    }
    uint64_t needed_bytes = 0;
    for (const group & g : groups) {
        const uint64_t total = uint64_t(tokens.n_records()) + n_new;
        needed_bytes += (total > g.pool_cells ? total - g.pool_cells : 0)*g.token_bytes;
    }
    if (needed_bytes > budget.limit_bytes) {
        throw error(ASRKF_HOST_LIMIT, format("host_limit of %llu bytes cannot hold what must be frozen for %u more tokens (at least %llu bytes): "
                "raise host_limit, raise kv_pool, or remove tokens", (unsigned long long) budget.limit_bytes, n_new, (unsigned long long) needed_bytes));
    }
}

uint32_t steps::longest_step(const std::vector<uint32_t> & n_new, uint32_t n_ubatch_max) const {
    uint32_t n_step = n_ubatch_max;
    for (const group & g : groups) {
        for (const sequence & s : tokens.sequences) {
            const uint32_t most = g.rules[s.id].max_ubatch(g.pool_cells < config.n_ctx); // where all fits, pinned tokens take no room
            if (n_new[s.id] > most) {
                n_step = std::min(n_step, most);
            }
        }
    }
    return n_step;
}

// Where each sequence's call begins, and which output row will be its last.
void steps::note_outputs(const llama_batch & batch, int32_t n_outputs) {
    for (sequence & s : tokens.sequences) {
        s.call_begin = -1;
        s.output     = 0;
    }
    row_of.assign(size_t(batch.n_tokens), 0);
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        sequence & s = tokens.sequences[size_t(batch.seq_id[i][0])];
        s.call_begin = s.call_begin < 0 ? batch.pos[i] : std::min(s.call_begin, batch.pos[i]);
        if (batch.logits[i]) {
            s.output = row_of[size_t(i)] = -n_outputs--;
        }
    }
}

// The entropy of each sequence's last output in the last call, which the caller has had by now, and what it calls for.
void steps::read_entropy() {
    const bool pending = std::exchange(output_pending, false) && wants_entropy();
    if (!pending) {
        return outputs.clear();
    }
    stopwatch watch(counted.policy_seconds);
    moves.synchronize();
    for (sequence & s : tokens.sequences) {
        if (s.output == 0 || s.n_tokens() == 0) {
            continue;
        }
        const double entropy = entropy_of_last(s);
        if (std::isnan(entropy)) {
            continue;
        }
        speaker = s.id;
        switch (s.trigger.observe(entropy, tokens.records[s.records.back()].token)) {
            case RECOVERY_SOFT:   counted.recoveries_soft_total++;   s.why.ask_for(occasion::soft_reset);   break;
            case RECOVERY_WINDOW: counted.recoveries_window_total++; s.why.ask_for(occasion::window_reset); break;
            case RECOVERY_FULL:   counted.recoveries_full_total++;   s.why.ask_for(occasion::full_reset);   break;
            default:              break;
        }
    }
    outputs.clear();
}

// NaN: nobody knows it.
double steps::entropy_of_last(const sequence & s) {
    using row = output_rows::row;
    const row kept = outputs.at(s.id);
    try {
        if (kept == row::plain || kept == row::sampled) {
            return outputs.of(s.id).entropy;
        }
    } catch (const std::exception & e) {
        refuse(e);
    }
    if (kept == row::sampled || kept == row::lost) {
        return NAN;
    }
    const float * logits = moves.context()->get_logits_ith(s.output);
    return logits ? entropy_of(logits, size_t(config.model.vocab.n_tokens())).entropy : NAN;
}

bool steps::get_sampled_output(int32_t i, asrkf_output & out) {
    const int32_t row = i < 0 ? i : size_t(i) < row_of.size() ? row_of[size_t(i)] : 0;
    for (const sequence & s : tokens.sequences) {
        if (row == 0 || s.output != row) {
            continue;
        }
        if (outputs.at(s.id) == output_rows::row::lost) {
            throw error(ASRKF_INTERNAL, format("output row %d could not be read on its device: the log says why", i));
        }
        if (outputs.at(s.id) == output_rows::row::sampled) {
            out = outputs.of(s.id);
            return true;
        }
    }
    return false;
}

void steps::computed(llama_context & ctx, const llm_graph_result & res, const llama_ubatch & ubatch, bool is_last, bool output) {
    outputs.fetch(ctx, res, ubatch, wants_entropy());
    tokens.rewalk_begin = -1;
    tokens.in_flight.clear();
    output_pending = output;
    if (is_last) {
        cuts.make_due();
    }
}

//
// a decision
//

// Room for what the step brings, in every group, and in the shares of those that have more than theirs.
void steps::decide_and_move(const std::vector<demand> & wanted) {
    scored.fold_in();
    const std::vector<demand> demands = with_shrunk_shares(wanted);
    plans_by_group plans;
    records_by_group leaving;
    for (const bool frugal : { false, true }) {
        plans   = decide(demands, frugal);
        leaving = moves.leaving(demands, plans);
        try {
            moves.reserve_host_room(leaving); // first: only then does anything change
            break;
        } catch (const error & e) { // an exchange needs more room than it leaves taken: near the limit, only what must be
            if (e.status != ASRKF_HOST_LIMIT || frugal) {
                throw;
            }
        }
    }
    stopwatch watch(counted.moves_seconds);
    moves.carry_out(demands, plans, std::move(leaving));
}

std::vector<demand> steps::with_shrunk_shares(const std::vector<demand> & wanted) const {
    std::vector<demand> demands = wanted;
    for (const sequence & s : tokens.sequences) {
        const bool in_step = std::any_of(wanted.begin(), wanted.end(), [&](const demand & d) { return d.seq == s.id; });
        const auto has_too_much = [&](const group & g) { return g.rules[s.id].n_active() > g.rules[s.id].params.pool_cells; };
        if (!in_step && std::any_of(groups.begin(), groups.end(), has_too_much)) {
            demands.push_back({ s.id, 0, tokens.pos_max(s) + 1, occasion::step });
        }
    }
    return demands;
}

plans_by_group steps::decide(const std::vector<demand> & demands, bool frugal) {
    stopwatch watch(counted.policy_seconds);
    plans_by_group plans(groups.size());
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        for (const demand & d : demands) {
            plans[ig].push_back(groups[ig].rules[d.seq].decide(d.n_new, d.pos_end - int32_t(d.n_new), d.why, frugal));
        }
    }
    return plans;
}

//
// a step
//

std::vector<part> steps::parts_of(const llama_ubatch & ubatch) const {
    std::vector<part> parts;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
            const uint32_t seq = uint32_t(ubatch.seq_id[i][j]);
            auto found = std::find_if(parts.begin(), parts.end(), [&](const part & p) { return p.seq == seq; });
            if (found == parts.end()) {
                parts.push_back({ seq, {}, tokens.pos_max(tokens.sequences[seq]) + 1 });
                found = parts.end() - 1;
            }
            found->tokens.push_back(i);
            found->pos_end = std::max(found->pos_end, ubatch.pos[i] + 1);
        }
    }
    return parts;
}

std::vector<demand> steps::demands_of(const std::vector<part> & parts) const {
    std::vector<demand> demands;
    for (const part & p : parts) {
        const uint32_t n_new = uint32_t(p.tokens.size());
        demands.push_back({ p.seq, n_new, p.pos_end, tokens.sequences[p.seq].why.at(p.pos_end - llama_pos(n_new), config.rewalk_tokens) });
    }
    return demands;
}

steps::placed steps::place(const llama_ubatch & ubatch, bool is_first, bool before_rewalk) {
    const mark before = now();
    const std::vector<part>   parts   = parts_of(ubatch);
    const std::vector<demand> demands = demands_of(parts);
    decide_and_move(demands);
    for (const demand & d : demands) {
        tokens.sequences[d.seq].why.decided(d.why, d.pos_end - llama_pos(d.n_new));
    }
    placed step;
    step.slots = find_slots(ubatch);
    step.side.scoring.seqs = sequences_to_score(parts, before_rewalk);
    if (!before_rewalk && may_look(ubatch)) {
        step.side.look.seqs = { parts[0].seq };
    }
    book(ubatch, parts, step);
    scored.prepare(step.side, parts, before_rewalk);
    cuts.prepare(step.side, parts);
    record(before, ubatch, step.side.scores(), demands[0].why, is_first ? float(tokens.sequences[parts[0].seq].trigger.last()) : 0);
    return step;
}

std::vector<llama_kv_cache::slot_info> steps::find_slots(const llama_ubatch & ubatch) const {
    std::vector<llama_kv_cache::slot_info> slots;
    for (const group & g : groups) {
        slots.push_back(g.cache->find_free(ubatch));
        if (slots.back().empty()) {
            throw error(ASRKF_INTERNAL, format("no %u free cells after a decision (%u of %u used)", ubatch.n_tokens, g.cache->n_used(), g.cache->n_cells()));
        }
    }
    return slots;
}

bool steps::overflows(const group & g, const llama_kv_cache::slot_info & slot) const {
    return config.unified ? tokens.n_records() > g.pool_cells : std::any_of(tokens.sequences.begin(), tokens.sequences.end(), [&](const sequence & s) {
        return s.n_tokens() > g.cache->get_size() && std::find(slot.strm.begin(), slot.strm.end(), llama_seq_id(g.cache->stream_of(s.id))) != slot.strm.end();
    });
}

std::vector<uint32_t> steps::sequences_to_score(const std::vector<part> & parts, bool before_rewalk) const {
    std::vector<uint32_t> due;
    for (const part & p : parts) {
        const auto is_due = [&](const group & g) { return g.rules[p.seq].scores_due(uint32_t(p.tokens.size())); };
        if (scored.is_on() && (before_rewalk || std::any_of(groups.begin(), groups.end(), is_due))) {
            due.push_back(p.seq);
        }
    }
    return choose_scored(due, config.score_queries, PROMPT_END_QUERIES);
}

// The step's tokens are in the books from here on, in flight until it is computed.
void steps::book(const llama_ubatch & ubatch, const std::vector<part> & parts, placed & step) {
    std::vector<uint32_t> & ids = step.side.records;
    ids.reserve(ubatch.n_tokens);
    tokens.in_flight.reserve(ubatch.n_tokens);
    tokens.reserve_records(ubatch.n_tokens);
    for (const part & p : parts) {
        tokens.reserve_tokens(tokens.sequences[p.seq], p.tokens.size());
    }
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const std::vector<uint32_t> users(ubatch.seq_id[i], ubatch.seq_id[i] + ubatch.n_seq_id[i]);
        ids.push_back(tokens.new_record(ubatch.pos[i], ubatch.token ? ubatch.token[i] : LLAMA_TOKEN_NULL, users));
        tokens.in_flight.push_back(ids.back());
    }
    for (const part & p : parts) {
        const std::vector<uint32_t> & asking = step.side.scoring.seqs;
        const bool scores = std::find(asking.begin(), asking.end(), p.seq) != asking.end();
        groups.ranks_of(p.seq).advance(uint32_t(p.tokens.size()), scores);
    }
    for (uint32_t ig = 0; ig < groups.size(); ++ig) {
        group & g = groups[ig];
        g.cache->apply(step.slots[ig], ubatch);
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            g.places[ids[i]] = { int32_t(g.cache->cell_at(step.slots[ig], i)), -1 };
        }
        for (const part & p : parts) {
            g.rules[p.seq].advance(uint32_t(p.tokens.size()));
        }
    }
}

steps::placed steps::place_rewalk(const llama_ubatch & ubatch) {
    const mark before = now();
    sequence & s = tokens.sequences[size_t(ubatch.seq_id[0][0])];
    const uint32_t n = ubatch.n_tokens, begin = s.n_tokens() - n;
    tokens.rewalk_begin = ubatch.pos[0]; // from here on a failure takes back this call's tokens only: see sequence_ops::remove()
    decide_and_move({ { s.id, 0, tokens.pos_max(s) + 1, occasion::prompt_end } });
    placed step;
    step.side.records.assign(s.records.begin() + begin, s.records.end());
    for (group & g : groups) {
        step.slots.push_back(cells_again(g, s, step.side.records));
        g.unseal(s.id, begin, config.block);
    }
    part again = { s.id, std::vector<uint32_t>(n), 0 };
    std::iota(again.tokens.begin(), again.tokens.end(), 0);
    scored.prepare(step.side, { again }, false);
    s.newest.forget_from(ubatch.pos[0]); // else the first time's queries are kept beside these
    cuts.prepare(step.side, { again });
    counted.rewalks_total++;
    counted.rewalked_tokens_total += n;
    record(before, ubatch, false, occasion::prompt_end, 0);
    return step;
}

// One token of one sequence, of which something is frozen that scores tell about. A step of several sequences has none: the look
// of one would compute the tokens of all a second time.
bool steps::may_look(const llama_ubatch & ubatch) const {
    if (config.recovery != RECOVERY_SECOND_LOOK || !scored.is_on() || ubatch.n_tokens != 1 || ubatch.n_seq_id[0] != 1) {
        return false;
    }
    const size_t seq = size_t(ubatch.seq_id[0][0]);
    return std::any_of(groups.begin(), groups.end(), [&](const group & g) { return !g.keeps_window && g.rules[seq].n_frozen() > 0; });
}

bool steps::wants_look(llama_context & ctx, const llm_graph_result & res, const llama_ubatch & ubatch, side_step & side) {
    if (side.look.seqs.empty() || goes_to_sampler(res)) { // a backend sampler would draw twice
        return false;
    }
    scored.run(side.look);
    const float missed = scored.wait_for_missed().mean;
    look_rule & rule = tokens.sequences[side.look.seqs[0]].look;
    const bool by_entropy = config.look_trigger == LOOK_ENTROPY;
    const bool is_seen    = missed >= 0 && (!by_entropy || ubatch.output[0]);
    const bool wants      = is_seen && rule.observe(by_entropy ? first_entropy(ctx, res) : double(missed));
    if (!wants) {
        scored.drop_pending(); // what one query asks for is of no use to the next
    }
    return wants;
}

steps::placed steps::place_look(const llama_ubatch & ubatch, side_step side) {
    const mark before = now();
    sequence & s = tokens.sequences[side.look.seqs[0]];
    decide_and_move({ { s.id, 0, tokens.pos_max(s) + 1, occasion::second_look } });
    placed step;
    for (group & g : groups) {
        step.slots.push_back(cells_again(g, s, side.records));
    }
    if (!side.scoring.seqs.empty()) {
        scored.note_frozen(side.scoring);
        scored.own.prepare(side.scoring.seqs);
    }
    step.side = std::move(side);
    relevance::keep_means(step.side.written);
    counted.second_looks_total++;
    record(before, ubatch, !step.side.scoring.seqs.empty(), occasion::second_look, 0);
    return step;
}

// The cells of these records, whose host copies end here: their rows are about to change.
llama_kv_cache::slot_info steps::cells_again(group & g, const sequence & s, const std::vector<uint32_t> & ids) const {
    for (const uint32_t id : ids) {
        if (g.places[id].cell < 0) {
            throw error(ASRKF_INTERNAL, format("position %d of the window is not in the pool", tokens.records[id].pos));
        }
    }
    const uint32_t stream = g.cache->stream_of(s.id);
    llama_kv_cache::slot_info slot = { stream, stream, { llama_seq_id(stream) }, { {} } };
    for (const uint32_t id : ids) {
        slot.idxs[0].push_back(uint32_t(g.places[id].cell) % g.cache->get_size());
        g.release_copy(id);
    }
    return slot;
}

void steps::record(const mark & before, const llama_ubatch & ubatch, bool scores, occasion why, float entropy) {
    if (trace.buffer) {
        asrkf_step step = { counted.steps_total, ubatch.pos[0], ubatch.n_tokens, 0, 0, uint32_t(counted.freezes_total - before.freezes),
            uint32_t(counted.n_restores() - before.restores), scores, uint32_t(why), entropy, scored.missed().mean, scored.missed().worst, float(counted.policy_seconds - before.policy_seconds),
            float(counted.moves_seconds - before.moves_seconds) };
        step.active_cells = groups.mean_cells([](const group & g) { return g.cache->n_used(); });
        step.frozen_cells = tokens.n_records() - std::min(tokens.n_records(), step.active_cells);
        trace.buffer[trace.count++ % trace.capacity] = step;
    }
    counted.steps_total++;
}

} // namespace asrkf
