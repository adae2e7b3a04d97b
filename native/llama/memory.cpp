#include "llama/memory.h"

#include "llama/creation.h"
#include "llama/find_calibration.h"
#include "llama/pool_choice.h"
#include "llama/refusal.h"

#include "llama-context.h"
#include "llama-ext.h"

#include <cstdio>
#include <optional>

namespace asrkf {

namespace {

thread_local std::optional<asrkf_config> next_config;
thread_local bool own_context = false;

// What the next context is to have; nothing: upstream's cache.
std::optional<asrkf_config> take_config(bool is_trial) {
    std::optional<asrkf_config> config = next_config;
    if (!is_trial) {
        next_config.reset(); // consumed, whatever comes of it; a trial without memory only looks
    }
    if (!config) {
        const char * text = getenv("LLAMA_KV_POLICY");
        if (!text || !*text) {
            return std::nullopt;
        }
        config = config_parse(text);
    }
    return config->policy == ASRKF_POLICY_FULL ? std::nullopt : config;
}

// llama_memory_factory (patches/memory-factory.patch).
llama_memory_i * create(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    if (own_context) {
        return nullptr;
    }
    try {
        if (params.mem_other && dynamic_cast<memory *>(params.mem_other)) {
            unsupported("a draft that shares the cells of its target cannot be used while the target has a policy; use kv_policy=\"full\"");
        }
        if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
            return nullptr; // not the user's context: the head of a draft
        }
        std::optional<asrkf_config> config = take_config(model.hparams.no_alloc);
        if (!config) {
            return nullptr;
        }
        check_context(model, params, cparams);
        pool_choice chosen = choose_pool(settings(model, cparams, *config), params);
        // A pool that holds everything needs no calibration. Another is chosen again: the groups that a calibration makes differ.
        if (const std::string found = found_calibration(model, cparams, chosen.config); found != config->calibration) {
            std::snprintf(config->calibration, sizeof(config->calibration), "%s", found.c_str());
            chosen = choose_pool(settings(model, cparams, *config), params);
        }
        tell(chosen, model.hparams.no_alloc);
        return new memory(model, chosen.params, cparams, chosen.config, chosen.text);
    } catch (const std::exception & e) {
        const auto * known = dynamic_cast<const error *>(&e);
        set_last_error(text_of(e), known ? known->status : ASRKF_INTERNAL);
        throw;
    }
}

const bool registered = [] { llama_memory_factory_ext = create; return true; }();

} // namespace

memory::memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams, const asrkf_config & config,
        const std::string & choice)
    : config(model, cparams, config), choice(choice), laid_out(make_layout(this->config, params)), groups(this->config, std::move(laid_out.groups), laid_out.group_of_layer),
      tokens(this->config, groups, !laid_out.scoring_layers.empty()), moves(this->config, groups, tokens, counted, budget),
      scored(this->config, groups, tokens, moves, counted, laid_out.scoring_layers, prepare_groups(params), params.type_k),
      cuts(this->config, groups, tokens, moves, scored, counted, params.type_k), sequences(this->config, groups, tokens, moves, scored), shifted(this->config, groups, tokens, moves, scored, sequences),
      states(this->config, groups, tokens, scored, sequences), asked(groups, tokens, moves, scored, counted),
      placing(this->config, groups, tokens, moves, scored, cuts, counted, budget),
      seen(this->config, groups, tokens, scored, cuts, placing, counted, budget) {}

// Once groups and tokens stand, and before the scores, which need to know where they are read back to. Refuses before
// anything is allocated.
ggml_backend_buffer_type_t memory::prepare_groups(const llama_memory_params & params) {
    groups.check_pools(count_positions(tokens.sequences[0].pinned));
    budget.limit_bytes = config.host_limit;
    return allocate(groups, config, params, budget);
}

//
// decoding
//

llama_memory_context_ptr memory::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool /*embd_all*/) {
    try {
        return as_asked(std::make_unique<memory_context>(groups, placing, scored, cuts, placing.split(balloc, n_ubatch)), config.is_windowed);
    } catch (const std::exception & e) {
        refuse(e);
        return std::make_unique<llama_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }
}

llama_memory_context_ptr memory::init_full() { return as_asked(std::make_unique<memory_context>(groups, placing, scored, cuts), config.is_windowed); }

llama_memory_context_ptr memory::init_update(llama_context * ctx, bool /*optimize*/) {
    moves.set_context(ctx);
    if (!ctx->get_cparams().flash_attn) { // "auto" has been resolved by now
        placing.set_fault("flash attention resolved to off on this device: use a cache type that it supports, or kv_policy=\"full\"");
    }
    return std::make_unique<llama_kv_cache_context>(LLAMA_MEMORY_STATUS_NO_UPDATE);
}

//
// sequences
//

void memory::clear(bool data) {
    sequences.clear(data);
    placing.clear();
    scored.clear_missed();
    cuts.clear();
    counted.clear();
    budget.peak_bytes = budget.used_bytes;
}

bool memory::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    sequences.undo_step();
    sequences.remove(seq_id, p0, p1);
    return true;
}

void memory::seq_cp(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    if (src == dst) {
        return;
    }
    try {
        sequences.copy(src, dst, p0, p1);
    } catch (const std::exception & e) {
        fail(dst, format("sequence %d could not be copied to %d: %s", src, dst, text_of(e).c_str()));
    }
}

void memory::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos by) {
    if (by != 0) {
        shift(seq_id, p0, p1, "shifted", [&](llama_pos pos) { return pos + by; });
    }
}

void memory::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    if (d != 1) {
        shift(seq_id, p0, p1, "divided", [&](llama_pos pos) { return pos / d; });
    }
}

void memory::shift(llama_seq_id seq_id, llama_pos p0, llama_pos p1, const char * what, const std::function<llama_pos(llama_pos)> & moved) {
    try {
        shifted.move(tokens.named(seq_id), p0, p1, moved);
    } catch (const std::exception & e) {
        fail(seq_id, format("positions of sequence %d could not be %s: %s", seq_id, what, text_of(e).c_str()));
    }
}

void memory::fail(llama_seq_id seq_id, const std::string & text) {
    refuse(text);
    if (seq_id >= 0 && uint32_t(seq_id) < config.n_seq_max) { // another is refused by its number
        tokens.sequences[size_t(seq_id)].fault = text;
    }
}

//
// requests, figures
//

uint64_t memory::freeze_range(llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) {
    moves.set_context(ctx);
    return asked.freeze(seq_id, p0, p1);
}

uint64_t memory::restore_range(llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) {
    moves.set_context(ctx);
    return asked.restore(seq_id, p0, p1);
}

void memory::set_host_limit(uint64_t limit_bytes) {
    if (limit_bytes && limit_bytes < budget.used_bytes) {
        throw error(ASRKF_HOST_LIMIT, format("host_limit of %llu bytes: %llu are in use", (unsigned long long) limit_bytes, (unsigned long long) budget.used_bytes));
    }
    budget.limit_bytes = limit_bytes;
}

asrkf_config memory::get_config() const {
    asrkf_config now = config;
    now.host_limit = budget.limit_bytes;
    return now;
}

void memory::get_rows(llama_context * ctx, int32_t seq_id, uint32_t index, int32_t pos, uint8_t * out, size_t size) {
    const uint32_t id = seen.record_at(seq_id, index, pos, size);
    moves.set_context(ctx);
    moves.prepare();
    seen.rows(id, index, out);
}

//
// engine.h
//

std::string model_fingerprint(const llama_model * model) { return fingerprint(*model); }

std::string model_calibration_file(const llama_model * model) { return calibration_file(fingerprint(*model)); }

std::string model_gates_file(const llama_model * model) { return gates_file(fingerprint(*model)); }

engine * engine_of(llama_context * ctx) { return dynamic_cast<memory *>(llama_get_memory(ctx)); }

asrkf_stats upstream_stats(llama_context * ctx) {
    asrkf_stats s = {};
    s.struct_size = sizeof(s);
    s.policy      = ASRKF_POLICY_FULL;
    s.n_groups    = 1;
    s.pool_cells  = llama_n_ctx(ctx);
    s.missed_attention_ratio = s.missed_attention_worst_ratio = 0; // nothing is frozen
    std::snprintf(s.scoring_backend, sizeof(s.scoring_backend), "none");
    std::snprintf(s.ranking, sizeof(s.ranking), "none");
    s.kept_ratio  = -1;
    const auto * plain = dynamic_cast<llama_kv_cache *>(llama_get_memory(ctx));
    s.type_k      = plain ? plain->type_k() : -1;
    s.type_v      = plain ? plain->type_v() : -1;
    if (llama_memory_t mem = llama_get_memory(ctx)) {
        const llama_pos pos_max = mem->seq_pos_max(0);
        s.tokens       = pos_max < 0 ? 0 : uint64_t(pos_max - mem->seq_pos_min(0) + 1);
        s.active_cells = uint32_t(s.tokens);
    }
    for (const auto & [buft, data] : ctx->memory_breakdown()) {
        s.device_kv_bytes      += data.context;
        s.device_compute_bytes += data.context > 0 ? data.compute : 0;
    }
    return s;
}

void set_next_config(const asrkf_config * config) {
    if (config) {
        next_config = *config;
    } else {
        next_config.reset();
    }
}

void set_own_context(bool on) { own_context = on; }

} // namespace asrkf
