#include "llama/layout.h"

#include "llama/calibration.h"
#include "llama/creation.h"
#include "llama/refusal.h"
#include "policy/budgets.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstring>

namespace asrkf {

namespace {

[[noreturn]] void invalid(const std::string & text) { throw error(ASRKF_INVALID_ARGUMENT, text); }

uint32_t padded(uint64_t cells) { return uint32_t((cells + POOL_PAD_CELLS - 1) / POOL_PAD_CELLS * POOL_PAD_CELLS); }

uint32_t pinned_at_creation(const settings & config) { return count_positions(parse_positions("pinned", config.pinned)); }

//
// what is known of the layers
//

// As measured, or by depth. measured_scorers: who scored best, if that was measured.
std::vector<layer_budget> budgets_of(const settings & config, const llama_memory_params & params, const std::vector<uint32_t> & layers, std::vector<uint32_t> & measured_scorers) {
    const auto & hparams = config.model.hparams;
    std::vector<layer_budget> budgets;
    for (const uint32_t il : layers) {
        budgets.push_back({ il, 0, ggml_row_size(params.type_k, hparams.n_embd_k_gqa(il)) + ggml_row_size(params.type_v, hparams.n_embd_v_gqa(il)) });
    }
    if (!*config.calibration || std::strcmp(config.calibration, "off") == 0) {
        for (size_t i = 0; i < layers.size(); ++i) {
            budgets[i].sensitivity = prior_sensitivity(layers.size() > 1 ? double(i) / double(layers.size() - 1) : 0);
        }
        return budgets;
    }
    const calibration found = read_calibration(config.calibration);
    const std::string own = config.no_alloc ? found.fingerprint : fingerprint(config.model); // a trial without memory has no weights to name
    if (found.fingerprint != own) {
        invalid(format("calibration=%s was made for another model (%s, this one is %s): run asrkf calibrate on this model", config.calibration,
                found.fingerprint.c_str(), own.c_str()));
    }
    if (found.sensitivities.size() != layers.size()) {
        invalid(format("calibration=%s has %zu layers, the model has %zu", config.calibration, found.sensitivities.size(), layers.size()));
    }
    for (size_t i = 0; i < layers.size(); ++i) {
        budgets[i].sensitivity = found.sensitivities[i];
    }
    measured_scorers = found.score_layers;
    return budgets;
}

// As asked for, as measured, or by depth.
std::vector<uint32_t> choose_scoring_layers(const settings & config, const std::vector<layer_budget> & layers, const std::vector<uint32_t> & measured) {
    std::vector<uint32_t> chosen = measured;
    if (chosen.empty()) {
        for (const uint32_t i : default_scoring_layers(uint32_t(layers.size()))) {
            chosen.push_back(layers[i].il);
        }
    }
    const char * source = "calibration", * text = config.calibration;
    if (std::strcmp(config.score_layers, "auto") != 0) {
        source = "score_layers", text = config.score_layers;
        chosen.clear();
        for (const auto & [from, to] : parse_layers(source, text)) {
            for (int32_t il = from; il <= to; ++il) {
                chosen.push_back(uint32_t(il));
            }
        }
    }
    for (const uint32_t il : chosen) {
        if (std::none_of(layers.begin(), layers.end(), [&](const layer_budget & l) { return l.il == il; })) {
            invalid(format("%s=%s: the model has %zu layers with a KV cache, and %u is none of them", source, text, layers.size(), il));
        }
    }
    std::sort(chosen.begin(), chosen.end());
    chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
    return chosen;
}

//
// pools
//

// Groups as the configuration names them, each with its pool.
std::vector<group_budget> named_groups(const settings & config, const std::vector<group_spec> & specs, const std::vector<layer_budget> & layers) {
    const auto has_kv = [&](uint32_t il) { return std::any_of(layers.begin(), layers.end(), [&](const layer_budget & l) { return l.il == il; }); };
    std::vector<group_budget> plans;
    std::vector<bool> taken(config.model.hparams.n_layer_all, false);
    const auto cannot_take = [&](int32_t il) -> const char * {
        if (il < int32_t(taken.size()) && taken[size_t(il)]) {
            return "is in two groups";
        }
        if (il < int32_t(taken.size()) && config.model.hparams.is_swa(uint32_t(il))) {
            return "has a sliding window, which it keeps: name the other layers only";
        }
        return has_kv(uint32_t(il)) ? nullptr : "has no KV cache in this model";
    };
    for (const group_spec & spec : specs) {
        plans.emplace_back();
        for (const auto & [from, to] : spec.layers) {
            for (int32_t il = from; il <= to; ++il) {
                if (const char * reason = cannot_take(il)) {
                    invalid(format("layers=%s: layer %d %s", config.layers, il, reason));
                }
                taken[size_t(il)] = true;
                plans.back().layers.push_back(uint32_t(il));
            }
        }
        asrkf_config own = config;
        own.pool_cells = spec.pool_cells;
        plans.back().pool_cells = resolve_pool(own, config.n_ctx);
    }
    for (const layer_budget & l : layers) {
        if (!taken[l.il]) {
            invalid(format("layers=%s: layer %u is in no group", config.layers, l.il));
        }
    }
    return plans;
}

std::vector<group_budget> split_pools(const settings & config, const std::vector<layer_budget> & layers) {
    if (const auto specs = parse_groups(config.layers); !specs.empty()) {
        return named_groups(config, specs, layers);
    }
    const uint32_t mean_cells = resolve_pool(config, config.n_ctx);
    const std::string mode = config.layers;
    const policy_params rule = make_policy_params(config, 1);
    if (mode == "each" && (rule.cuts || (rule.freezes_with_room() && mean_cells >= config.n_ctx))) {
        std::vector<group_budget> own; // of equal pools, also where each holds everything: which layer needs more, a prompt will show
        for (const layer_budget & l : layers) {
            own.push_back({ { l.il }, mean_cells });
        }
        return own;
    }
    if (mode == "shared" || mean_cells >= config.n_ctx || layers.size() == 1) {
        group_budget one = { {}, mean_cells };
        for (const layer_budget & l : layers) {
            one.layers.push_back(l.il);
        }
        return { one };
    }
    // no layer gets less than an eighth of the mean: what is pinned later must fit into each, and a guessed or measured sensitivity may mislead
    const uint32_t least = std::max(least_pool(config), mean_cells / 8 / POOL_PAD_CELLS * POOL_PAD_CELLS);
    if (mode == "two") {
        return split_two(layers, mean_cells, least, config.n_ctx);
    }
    const uint32_t exact_cells = resolve_pool(config, config.n_ctx, has_mean_pool(config)); // too few for whole units that are enough: rounded up
    return split_each(layers, exact_cells < padded(least) ? mean_cells : exact_cells, least, config.n_ctx, rule.ranks_by_layer());
}

//
// groups
//

group make_group(const settings & config, const asrkf_config & rules, std::vector<uint32_t> layers, uint32_t pool_cells) {
    group g;
    g.layers     = std::move(layers);
    g.pool_cells = pool_cells;
    g.rules.assign(config.n_seq_max, policy(make_policy_params(rules, config.unified ? pool_cells : pool_cells / config.n_seq_max)));
    g.n_sealed.assign(config.n_seq_max, 0);
    return g;
}

// Each stream's cells are a pool of their own, of whole units.
uint32_t in_streams(const settings & config, uint32_t pool_cells) {
    const uint32_t each = pool_cells / config.n_seq_max / POOL_PAD_CELLS * POOL_PAD_CELLS;
    if (each == 0) {
        throw error(ASRKF_POOL_FULL, format("pool of %u cells has less than %u for each of %u sequences: raise kv_pool to at least %u, or share one pool (kv_unified, -kvu)",
                pool_cells, POOL_PAD_CELLS, config.n_seq_max, config.n_seq_max*POOL_PAD_CELLS));
    }
    return each*config.n_seq_max;
}

// Layers with a sliding window see their window only: they are a group that keeps it, whatever the policy. Other tokens are
// frozen there as well, so that a sequence can be cut back, shifted and saved as a whole.
group make_windowed_group(const settings & config, const std::vector<group> & others, const std::vector<uint32_t> & layers) {
    if (state_kind(config.state) == STATE_UPSTREAM) {
        unsupported("state=upstream: a model with sliding windows keeps two caches there, one of which forgets; use state=own");
    }
    const uint32_t n_window = config.model.hparams.n_swa + config.n_ubatch; // ends behind a step, and is that of the step's first token, too
    const uint32_t share    = n_window + 2*config.block;
    asrkf_config rules = config;
    rules.policy = ASRKF_POLICY_WINDOW;
    rules.score  = SCORE_RECENCY;
    rules.sinks  = 0;
    rules.window = n_window;
    rules.timer_share = 0;
    const bool keeps_all = std::all_of(others.begin(), others.end(), [&](const group & g) { return g.pool_cells >= config.n_ctx; });
    const uint32_t all   = padded(config.n_ctx_seq), each = keeps_all ? all : std::min(all, padded(share));
    group g = make_group(config, rules, layers, config.unified ? std::min(all, config.n_seq_max*each) : config.n_seq_max*each);
    g.keeps_window = true;
    for (policy & rule : g.rules) {
        rule.params.heeds_pins = false;
    }
    return g;
}

} // namespace

bool has_mean_pool(const settings & config) {
    return config.unified && std::strcmp(config.layers, "each") == 0 && !make_policy_params(config, 1).cuts;
}

uint32_t least_pool(const settings & config) {
    const uint32_t least_share = uint32_t(policy::least_cells(make_policy_params(config, 1), config.n_ubatch, pinned_at_creation(config)));
    return config.n_seq_max*(config.unified ? least_share : std::max(least_share, POOL_PAD_CELLS));
}

layout make_layout(const settings & config, const llama_memory_params & params) {
    const cached_layers cached = layers_with_cache(config, params);
    std::vector<uint32_t> measured_scorers;
    const std::vector<layer_budget> layers = budgets_of(config, params, cached.plain, measured_scorers);
    const std::vector<group_budget> plans = split_pools(config, layers);
    layout made;
    const bool freezes = make_policy_params(config, 1).cuts || std::any_of(plans.begin(), plans.end(), [&](const group_budget & g) { return g.pool_cells < config.n_ctx; });
    if (make_policy_params(config, 1).wants_scores()) {
        made.scoring_layers = choose_scoring_layers(config, layers, measured_scorers);
    }
    if (!freezes) { // nothing to choose by scores
        made.scoring_layers.clear();
    }
    for (const group_budget & plan : plans) {
        made.groups.push_back(make_group(config, config, plan.layers, config.unified ? plan.pool_cells : in_streams(config, plan.pool_cells)));
    }
    if (!cached.windowed.empty()) {
        made.groups.push_back(make_windowed_group(config, made.groups, cached.windowed));
    }
    made.group_of_layer.assign(config.model.hparams.n_layer_all, 0);
    for (size_t ig = 0; ig < made.groups.size(); ++ig) {
        for (const uint32_t il : made.groups[ig].layers) {
            made.group_of_layer[il] = uint32_t(ig);
        }
    }
    return made;
}

ggml_backend_buffer_type_t allocate(layer_groups & groups, const settings & config, const llama_memory_params & params, host_budget & budget) {
    const auto & hparams = config.model.hparams;
    std::vector<std::vector<ggml_tensor *>> tensors;
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        group & g = groups[ig];
        const auto filter = [&](int32_t il) { return groups.of_layer(uint32_t(il)) == ig; };
        const std::string tag = groups.size() == 1 ? "" : "g" + std::to_string(ig) + "_";
        g.cache = std::make_unique<group_cache>(config.model, hparams, params.type_k, params.type_v, /*v_trans*/ false, config.cparams.offload_kqv,
                config.unified, config.unified ? g.pool_cells : groups.floor_cells(g), config.n_seq_max, /*n_pad*/ 1, g.keeps_window ? hparams.n_swa : 0,
                g.keeps_window ? hparams.swa_type : LLAMA_SWA_TYPE_NONE, nullptr, filter, nullptr, nullptr, tag.c_str());
        tensors.push_back(g.cache->row_tensors());
        for (const ggml_tensor * tensor : tensors.back()) {
            g.token_bytes += ggml_row_size(tensor->type, tensor->ne[0]);
        }
        LLAMA_LOG_INFO("asrkf: policy %s, group %zu: %zu layers, pool of %u cells for n_ctx %u, %u sequences, window %u, steps of at most %u tokens\n",
                g.keeps_window ? "of sliding windows" : policy_name(config.policy), ig, g.layers.size(), g.pool_cells, config.n_ctx, config.n_seq_max, g.rules[0].window(),
                g.rules[0].max_ubatch());
    }
    ggml_backend_buffer_type_t buft = ggml_backend_cpu_buffer_type();
    if (config.no_alloc) {
        return buft;
    }
    groups.mover = std::make_unique<row_mover>(tensors, moves_kind(config.moves), budget);
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        group & g = groups[ig];
        g.is_staged   = groups.mover->is_staged(ig);
        ggml_backend_dev_t dev = g.is_staged ? config.model.dev_layer(int(g.layers[0])) : nullptr;
        ggml_backend_buffer_type_t pinned = dev ? ggml_backend_dev_host_buffer_type(dev) : nullptr;
        buft = pinned ? pinned : ggml_backend_cpu_buffer_type();
        g.store = std::make_unique<host_store>(g.token_bytes, buft, budget, groups.mover.get());
    }
    return buft;
}

} // namespace asrkf
