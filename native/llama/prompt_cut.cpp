#include "llama/prompt_cut.h"

#include "llama/creation.h"
#include "llama/refusal.h"
#include "scoring/by_device.h"

#include <algorithm>

namespace asrkf {

std::unique_ptr<attention_rows> make_attention_rows(const settings & config, const std::vector<uint32_t> & layers, ggml_type type_k, bool no_alloc) {
    std::vector<row_layer> specs;
    for (const uint32_t il : layers) {
        specs.push_back({ attention_of(config, il), type_k, {} });
        if (const ggml_tensor * sinks = config.model.layers[il].attn_sinks; sinks && sinks->buffer && !no_alloc) {
            specs.back().sink_logits.resize(size_t(ggml_nelements(sinks)));
            ggml_backend_tensor_get(sinks, specs.back().sink_logits.data(), 0, ggml_nbytes(sinks));
        }
    }
    return std::make_unique<attention_rows>(std::move(specs), config.rows*config.n_seq_max, logit_soft_cap(config.model), no_alloc);
}

prompt_cuts::prompt_cuts(const settings & config, layer_groups & groups, token_table & tokens, transfers & moves, scores & scored, counters & counted, ggml_type type_k)
    : config(config), groups(groups), tokens(tokens), moves(moves), scored(scored), counted(counted), results(groups.size()) {
    if (!make_policy_params(config, 1).cuts) {
        return;
    }
    std::vector<uint32_t> layers;
    for (const group & g : groups) {
        if (!g.keeps_window) {
            layers.insert(layers.end(), g.layers.begin(), g.layers.end());
        }
    }
    std::sort(layers.begin(), layers.end()); // as they are built
    attention = make_attention_rows(config, layers, type_k, config.no_alloc);
    const std::vector<row_part> parts = groups.row_parts();
    for (const uint32_t il : layers) {
        ggml_tensor * own = groups[groups.of_layer(il)].cache->k_of(il);
        const row_part & part = *std::find_if(parts.begin(), parts.end(), [&](const row_part & p) { return p.tensor == own; });
        keys.push_back({ part.group, own, part.offset });
    }
}

int prompt_cuts::place_of(int32_t il) const {
    for (size_t i = 0; attention && i < attention->layers().size(); ++i) {
        if (attention->layers()[i].il == uint32_t(il)) {
            return int(i);
        }
    }
    return -1;
}

void prompt_cuts::prepare(side_step & step, const std::vector<part> & parts) {
    if (!attention) {
        return;
    }
    for (const part & p : parts) {
        std::vector<llama_pos> step_pos;
        for (const uint32_t i : p.tokens) {
            step_pos.push_back(tokens.records[step.records[i]].pos);
        }
        std::vector<int32_t> kept;
        tokens.sequences[p.seq].newest.keep(step_pos, kept, step.for_cuts.rows);
        for (const int32_t i : kept) {
            step.for_cuts.tokens.push_back(int32_t(p.tokens[size_t(i)]));
        }
    }
}

//
// when
//

void prompt_cuts::note(const llama_batch & batch, bool prompt_follows) {
    due.clear();
    if (!attention) {
        return;
    }
    std::vector<cut_times::call> calls(config.n_seq_max);
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t j = 0; j < batch.n_seq_id[i]; ++j) {
            cut_times::call & call = calls[size_t(batch.seq_id[i][j])];
            const bool has_output = batch.logits[i] && !prompt_follows; // in the middle of a prompt there is one only by habit
            call.n_tokens++;
            call.n_outputs += has_output;
            call.ends_with_output = has_output;
        }
    }
    for (uint32_t seq = 0; seq < calls.size(); ++seq) {
        if (tokens.sequences[seq].cuts.is_due(calls[seq], config.repeat)) {
            due.push_back(seq);
        }
    }
}

void prompt_cuts::clear() {
    due.clear();
    results.assign(groups.size(), {});
}

void prompt_cuts::make_due() {
    for (const uint32_t seq : due) {
        try {
            make(tokens.sequences[seq]);
        } catch (const std::exception & e) { // llama.cpp calls this where nothing may throw
            const auto * known = dynamic_cast<const error *>(&e);
            refuse(format("sequence %u was cut in part or not at all, nothing of it is lost: %s", seq, text_of(e).c_str()), known ? known->status : ASRKF_INTERNAL);
        }
    }
    due.clear();
}

//
// a cut
//

void prompt_cuts::make(sequence & s) {
    if (s.newest.all().empty()) {
        return;
    }
    scored.fold_in();
    moves.prepare();
    if (!attention->is_attached()) {
        attention->attach(moves.backends());
    }
    const std::vector<demand> demands = { { s.id, 0, tokens.pos_max(s) + 1, occasion::prompt_end } };
    std::vector<cut_result> found(groups.size());
    plans_by_group plans(groups.size(), { plan() });
    {
        stopwatch watch(counted.policy_seconds);
        for (size_t ig = 0; ig < groups.size(); ++ig) {
            if (!groups[ig].keeps_window) {
                plans[ig][0] = decide(ig, s, found[ig]);
            }
        }
    }
    stopwatch watch(counted.moves_seconds);
    records_by_group leaving = moves.leaving(demands, plans);
    moves.reserve_host_room(leaving);
    moves.carry_out(demands, plans, std::move(leaving));
    results = std::move(found);
    counted.cuts_total++;
}

plan prompt_cuts::decide(size_t ig, const sequence & s, cut_result & out) {
    const policy & rule = groups[ig].rules[s.id];
    const llama_pos pos_end = tokens.pos_max(s) + 1;
    norm_cut measured = rule.cut_before(pos_end);
    std::vector<float> weights;
    for (size_t i = 0; i < keys.size(); ++i) {
        if (keys[i].group == ig) {
            measure(i, s, weights);
            measured.add_layer(weights, s.n_tokens());
        }
    }
    return rule.decide_cut(measured, pos_end, out);
}

// [head][token] of one layer: of the newest queries, each of which sees the tokens up to its own, the mean.
void prompt_cuts::measure(size_t i, const sequence & s, std::vector<float> & weights) {
    const group & g = groups[keys[i].group];
    const std::vector<query_ring::kept> queries = s.newest.all();
    const size_t n_tokens = s.n_tokens();
    weights.assign(size_t(attention->layers()[i].n_head)*n_tokens, 0);
    std::vector<float> seen;
    for (const auto & [row, pos] : queries) {
        std::vector<key_place> places;
        for (size_t t = 0; t < n_tokens && tokens.records[s.records[t]].pos <= pos; ++t) {
            const place & p = g.places[s.records[t]];
            places.push_back({ p.cell, p.cell < 0 ? g.store->data(uint32_t(p.slot)) + keys[i].offset : nullptr });
        }
        attention->probabilities(i, row, keys[i].keys, places, seen);
        for (size_t n = 0; n < seen.size(); ++n) {
            weights[n / places.size()*n_tokens + n % places.size()] += seen[n] / float(queries.size());
        }
    }
}

//
// figures
//

uint32_t prompt_cuts::enough_cells(size_t ig) const {
    const uint32_t n_wanted = result_of(ig).n_wanted;
    return n_wanted == 0 ? 0 : std::min(config.n_ctx, (n_wanted + config.interval + POOL_PAD_CELLS - 1) / POOL_PAD_CELLS*POOL_PAD_CELLS);
}

size_t prompt_cuts::ring_bytes() const { return attention ? sum_of(attention->ring_bytes()) : 0; }
size_t prompt_cuts::room_bytes() const { return attention ? sum_of(attention->room_bytes()) : 0; }

std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> prompt_cuts::breakdown() const {
    attention_rows::sizes sizes;
    if (attention) {
        sizes = attention->ring_bytes();
        const attention_rows::sizes rooms = attention->room_bytes();
        sizes.insert(sizes.end(), rooms.begin(), rooms.end());
    }
    return sizes;
}

} // namespace asrkf
