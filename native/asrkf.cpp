// C boundary: check, catch, status, last error.
#include "asrkf.h"

#include "llama/engine.h"
#include "policy/budgets.h"
#include "policy/config.h"
#include "policy/entropy.h"

#include <algorithm>
#include <cstring>

#ifndef ASRKF_VERSION
#    define ASRKF_VERSION "0.1.0"
#endif

using namespace asrkf;

namespace {

template <typename Body> asrkf_status guarded(Body body) {
    try {
        body();
        return ASRKF_OK;
    } catch (const error & e) {
        set_last_error(e.what(), e.status);
        return e.status;
    } catch (const std::exception & e) {
        set_last_error(text_of(e), ASRKF_INTERNAL);
    } catch (...) {
        set_last_error("unknown failure", ASRKF_INTERNAL);
    }
    return ASRKF_INTERNAL;
}

template <typename T> void need(const T * pointer, const char * name) {
    if (!pointer) {
        throw error(ASRKF_INVALID_ARGUMENT, format("%s is NULL", name));
    }
}

// A struct of the caller: not NULL, and of the size that this library was built with.
template <typename T> void need_struct(const T * pointer, const char * name) {
    need(pointer, name);
    if (pointer->struct_size != sizeof(T)) {
        throw error(ASRKF_INVALID_ARGUMENT, format("%s->struct_size is %u, this library's is %zu: set it to sizeof, and rebuild against this asrkf.h",
                name, pointer->struct_size, sizeof(T)));
    }
}

void copy_text(const std::string & text, char * out, size_t size) {
    if (text.size() >= size) {
        throw error(ASRKF_INVALID_ARGUMENT, format("out needs %zu bytes", text.size() + 1));
    }
    std::memcpy(out, text.c_str(), text.size() + 1);
}

engine & need_engine(llama_context * ctx) {
    need(ctx, "ctx");
    engine * found = engine_of(ctx);
    if (!found) {
        throw error(ASRKF_NO_POLICY, "this context runs upstream's KV cache: create it with a policy (asrkf_next_context, LLAMA_KV_POLICY or kv_policy)");
    }
    return *found;
}

} // namespace

extern "C" {

const char * asrkf_last_error(void) { return get_last_error(); }
enum asrkf_status asrkf_last_status(void) { return get_last_status(); }
void         asrkf_clear_error(void) { set_last_error("", ASRKF_OK); }
const char * asrkf_version(void) { return ASRKF_VERSION; }

const char * asrkf_status_name(enum asrkf_status status) {
    static const char * const names[] = { "ok", "invalid argument", "no policy", "protected", "pool full", "host limit", "unsupported", "move failed", "internal" };
    return status >= ASRKF_OK && status <= ASRKF_INTERNAL ? names[status] : "unknown";
}

enum asrkf_status asrkf_config_default(int32_t policy, struct asrkf_config * out) {
    return guarded([&] { need_struct(out, "out"); *out = config_default(policy); });
}

enum asrkf_status asrkf_config_parse(const char * text, struct asrkf_config * out) {
    return guarded([&] { need(text, "text"); need_struct(out, "out"); *out = config_parse(text); });
}

enum asrkf_status asrkf_config_format(const struct asrkf_config * config, char * out, size_t size) {
    return guarded([&] {
        need_struct(config, "config");
        need(out, "out");
        config_check(*config);
        copy_text(config_format(*config), out, size);
    });
}

enum asrkf_status asrkf_config_field(size_t i, struct asrkf_field * out) {
    return guarded([&] {
        need_struct(out, "out");
        if (i >= config_n_fields()) {
            throw error(ASRKF_INVALID_ARGUMENT, format("the table has %zu rows", config_n_fields()));
        }
        *out = config_field(i);
    });
}

enum asrkf_status asrkf_next_context(const struct asrkf_config * config) {
    return guarded([&] {
        if (config) {
            need_struct(config, "config");
            config_check(*config);
        }
        set_next_config(config);
    });
}

enum asrkf_status asrkf_freeze(struct llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1, uint64_t * out_tokens) {
    return guarded([&] {
        const uint64_t n = need_engine(ctx).freeze_range(ctx, seq_id, p0, p1);
        if (out_tokens) {
            *out_tokens = n;
        }
    });
}

enum asrkf_status asrkf_restore(struct llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1, uint64_t * out_tokens) {
    return guarded([&] {
        const uint64_t n = need_engine(ctx).restore_range(ctx, seq_id, p0, p1);
        if (out_tokens) {
            *out_tokens = n;
        }
    });
}

enum asrkf_status asrkf_pin(struct llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) {
    return guarded([&] { need_engine(ctx).pin_range(ctx, seq_id, p0, p1, true); });
}

enum asrkf_status asrkf_unpin(struct llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) {
    return guarded([&] { need_engine(ctx).pin_range(ctx, seq_id, p0, p1, false); });
}

enum asrkf_status asrkf_prompt_follows(struct llama_context * ctx, int32_t follows) {
    return guarded([&] { need_engine(ctx).set_prompt_follows(follows != 0); });
}

enum asrkf_status asrkf_set_host_limit(struct llama_context * ctx, uint64_t limit_bytes) {
    return guarded([&] { need_engine(ctx).set_host_limit(limit_bytes); });
}

enum asrkf_status asrkf_model_fingerprint(const struct llama_model * model, char * out, size_t size) {
    return guarded([&] {
        need(model, "model");
        need(out, "out");
        copy_text(model_fingerprint(model), out, size);
    });
}

enum asrkf_status asrkf_default_score_layers(uint32_t n_layers, uint32_t * out, size_t capacity, size_t * out_n) {
    return guarded([&] {
        need(out, "out");
        need(out_n, "out_n");
        if (n_layers == 0) {
            throw error(ASRKF_INVALID_ARGUMENT, "n_layers is 0");
        }
        const std::vector<uint32_t> layers = default_scoring_layers(n_layers);
        std::copy_n(layers.begin(), std::min(capacity, layers.size()), out);
        *out_n = layers.size();
    });
}

enum asrkf_status asrkf_calibrate(struct llama_model * model, const int32_t * tokens, size_t n_tokens, int32_t n_threads, asrkf_progress progress, void * user,
        double * out_sensitivities, uint32_t * out_score_layers, size_t capacity, size_t * out_n_layers, size_t * out_n_score_layers) {
    return guarded([&] {
        need(model, "model");
        need(tokens, "tokens");
        need(out_sensitivities, "out_sensitivities");
        need(out_score_layers, "out_score_layers");
        need(out_n_layers, "out_n_layers");
        need(out_n_score_layers, "out_n_score_layers");
        const auto goes_on = [&](size_t done, size_t all) { return !progress || progress(user, done, all) == 0; };
        const measured_layers found = measure_layers(*model, std::vector<int32_t>(tokens, tokens + n_tokens), n_threads, goes_on);
        std::copy_n(found.sensitivities.begin(), std::min(capacity, found.sensitivities.size()), out_sensitivities);
        std::copy_n(found.score_layers.begin(), std::min(capacity, found.score_layers.size()), out_score_layers);
        *out_n_layers       = found.sensitivities.size();
        *out_n_score_layers = found.score_layers.size();
    });
}

static enum asrkf_status path_of(std::string (*file_of)(const llama_model *), const struct llama_model * model, char * out, size_t size) {
    return guarded([&] {
        need(model, "model");
        need(out, "out");
        const std::string file = file_of(model);
        if (file.size() >= size) {
            throw error(ASRKF_INVALID_ARGUMENT, format("%zu bytes are needed for the path, %zu are there", file.size() + 1, size));
        }
        std::memcpy(out, file.c_str(), file.size() + 1);
    });
}

enum asrkf_status asrkf_calibration_file(const struct llama_model * model, char * out, size_t size) { return path_of(model_calibration_file, model, out, size); }

enum asrkf_status asrkf_gates_file(const struct llama_model * model, char * out, size_t size) { return path_of(model_gates_file, model, out, size); }

enum asrkf_status asrkf_next_calibrator(asrkf_calibrator next, void * user) {
    return guarded([&] {
        set_next_calibrator(!next ? calibrator() : [next, user](llama_model & model) {
            char file[sizeof(asrkf_config::calibration)] = "";
            const int32_t answer = next(user, &model, file, sizeof(file));
            if (answer == 2) {
                throw error(ASRKF_INTERNAL, "the calibration was stopped");
            }
            return std::string(answer == 0 ? file : "");
        });
    });
}

enum asrkf_status asrkf_entropy(const float * logits, size_t n, double * out_entropy) {
    return guarded([&] { need(logits, "logits"); need(out_entropy, "out_entropy"); *out_entropy = entropy_of(logits, n).entropy; });
}

enum asrkf_status asrkf_output_entropy(struct llama_context * ctx, int32_t i, struct asrkf_output * out) {
    return guarded([&] { need_struct(out, "out"); need(ctx, "ctx"); *out = output_of(ctx, i); });
}

enum asrkf_status asrkf_get_config(struct llama_context * ctx, struct asrkf_config * out) {
    return guarded([&] { need_struct(out, "out"); *out = need_engine(ctx).get_config(); });
}

enum asrkf_status asrkf_get_pool_choice(struct llama_context * ctx, char * out, size_t size) {
    return guarded([&] { need(out, "out"); copy_text(need_engine(ctx).get_pool_choice(), out, size); });
}

enum asrkf_status asrkf_get_stats(struct llama_context * ctx, struct asrkf_stats * out) {
    return guarded([&] {
        need_struct(out, "out");
        need(ctx, "ctx");
        engine * found = engine_of(ctx);
        *out = found ? found->get_stats(ctx) : upstream_stats(ctx);
    });
}

enum asrkf_status asrkf_get_group_stats(struct llama_context * ctx, uint32_t group, struct asrkf_group_stats * out) {
    return guarded([&] { need_struct(out, "out"); *out = need_engine(ctx).get_group_stats(group); });
}

enum asrkf_status asrkf_get_device_memory(struct llama_context * ctx, size_t i, struct asrkf_device_memory * out) {
    return guarded([&] {
        need_struct(out, "out");
        need(ctx, "ctx");
        const auto rows = device_memory(ctx);
        if (i >= rows.size()) {
            throw error(ASRKF_INVALID_ARGUMENT, format("the context uses %zu devices", rows.size()));
        }
        *out = rows[i];
    });
}

enum asrkf_status asrkf_pretend_free(uint64_t bytes) {
    return guarded([&] { pretend_free(bytes); });
}

enum asrkf_status asrkf_get_tokens(struct llama_context * ctx, int32_t seq_id, uint32_t group, int32_t * out_pos, uint8_t * out_state, size_t capacity, size_t * out_n) {
    return guarded([&] { need(out_n, "out_n"); *out_n = need_engine(ctx).get_tokens(seq_id, group, out_pos, out_state, capacity); });
}

enum asrkf_status asrkf_get_pinned(struct llama_context * ctx, int32_t seq_id, int32_t * out, size_t capacity, size_t * out_n) {
    return guarded([&] {
        need(out_n, "out_n");
        if (capacity > 0) {
            need(out, "out");
        }
        const auto pinned = need_engine(ctx).get_pinned(seq_id);
        for (size_t i = 0; i < std::min(capacity, pinned.size()); ++i) {
            out[2*i]     = pinned[i].first;
            out[2*i + 1] = pinned[i].second;
        }
        *out_n = pinned.size();
    });
}

enum asrkf_status asrkf_get_rows(struct llama_context * ctx, int32_t seq_id, uint32_t group, int32_t pos, void * out, size_t size) {
    return guarded([&] { need(out, "out"); need_engine(ctx).get_rows(ctx, seq_id, group, pos, static_cast<uint8_t *>(out), size); });
}

enum asrkf_status asrkf_trace(struct llama_context * ctx, struct asrkf_step * buffer, size_t capacity) {
    return guarded([&] {
        if (buffer && capacity == 0) {
            throw error(ASRKF_INVALID_ARGUMENT, "capacity is 0");
        }
        need_engine(ctx).set_trace(buffer, capacity);
    });
}

enum asrkf_status asrkf_trace_count(struct llama_context * ctx, uint64_t * out_n) {
    return guarded([&] { need(out_n, "out_n"); *out_n = need_engine(ctx).get_trace_count(); });
}

} // extern "C"
