// How large a pool of bytes is, and of which types: what is free, what was given, and what a trial without memory says.
#include "tiny.h"

#include <string>

namespace {

constexpr uint32_t N_CTX = 32768; // 1 KiB a token in F16: 32 MiB
constexpr uint64_t MIB = 1 << 20;

std::string choice_of(llama_context * ctx) {
    char text[4096] = "";
    CHECK(asrkf_get_pool_choice(ctx, text, sizeof(text)) == ASRKF_OK);
    return text;
}

bool has(const std::string & text, const std::string & part) {
    const bool found = text.find(part) != std::string::npos;
    if (!found) {
        std::printf("expected \"%s\" in \"%s\"\n", part.c_str(), text.c_str());
    }
    return found;
}

struct seen {
    asrkf_stats stats = {};
    std::string choice, error;
};

// What a context of this policy has; stats.pool_cells == 0 and the error if it is refused.
seen look(const std::string & policy, llama_model * model = nullptr, uint32_t n_ctx = N_CTX) {
    seen found;
    CHECK(next_policy(policy.c_str()));
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = n_ctx;
    params.n_batch         = params.n_ubatch = 512;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    llama_context * ctx = llama_init_from_model(model ? model : load_model(), params);
    asrkf_next_context(nullptr); // a trial leaves it
    if (!ctx) {
        found.error = asrkf_last_error();
        return found;
    }
    found.stats  = stats_of(ctx);
    found.choice = choice_of(ctx);
    llama_free(ctx);
    return found;
}

std::string limit(double mib) { return "asrkf,device_limit=" + std::to_string(uint64_t(mib*MIB)); }

// The model as llama.cpp's programs load it to fit their parameters: sizes, no weights.
llama_model * load_trial() {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    params.no_alloc     = true;
    params.load_mode    = LLAMA_LOAD_MODE_NONE;
    return llama_model_load_from_file(std::getenv("ASRKF_TEST_MODEL"), params);
}

} // namespace

TEST(all_fits, "where memory is no limit the pool holds all tokens, and there is no index, no scoring and no extra split") {
    llama_context * ctx = make_context("asrkf", 2048, 512);
    CHECK(ctx != nullptr);
    CHECK(has(choice_of(ctx), "all 2048 cells in f16, nothing will be frozen"));
    for (int i = 0; i < 3; ++i) {
        CHECK(decode(ctx, std::vector<llama_token>(512, i)) == 0);
    }
    for (int i = 0; i < 500; ++i) {
        CHECK(decode(ctx, { i % 250 }) == 0);
    }
    const asrkf_stats s = stats_of(ctx);
    CHECK(s.pool_cells == 2048 && s.frozen_cells == 0 && s.freezes_total == 0 && s.tokens == 3*512 + 500);
    CHECK(s.device_index_bytes == 0 && s.scoring_steps_total == 0 && s.host_kv_bytes == 0);
    CHECK(s.steps_total == 503);
    asrkf_config config = {};
    config.struct_size = sizeof(config);
    CHECK(asrkf_get_config(ctx, &config) == ASRKF_OK && config.pool_cells == 2048);
    llama_free(ctx);
}

TEST(limited, "a device with less room gets a smaller pool, whose bytes the backend confirms; more room never gives fewer cells") {
    uint32_t before = 0;
    for (double mib = 525; mib <= 600; mib += 5) {
        const seen found = look(limit(mib));
        if (found.stats.pool_cells == 0) {
            CHECK(before == 0 && has(found.error, "pool=auto: the smallest pool, ") && has(found.error, "missing"));
            continue;
        }
        const asrkf_stats & s = found.stats;
        CHECK(s.pool_cells >= before && s.pool_cells <= N_CTX && s.type_k == GGML_TYPE_F16);
        CHECK(s.device_kv_bytes + s.device_index_bytes + s.device_compute_bytes + 512*MIB <= uint64_t(mib*MIB));
        CHECK(s.pool_cells == N_CTX || (has(found.choice, "-ctk q8_0 -ctv q8_0") && has(found.choice, "(estimate)")));
        before = s.pool_cells;
    }
    CHECK(before == N_CTX);
}

TEST(trial, "a trial before the weights are loaded chooses what the context after it chooses") {
    llama_model * trial = load_trial();
    CHECK(trial != nullptr);
    uint32_t n_pools = 0;
    for (double mib = 530; mib <= 600; mib += 10) {
        for (const char * types : { "", ",types=auto" }) {
            const seen real = look(limit(mib) + types), tried = look(limit(mib) + types, trial);
            CHECK(real.stats.pool_cells == tried.stats.pool_cells && real.stats.type_k == tried.stats.type_k);
            n_pools += real.stats.pool_cells > 0 && real.stats.pool_cells < N_CTX;
        }
    }
    CHECK(n_pools > 2);
    const seen real = look("asrkf"), tried = look("asrkf", trial); // by what is free
    CHECK(real.stats.pool_cells == N_CTX && tried.stats.pool_cells == N_CTX);
    llama_model_free(trial);
}

TEST(types_by_bytes, "bytes buy all tokens in F16, else all in Q8_0, else a pool in Q8_0; types that are given stay") {
    const struct { const char * policy; ggml_type type; bool all; } cases[] = {
        { "asrkf,types=auto", GGML_TYPE_F16, true }, { "asrkf,types=auto,pool=100%", GGML_TYPE_F16, true },
        { "asrkf,types=auto,pool=32MiB", GGML_TYPE_F16, true }, { "asrkf,types=auto,pool=60%", GGML_TYPE_Q8_0, true },
        { "quality,types=auto", GGML_TYPE_Q8_0, false }, { "default,types=auto", GGML_TYPE_Q8_0, false },
        { "default", GGML_TYPE_F16, false }, { "asrkf,pool=20MiB", GGML_TYPE_F16, false },
    };
    for (const auto & c : cases) {
        const seen found = look(c.policy);
        CHECK(found.stats.type_k == c.type && found.stats.type_v == c.type);
        CHECK((found.stats.pool_cells == N_CTX) == c.all);
        CHECK((found.stats.device_index_bytes == 0) == c.all);
        CHECK(has(found.choice, c.type == GGML_TYPE_F16 ? "in f16" : "in q8_0"));
    }
    const seen f16 = look("default"), q8_0 = look("default,types=auto");
    CHECK(q8_0.stats.pool_cells > 3*f16.stats.pool_cells/2);
    CHECK(has(f16.choice, "(-ctk q8_0 -ctv q8_0) it would have " + std::to_string(q8_0.stats.pool_cells)));
    for (const seen & s : { f16, q8_0 }) { // a bound, nearly reached: a group's budget is of units, an eighth of the pool for one of two layers
        const double third = 0.333*32*MIB, taken = double(s.stats.device_kv_bytes + s.stats.device_index_bytes);
        CHECK(taken <= third && taken > 0.875*third);
    }
}

TEST(too_few_bytes, "bytes that hold no pool are refused with the bytes that would do") {
    const seen found = look("asrkf,pool=100000B");
    CHECK(found.stats.pool_cells == 0 && has(found.error, "raise kv_pool to at least "));
    const std::string least = found.error.substr(found.error.find("at least ") + 9);
    const std::string bytes = least.substr(0, least.find(' '));
    CHECK(look("asrkf,pool=" + bytes + "B").stats.pool_cells > 0);
    CHECK(look("asrkf,pool=" + std::to_string(std::stoull(bytes) - 1) + "B").stats.pool_cells == 0);
}

TEST(no_choice, "a pool in cells has nothing to say, and upstream's cache no choice") {
    CHECK(look("asrkf,pool=2048").choice.empty());
    llama_context * plain = make_context(nullptr, 2048, 512);
    char text[8];
    CHECK(asrkf_get_pool_choice(plain, text, sizeof(text)) == ASRKF_NO_POLICY);
    CHECK(stats_of(plain).type_k == GGML_TYPE_F16);
    llama_free(plain);
}

int main() { return run_all_tests(); }
