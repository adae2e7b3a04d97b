// Contexts of tiny.gguf (tests/make_models.py), for tests that run a real graph, and what can be seen of them.
#pragma once

#include "check.h"

#include "asrkf.h"
#include "llama.h"

#include <cstddef>
#include <cstdlib>
#include <cstring>

inline llama_model * load_model() {
    static llama_model * model = [] {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        const char * path = std::getenv("ASRKF_TEST_MODEL");
        if (!path) {
            std::printf("ASRKF_TEST_MODEL is not set\n");
            std::exit(2);
        }
        llama_model_params params = llama_model_default_params();
        params.n_gpu_layers = 0;
        llama_model * loaded = llama_model_load_from_file(path, params);
        if (!loaded) {
            std::printf("%s cannot be loaded\n", path);
            std::exit(2);
        }
        return loaded;
    }();
    return model;
}

inline bool next_policy(const char * policy) {
    asrkf_config config;
    config.struct_size = sizeof(config);
    return asrkf_config_parse(policy, &config) == ASRKF_OK && asrkf_next_context(&config) == ASRKF_OK;
}

// One thread each, steps of at most n_batch tokens; policy NULL: whatever asrkf_next_context() was told. NULL if refused.
inline llama_context * make_context(const char * policy, uint32_t n_ctx, uint32_t n_batch) {
    if (policy && !next_policy(policy)) {
        return nullptr;
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = n_ctx;
    params.n_batch         = params.n_ubatch = n_batch;
    params.n_threads       = params.n_threads_batch = 1;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    return llama_init_from_model(load_model(), params);
}

inline int decode(llama_context * ctx, std::vector<llama_token> tokens) {
    return llama_decode(ctx, llama_batch_get_one(tokens.data(), int32_t(tokens.size())));
}

inline asrkf_stats stats_of(llama_context * ctx) {
    asrkf_stats s = {};
    s.struct_size = sizeof(s);
    CHECK(asrkf_get_stats(ctx, &s) == ASRKF_OK);
    return s;
}

inline asrkf_group_stats group_of(llama_context * ctx, uint32_t group) {
    asrkf_group_stats s = {};
    s.struct_size = sizeof(s);
    CHECK(asrkf_get_group_stats(ctx, group, &s) == ASRKF_OK);
    return s;
}

inline std::vector<uint8_t> states_of(llama_context * ctx, int32_t seq = 0, uint32_t group = 0) {
    size_t n = 0;
    CHECK(asrkf_get_tokens(ctx, seq, group, nullptr, nullptr, 0, &n) == ASRKF_OK);
    std::vector<uint8_t> states(n);
    CHECK(asrkf_get_tokens(ctx, seq, group, nullptr, states.data(), n, &n) == ASRKF_OK);
    return states;
}

// Of sequence 0.
inline asrkf_status get_tokens(llama_context * ctx, uint32_t group, int32_t * out_pos, uint8_t * out_state, size_t capacity, size_t * out_n) {
    return asrkf_get_tokens(ctx, 0, group, out_pos, out_state, capacity, out_n);
}
inline asrkf_status get_rows(llama_context * ctx, uint32_t group, int32_t pos, void * out, size_t size) {
    return asrkf_get_rows(ctx, 0, group, pos, out, size);
}

// Everything that can be seen of a context and that a refused call must leave as it was: its figures but for the seconds,
// its tokens with their states, and every stride-th row.
struct picture {
    picture(llama_context * ctx, uint32_t stride) {
        const asrkf_stats s = stats_of(ctx);
        add(&s, offsetof(asrkf_stats, entropy_deviation)); // up to there nothing is padding
        add(&s.entropy_deviation, sizeof(s.entropy_deviation));
        add(&s.steps_total, offsetof(asrkf_stats, policy_seconds) - offsetof(asrkf_stats, steps_total));
        for (uint32_t ig = 0; s.policy != ASRKF_POLICY_FULL && ig < s.n_groups; ++ig) {
            const asrkf_group_stats g = group_of(ctx, ig);
            add(&g, sizeof(g));
            std::vector<int32_t> pos(s.tokens);
            std::vector<uint8_t> state(s.tokens), row(g.token_bytes);
            size_t n = 0;
            CHECK(get_tokens(ctx, ig, pos.data(), state.data(), pos.size(), &n) == ASRKF_OK && n == s.tokens);
            add(pos.data(), pos.size()*sizeof(pos[0]));
            add(state.data(), state.size());
            for (size_t i = 0; i < pos.size(); i += stride) {
                CHECK(get_rows(ctx, ig, pos[i], row.data(), row.size()) == ASRKF_OK);
                add(row.data(), row.size());
            }
        }
    }
    bool operator==(const picture & other) const { return bytes == other.bytes; }

private:
    void add(const void * data, size_t n) {
        if (n > 0) {
            bytes.insert(bytes.end(), static_cast<const uint8_t *>(data), static_cast<const uint8_t *>(data) + n);
        }
    }
    std::vector<uint8_t> bytes;
};
