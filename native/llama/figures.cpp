#include "llama/figures.h"

#include "llama-context.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace asrkf {

asrkf_stats figures::stats(llama_context * ctx) const {
    asrkf_stats s = counted;
    s.struct_size        = sizeof(s);
    s.policy             = config.policy;
    s.n_groups           = uint32_t(groups.size());
    s.pool_cells         = groups.mean_cells([](const group & g) { return g.pool_cells; });
    s.type_k             = groups.first().cache->type_k();
    s.type_v             = groups.first().cache->type_v();
    s.active_cells       = groups.mean_cells([](const group & g) { return g.cache->n_used(); });
    s.tokens             = tokens.n_records();
    s.frozen_cells       = uint32_t(s.tokens) - s.active_cells;
    s.n_sequences        = uint32_t(std::count_if(tokens.sequences.begin(), tokens.sequences.end(), [](const sequence & q) { return q.n_tokens() > 0; }));
    s.device_index_bytes = scored.index_bytes() + cuts.ring_bytes();
    std::snprintf(s.scoring_backend, sizeof(s.scoring_backend), "%s", scored.backend().c_str());
    std::snprintf(s.ranking, sizeof(s.ranking), "%s", scored.ranked_by());
    add_cut(s);
    const recovery_trigger & trigger = tokens.sequences[placing.last_speaker()].trigger;
    for (const sequence & q : tokens.sequences) {
        s.outputs_total += q.trigger.count();
    }
    s.missed_attention_ratio       = scored.missed().mean;
    s.missed_attention_worst_ratio = scored.missed().worst;
    s.entropy            = float(trigger.last());
    s.entropy_mean       = float(trigger.mean());
    s.entropy_deviation  = float(trigger.deviation());
    s.host_kv_bytes      = budget.used_bytes;
    s.host_kv_peak_bytes = budget.peak_bytes;
    for (const group & g : groups) {
        s.device_kv_bytes      += g.cache->device_bytes();
        for (const policy & rule : g.rules) {
            s.restores_redundant_total += rule.n_redundant();
        }
    }
    s.device_compute_bytes = scored.compute_bytes() + cuts.room_bytes();
    s.device_staging_bytes = groups.mover ? groups.mover->staging_bytes() : 0;
    for (const auto & [buft, data] : ctx->memory_breakdown()) {
        s.device_compute_bytes += data.context > 0 ? data.compute : 0;
    }
    return s;
}

// Of the last one: what layers kept, and what each would have had room for.
void figures::add_cut(asrkf_stats & s) const {
    double kept = 0, n_layers = 0;
    for (uint32_t ig = 0; ig < groups.size(); ++ig) {
        if (const cut_result cut = cuts.result_of(ig); cut.n_tokens > 0) {
            kept     += double(cut.n_kept) / double(cut.n_tokens)*double(groups[ig].layers.size());
            n_layers += double(groups[ig].layers.size());
            s.enough_cells = std::max(s.enough_cells, cuts.enough_cells(ig));
        }
    }
    s.kept_ratio = n_layers > 0 ? float(kept / n_layers) : -1;
}

// "0-4+7", as layers= takes it.
static std::string ranges_text(std::vector<uint32_t> layers) {
    std::sort(layers.begin(), layers.end());
    std::string text;
    for (size_t begin = 0, end; begin < layers.size(); begin = end) {
        for (end = begin + 1; end < layers.size() && layers[end] == layers[end - 1] + 1; ++end) {}
        text += format(end - begin > 1 ? "%s%u-%u" : "%s%u", begin ? "+" : "", layers[begin], layers[end - 1]);
    }
    return text;
}

asrkf_group_stats figures::group_stats(uint32_t index) const {
    const group & g = groups.named(index);
    asrkf_group_stats s = {};
    s.struct_size         = sizeof(s);
    s.n_layers            = uint32_t(g.layers.size());
    s.pool_cells          = g.pool_cells;
    s.window              = g.rules[0].window();
    s.max_ubatch          = g.rules[0].max_ubatch();
    s.active_cells        = g.cache->n_used();
    s.frozen_cells        = tokens.n_records() - g.cache->n_used(); // each has a slot, and other slots are copies of what is active
    s.active_copied_cells = g.store ? uint32_t(g.store->n_used()) - s.frozen_cells : 0;
    const cut_result cut  = cuts.result_of(index);
    s.kept_ratio          = cut.n_tokens > 0 ? float(cut.n_kept) / float(cut.n_tokens) : -1;
    s.wanted_ratio        = cut.n_tokens > 0 ? float(cut.n_wanted) / float(cut.n_tokens) : -1;
    s.sliding_window      = g.keeps_window ? config.model.hparams.n_swa : 0;
    s.token_bytes         = g.token_bytes;
    s.device_kv_bytes     = g.cache->device_bytes();
    std::snprintf(s.layers, sizeof(s.layers), "%s", ranges_text(g.layers).c_str());
    return s;
}

size_t figures::token_states(int32_t seq_id, uint32_t index, int32_t * out_pos, uint8_t * out_state, size_t capacity) const {
    const sequence & s = tokens.named(seq_id);
    const group & g = groups.named(index);
    for (uint32_t i = 0; i < std::min<size_t>(capacity, s.n_tokens()); ++i) {
        const place & p = g.places[s.records[i]];
        if (out_pos) {
            out_pos[i] = tokens.records[s.records[i]].pos;
        }
        if (out_state) {
            const bool active = p.cell >= 0 && g.cache->is_active(uint32_t(p.cell), s.id);
            out_state[i] = !active ? ASRKF_TOKEN_FROZEN : p.slot < 0 ? ASRKF_TOKEN_ACTIVE : ASRKF_TOKEN_ACTIVE_COPIED;
        }
    }
    return s.n_tokens();
}

uint32_t figures::record_at(int32_t seq_id, uint32_t index, int32_t pos, size_t size) const {
    const sequence & s = tokens.named(seq_id);
    const group & g = groups.named(index);
    const uint32_t i = tokens.lower_bound(s, pos);
    if (i == s.n_tokens() || tokens.records[s.records[i]].pos != pos) {
        throw error(ASRKF_INVALID_ARGUMENT, format("sequence %d has no position %d", seq_id, pos));
    }
    if (size != g.token_bytes) {
        throw error(ASRKF_INVALID_ARGUMENT, format("size is %zu, a token has %zu bytes in group %u", size, g.token_bytes, index));
    }
    return s.records[i];
}

void figures::rows(uint32_t id, uint32_t index, uint8_t * out) const {
    const group & g = groups[index];
    const place & p = g.places[id];
    if (p.cell < 0) {
        std::memcpy(out, g.store->data(uint32_t(p.slot)), g.token_bytes);
        return;
    }
    groups.mover->get({ { index, uint32_t(p.cell), out } });
    groups.mover->settle();
}

std::map<ggml_backend_buffer_type_t, size_t> figures::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> sum;
    for (const group & g : groups) {
        for (const auto & [buft, size] : g.cache->memory_breakdown()) {
            sum[buft] += size;
        }
    }
    for (const auto & sizes : { scored.breakdown(), cuts.breakdown() }) {
        for (const auto & [buft, size] : sizes) {
            sum[buft] += size;
        }
    }
    return sum;
}

} // namespace asrkf
