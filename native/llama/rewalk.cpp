#include "llama/rewalk.h"

#include <algorithm>

namespace asrkf {

namespace {

using newest_first = std::vector<std::pair<llama_pos, llama_token>>;

// All tokens are of this sequence alone, and known by their number; the last is the only output.
bool is_end_of_prompt(const std::vector<llama_ubatch> & ubatches, llama_seq_id seq_id) {
    uint32_t n_new = 0, n_outputs = 0;
    for (const llama_ubatch & u : ubatches) {
        for (uint32_t i = 0; i < u.n_tokens; ++i) {
            if (!u.token || u.n_seq_id[i] != 1 || u.seq_id[i][0] != seq_id) {
                return false;
            }
        }
        n_new += u.n_tokens;
        n_outputs += uint32_t(std::count_if(u.output, u.output + u.n_tokens, [](int8_t o) { return o != 0; }));
    }
    const llama_ubatch & last = ubatches.back();
    return n_new >= 2 && n_outputs == 1 && last.output[last.n_tokens - 1];
}

// A draft model reads every token's hidden state, once.
bool is_read_by_a_draft(const llama_cparams & cparams) {
    return cparams.embeddings_nextn || std::count(cparams.embeddings_layer_inp.begin(), cparams.embeddings_layer_inp.end(), true);
}

// The newest tokens, at most n of older calls, back to one that may not be computed again: a record that is shared, that
// came as an embedding, or from a state that does not hold its token.
newest_first computable(const std::vector<llama_ubatch> & ubatches, const sequence & s, const token_table & tokens, uint32_t n) {
    newest_first result;
    for (auto u = ubatches.rbegin(); u != ubatches.rend(); ++u) {
        for (uint32_t i = u->n_tokens; i-- > 0; ) {
            result.emplace_back(u->pos[i], u->token[i]);
        }
    }
    for (uint32_t i = s.n_tokens(); i-- > 0 && result.size() < n; ) {
        const record & r = tokens.records[s.records[i]];
        if (r.users.count() != 1 || r.token == LLAMA_TOKEN_NULL) {
            break;
        }
        result.emplace_back(r.pos, r.token);
    }
    return result;
}

llama_ubatch as_step(const newest_first & tokens, uint32_t n, llama_seq_id seq_id) {
    auto data = std::make_shared<llama_ubatch::data_t>();
    for (uint32_t i = n; i-- > 0; ) {
        data->pos.push_back(tokens[i].first);
        data->token.push_back(tokens[i].second);
    }
    data->n_seq_id.assign(n, 1);
    data->seq_id_data.assign(n, seq_id);
    for (uint32_t i = 0; i < n; ++i) {
        data->seq_id.push_back(&data->seq_id_data[i]);
    }
    data->seq_id_unq = { seq_id };
    data->seq_idx.assign(LLAMA_MAX_SEQ, -1);
    data->seq_idx[size_t(seq_id)] = 0;
    data->output.assign(n, 0);
    data->output[n - 1] = 1;
    data->batch_idxs.assign(n, -1);
    return llama_ubatch { 0, n, 1, n, 1, 1, data->token.data(), nullptr, data->pos.data(), data->n_seq_id.data(), data->seq_id.data(), data->seq_id_unq.data(),
        data->seq_idx.data(), data->output.data(), data };
}

} // namespace

std::optional<llama_ubatch> rewalk_of(const std::vector<llama_ubatch> & ubatches, const settings & config, const layer_groups & groups, const token_table & tokens) {
    const llama_seq_id seq_id = ubatches[0].seq_id[0][0];
    const sequence & s = tokens.sequences[size_t(seq_id)];
    if (!tokens.index || !groups.first().rules[0].params.recall || !is_end_of_prompt(ubatches, seq_id) || is_read_by_a_draft(config.cparams)) {
        return std::nullopt;
    }
    uint32_t n_new = 0, least_pool = config.n_ctx, least_window = config.n_ctx, n = config.rewalk_tokens;
    for (const llama_ubatch & u : ubatches) {
        n_new += u.n_tokens;
    }
    for (const group & g : groups) {
        const policy & rule = g.rules[s.id];
        least_pool   = g.keeps_window ? least_pool : std::min(least_pool, rule.params.pool_cells);
        least_window = std::min(least_window, rule.window());
        n = std::min({ n, rule.window(), rule.max_ubatch(), config.n_ubatch });
    }
    if (s.n_tokens() + n_new <= least_pool) {
        return std::nullopt;
    }
    const newest_first newest = computable(ubatches, s, tokens, n);
    n = std::min(n, uint32_t(newest.size()));
    while (n > 0 && newest[n - 1].first <= newest[0].first - llama_pos(least_window)) { // the window is sure to be in the pool
        n--; // positions may have holes
    }
    return n < 2 ? std::nullopt : std::optional(as_step(newest, n, seq_id));
}

} // namespace asrkf
