#include "llama/own_scores.h"

#include "llama/creation.h"
#include "llama/scores.h"

#include "llama-impl.h"

#include <algorithm>
#include <cmath>

namespace asrkf {

namespace {

bool may_freeze(const settings & config, const group & g) { return !g.keeps_window && g.pool_cells < config.n_ctx; }

} // namespace

template <typename Groups> std::unique_ptr<own_attention> make_own_attention(const settings & config, const Groups & groups, ggml_type type_k, bool no_alloc, std::string & why_not) {
    if (!make_policy_params(config, 1).leans || std::none_of(groups.begin(), groups.end(), [&](const group & g) { return may_freeze(config, g); })) {
        return nullptr;
    }
    std::vector<own_layer> layers;
    uint32_t set = 0;
    for (const group & g : groups) {
        for (const uint32_t il : g.layers) {
            if (may_freeze(config, g)) {
                layers.push_back({ attention_of(config, il), type_k, set, g.pool_cells });
            }
        }
        set += may_freeze(config, g);
    }
    std::sort(layers.begin(), layers.end(), [](const own_layer & a, const own_layer & b) { return a.il < b.il; }); // as they are built
    try {
        return std::make_unique<own_attention>(std::move(layers), config.n_seq_max, logit_soft_cap(config.model), no_alloc);
    } catch (const error & e) {
        if (e.status != ASRKF_UNSUPPORTED) {
            throw;
        }
        why_not = e.what();
        return nullptr;
    }
}

template std::unique_ptr<own_attention> make_own_attention(const settings &, const layer_groups &, ggml_type, bool, std::string &);
template std::unique_ptr<own_attention> make_own_attention(const settings &, const std::vector<group> &, ggml_type, bool, std::string &);

own_scores::own_scores(const settings & config, layer_groups & groups, token_table & tokens, transfers & moves, ggml_type type_k)
    : groups(groups), tokens(tokens), moves(moves) {
    std::string why_not;
    attention = make_own_attention(config, groups, type_k, config.no_alloc, why_not);
    if (!why_not.empty() && !config.no_alloc) {
        LLAMA_LOG_WARN("asrkf: all layers go by the shared ranking: %s\n", why_not.c_str());
    }
    for (size_t ig = 0; attention && ig < groups.size(); ++ig) {
        if (may_freeze(config, groups[ig])) {
            sets.push_back(ig);
        }
    }
    asked.masks.resize(sets.size());
}

int own_scores::place_of(int32_t il) const {
    for (size_t i = 0; attention && i < attention->layers().size(); ++i) {
        if (attention->layers()[i].il == uint32_t(il)) {
            return int(i);
        }
    }
    return -1;
}

void own_scores::attach() {
    if (attention->is_attached()) {
        return;
    }
    std::vector<ggml_tensor *> keys;
    for (const own_layer & l : attention->layers()) {
        keys.push_back(groups[groups.of_layer(l.il)].cache->k_of(l.il));
    }
    attention->attach(moves.backends(), std::move(keys));
}

void own_scores::prepare(side_step & step, const std::vector<part> & parts) {
    if (!attention) {
        return;
    }
    step.last_tokens.assign(tokens.sequences.size(), 0); // of a sequence that this step does not bring: nobody reads it
    for (const part & p : parts) {
        step.last_tokens[p.seq] = int32_t(p.tokens.back());
    }
    prepare(step.scoring.seqs);
}

void own_scores::prepare(const std::vector<uint32_t> & seqs) {
    if (!attention) {
        return;
    }
    attention->settle(); // a run that nobody waits for reads what is about to change
    is_pending = false;
    this->seqs = seqs;
    if (seqs.empty()) {
        return;
    }
    attach();
    asked.seqs.assign(seqs.begin(), seqs.end());
    for (size_t set = 0; set < sets.size(); ++set) {
        write_mask(set, seqs);
    }
    attention->prepare(uint32_t(seqs.size()));
}

void own_scores::write_mask(size_t set, const std::vector<uint32_t> & seqs) {
    const group & g = groups[sets[set]];
    const size_t n_cells = g.cache->n_cells();
    asked.masks[set].assign(n_cells*seqs.size(), -INFINITY);
    for (size_t n = 0; n < seqs.size(); ++n) {
        const size_t first = n*n_cells + size_t(g.cache->stream_of(seqs[n]))*g.cache->get_size();
        const token_set & active = g.cache->active_cells(seqs[n]);
        for (uint32_t w = 0; w < active.n_words(); ++w) {
            token_set::each(w, active.word(w), [&](uint32_t cell) { asked.masks[set][first + cell] = 0; });
        }
    }
}

void own_scores::run() {
    if (attention && !seqs.empty()) {
        attention->run(asked);
        is_pending = true;
    }
}

void own_scores::fold_in() {
    if (!is_pending) {
        return;
    }
    attention->wait();
    is_pending = false;
    for (size_t set = 0; set < sets.size(); ++set) {
        for (size_t n = 0; n < seqs.size(); ++n) {
            fold_in(set, n);
        }
    }
}

// Of the n-th sequence that asked.
void own_scores::fold_in(size_t set, size_t n) {
    group & g = groups[sets[set]];
    const sequence & s = tokens.sequences[seqs[n]];
    policy & rule = g.rules[s.id];
    const std::vector<float> & found = attention->of_set(uint32_t(set));
    const float * seen = asked.masks[set].data() + n*g.cache->n_cells();
    const token_set & active = rule.active_tokens();
    for (uint32_t w = 0; w < active.n_words(); ++w) {
        token_set::each(w, active.word(w), [&](uint32_t i) {
            const size_t cell = size_t(g.places[s.records[i]].cell);
            if (seen[cell] == 0) { // else it has come since
                rule.observe_own(i, float(seqs.size())*found[cell]);
            }
        });
    }
}

} // namespace asrkf
