#include "llama/gate_scores.h"

#include "llama/creation.h"
#include "llama/find_calibration.h"
#include "llama/refusal.h"
#include "scoring/by_device.h"
#include "scoring/projection.h"

#include <algorithm>
#include <filesystem>

namespace asrkf {

namespace {

// A file of this model; "" in a trial.
std::string found_gates(const settings & config) {
    const std::string named = config.gates;
    if (config.no_alloc) {
        return named;
    }
    const std::string own = fingerprint(config.model), file = named.empty() ? gates_file(own) : named;
    if (std::error_code ignored; !std::filesystem::exists(file, ignored)) {
        throw error(ASRKF_INVALID_ARGUMENT, format("score=gate needs gates of this model, and %s is not there: make them once with asrkf gates train MODEL", file.c_str()));
    }
    if (const std::string made_for = read_gates(file, /*no_alloc*/ true).fingerprint; made_for != own) {
        throw error(ASRKF_INVALID_ARGUMENT, format("gates=%s was made for another model (%s, this one is %s): run asrkf gates train on this model", file.c_str(),
                made_for.c_str(), own.c_str()));
    }
    return file;
}

} // namespace

template <typename Groups> std::unique_ptr<gates> make_gates(const settings & config, const Groups & groups, ggml_backend_buffer_type_t host, bool no_alloc) {
    const policy_params rule = make_policy_params(config, 1);
    const bool freezes = std::any_of(groups.begin(), groups.end(), [&](const group & g) {
        return !g.keeps_window && (g.pool_cells < config.n_ctx || rule.gate_threshold > 0);
    });
    const std::string file = freezes && rule.score == SCORE_GATE ? found_gates(config) : "";
    if (file.empty()) {
        return nullptr;
    }
    const auto & hparams = config.model.hparams;
    std::vector<gated_layer> specs;
    for (const group & g : groups) {
        for (const uint32_t il : g.layers) {
            ggml_backend_dev_t dev = config.model.dev_layer(int(il)); // where its queries are made, wherever its cache is
            if (!g.keeps_window) {
                specs.push_back({ il, int64_t(hparams.n_embd), int64_t(hparams.n_head(il)), int64_t(hparams.n_head_kv(il)),
                    dev ? ggml_backend_dev_buffer_type(dev) : ggml_backend_cpu_buffer_type() });
            }
        }
    }
    return std::make_unique<gates>(read_gates(file, no_alloc), std::move(specs), config.n_ubatch, host, no_alloc);
}

template std::unique_ptr<gates> make_gates(const settings &, const layer_groups &, ggml_backend_buffer_type_t, bool);
template std::unique_ptr<gates> make_gates(const settings &, const std::vector<group> &, ggml_backend_buffer_type_t, bool);

gate_scores::gate_scores(const settings & config, layer_groups & groups, token_table & tokens, transfers & moves, ggml_backend_buffer_type_t host)
    : groups(groups), tokens(tokens), moves(moves), no_alloc(config.no_alloc) {
    computing = make_gates(config, groups, host, config.no_alloc);
}

void gate_scores::build(ggml_context * ctx, ggml_cgraph * gf, int32_t il, ggml_tensor * q) {
    if (!computing) {
        return;
    }
    const std::vector<gated_layer> & layers = computing->layers();
    const auto layer = std::find_if(layers.begin(), layers.end(), [&](const gated_layer & l) { return l.il == uint32_t(il); });
    if (layer == layers.end()) {
        return;
    }
    ggml_tensor * x = projected_input(q);
    if (!x || x->ne[0] != layer->n_embd) {
        if (no_alloc) {
            return; // its matrices have no memory to tell them by
        }
        unsupported(format("layer %d of this model makes its queries in a way that gates cannot follow: use another kv_policy", il));
    }
    computing->build(ctx, gf, size_t(layer - layers.begin()), x);
}

void gate_scores::queue(const std::vector<uint32_t> & records) {
    pending.clear();
    if (!computing || no_alloc) {
        return;
    }
    try {
        if (!computing->is_attached()) {
            computing->attach(moves.backends());
        }
        for (const uint32_t id : records) {
            pending.push_back({ id, tokens.records[id].pos, tokens.records[id].token });
        }
        computing->read(uint32_t(records.size()));
    } catch (const std::exception & e) {
        pending.clear();
        refuse(e);
    }
}

void gate_scores::fold_in() {
    if (pending.empty()) {
        return;
    }
    computing->wait();
    std::vector<float> sums(groups.size());
    for (size_t t = 0; t < pending.size(); ++t) {
        const auto & [id, pos, token] = pending[t];
        const auto & record = tokens.records[id];
        if (record.users.none() || record.pos != pos || record.token != token) {
            continue;
        }
        sums.assign(groups.size(), 0);
        for (size_t i = 0; i < computing->layers().size(); ++i) {
            const uint32_t ig = groups.of_layer(computing->layers()[i].il);
            sums[ig] += computing->score(i, uint32_t(t)) / float(groups[ig].layers.size());
        }
        for (sequence & s : tokens.sequences) {
            if (!record.users.test(s.id)) {
                continue;
            }
            const uint32_t at = tokens.lower_bound(s, pos);
            for (size_t ig = 0; ig < groups.size() && s.records[at] == id; ++ig) {
                if (!groups[ig].keeps_window) {
                    groups[ig].rules[s.id].observe(at, sums[ig], sums[ig], 0);
                }
            }
        }
    }
    pending.clear();
}

size_t gate_scores::device_bytes() const {
    return sum_of(breakdown());
}

} // namespace asrkf
