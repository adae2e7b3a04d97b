// What an output row says of the next token: of contexts with a policy and without, and where a backend sampler takes it.
#include "tiny.h"

#include "llama/outputs.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

struct context_holder {
    explicit context_holder(const char * policy) : ctx(make_context(policy, 512, 64)) { CHECK(ctx != nullptr); }
    ~context_holder() { llama_free(ctx); }
    llama_context * ctx;
};

asrkf_output output_of(llama_context * ctx, int32_t i, asrkf_status expected = ASRKF_OK) {
    asrkf_output out = { sizeof(asrkf_output), -1, -1, -1 };
    CHECK(asrkf_output_entropy(ctx, i, &out) == expected);
    return out;
}

size_t vocabulary() { return size_t(llama_vocab_n_tokens(llama_model_get_vocab(load_model()))); }

// In plain double.
asrkf_output expected_of(const float * logits) {
    double top = -INFINITY, sum = 0, entropy = 0;
    for (size_t i = 0; i < vocabulary(); ++i) { top = std::max(top, double(logits[i])); }
    for (size_t i = 0; i < vocabulary(); ++i) { sum += std::exp(double(logits[i]) - top); }
    for (size_t i = 0; i < vocabulary(); ++i) {
        const double p = std::exp(double(logits[i]) - top) / sum;
        entropy -= p > 0 ? p*std::log(p) : 0;
    }
    return { sizeof(asrkf_output), top + std::log(sum), entropy, 1 / sum };
}

bool is_near(const asrkf_output & a, const asrkf_output & b) {
    return std::fabs(a.log_sum_exp - b.log_sum_exp) < 1e-5 && std::fabs(a.entropy - b.entropy) < 1e-5 && std::fabs(a.top_probability - b.top_probability) < 1e-6;
}

// Of random weights the outputs are surer than any text would make them, but for a model whose norms hardly scale.
llama_model * unsure_model() {
    llama_model_kv_override overrides[2] = {};
    std::strcpy(overrides[0].key, "llama.attention.layer_norm_rms_epsilon");
    overrides[0].tag     = LLAMA_KV_OVERRIDE_TYPE_FLOAT;
    overrides[0].val_f64 = 1000;
    llama_model_params params = llama_model_default_params();
    params.kv_overrides = overrides;
    return llama_model_load_from_file(std::getenv("ASRKF_TEST_MODEL"), params);
}

// Eight tokens, the third and the last of which are outputs.
void decode_rows(llama_context * ctx) {
    llama_batch batch = llama_batch_init(8, 0, 1);
    for (int32_t i = 0; i < 8; ++i) {
        batch.token[i] = 3 + i;
        batch.pos[i]   = i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = i == 2 || i == 7;
    }
    batch.n_tokens = 8;
    CHECK(llama_decode(ctx, batch) == 0);
    llama_batch_free(batch);
    for (const int32_t row : { 2, 7 }) { // surer than any text: see unsure_model()
        float * logits = llama_get_logits_ith(ctx, row);
        std::transform(logits, logits + vocabulary(), logits, [](float x) { return 0.03f*x; });
    }
}

} // namespace

TEST(rows, "each output row has the figures of its logits, counted as llama.h counts them, with a policy and without") {
    for (const char * policy : { "asrkf,pool=256", static_cast<const char *>(nullptr) }) {
        const context_holder held(policy);
        decode_rows(held.ctx);
        for (const int32_t i : { 2, 7, -1, -2 }) {
            CHECK(is_near(output_of(held.ctx, i), expected_of(llama_get_logits_ith(held.ctx, i))));
        }
        CHECK(!is_near(output_of(held.ctx, 2), output_of(held.ctx, 7)));
        CHECK(is_near(output_of(held.ctx, 2), output_of(held.ctx, -2)));
    }
}

TEST(no_row, "a row that is none is refused by its number, and the result stays as it was") {
    const context_holder held("asrkf,pool=256");
    asrkf_output out = output_of(held.ctx, 0, ASRKF_INVALID_ARGUMENT); // nothing was decoded
    CHECK(out.entropy == -1 && out.log_sum_exp == -1 && out.top_probability == -1);
    decode_rows(held.ctx);
    for (const int32_t i : { 0, 1, 8, 100000, -3, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max() }) {
        CHECK(output_of(held.ctx, i, ASRKF_INVALID_ARGUMENT).entropy == -1);
        CHECK(std::strstr(asrkf_last_error(), ("row " + std::to_string(i)).c_str()) != nullptr);
    }
    CHECK(asrkf_output_entropy(held.ctx, 7, nullptr) == ASRKF_INVALID_ARGUMENT);
    CHECK(asrkf_output_entropy(nullptr, 7, &out) == ASRKF_INVALID_ARGUMENT);
    out.struct_size--;
    CHECK(asrkf_output_entropy(held.ctx, 7, &out) == ASRKF_INVALID_ARGUMENT);
}

TEST(odd_logits, "a token that cannot be counts as such, and a NaN is told with the token that has it") {
    const context_holder held("asrkf,pool=256");
    decode_rows(held.ctx);
    float * logits = llama_get_logits_ith(held.ctx, 7);
    for (size_t i = 0; i < vocabulary(); i += 3) {
        logits[i] = -INF;
    }
    CHECK(is_near(output_of(held.ctx, 7), expected_of(logits)));
    logits[11] = NAN;
    CHECK(output_of(held.ctx, 7, ASRKF_INTERNAL).entropy == -1);
    CHECK(std::strstr(asrkf_last_error(), "NaN, at token 11") != nullptr);
    CHECK(output_of(held.ctx, 2).entropy > 0); // the other row is as it was
    for (size_t i = 0; i < vocabulary(); ++i) {
        logits[i] = i == 5 ? 40.0f : -INF;
    }
    const asrkf_output certain = output_of(held.ctx, 7);
    CHECK(certain.entropy == 0 && certain.top_probability == 1 && certain.log_sum_exp == 40);
    logits[5] = -INF;
    const asrkf_output none = output_of(held.ctx, 7);
    CHECK(none.entropy == 0 && none.top_probability == 0 && none.log_sum_exp == double(-INF));
}

namespace {

// A context of unsure_model(), whose tokens a backend sampler may draw.
struct unsure_context {
    unsure_context(const char * policy, bool samples_on_device) {
        CHECK(model && next_policy(policy));
        llama_context_params params = llama_context_default_params();
        params.n_ctx   = 512;
        params.n_batch = params.n_ubatch = 64;
        params.n_threads       = params.n_threads_batch = 1;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        ctx = llama_init_from_model(model, params);
        CHECK(ctx != nullptr);
        llama_sampler_chain_add(chain, llama_sampler_init_greedy());
        CHECK(!samples_on_device || llama_set_sampler(ctx, 0, chain));
    }
    ~unsure_context() {
        CHECK(llama_set_sampler(ctx, 0, nullptr));
        llama_sampler_free(chain);
        llama_free(ctx);
        llama_model_free(model);
    }

    llama_model *   model = unsure_model();
    llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    llama_context * ctx;
};

} // namespace

namespace {

// Every second figure: what recovery saw, and what the caller was told of the same output.
std::vector<float> entropies(const char * policy, bool on_device, int32_t row) {
    const unsure_context own(policy, on_device);
    std::vector<float> found;
    llama_token token = 3;
    for (int i = 0; i < 100; ++i) {
        CHECK(decode(own.ctx, { token, token + 1 }) == 0);
        if (i > 0) {
            found.push_back(stats_of(own.ctx).entropy);
        }
        const asrkf_output out = output_of(own.ctx, row);
        CHECK(out.log_sum_exp > 0 && out.top_probability > 0 && out.top_probability <= 1);
        found.push_back(float(out.entropy));
        token = (token + 7) % 200;
    }
    CHECK(stats_of(own.ctx).outputs_total == (std::strstr(policy, "recovery") ? 99 : 0));
    return found;
}

} // namespace

TEST(backend_sampler, "recovery and a caller read the same entropies where a backend sampler keeps the logits on the device") {
    const char * policy = "asrkf,pool=256,recovery=soft";
    const std::vector<float> expected = entropies(policy, false, -1);
    for (const int32_t row : { -1, 1 }) {
        const std::vector<float> found = entropies(policy, true, row);
        CHECK(found.size() == expected.size());
        size_t n_unsure = 0;
        for (size_t i = 0; i < found.size(); ++i) {
            CHECK(std::fabs(found[i] - expected[i]) < 1e-5f);
            n_unsure += found[i] > 1e-3f;
        }
        CHECK(n_unsure > found.size() / 2);
        for (size_t i = 1; i < found.size(); i += 2) {
            CHECK(found[i] == found[i - 1]); // recovery sees an output when the next tokens come
        }
    }
    CHECK(entropies("asrkf,pool=256", true, -1).back() == entropies(policy, true, -1).back()); // also without recovery
}

TEST(backend_sampler_refusals, "rows that were not outputs are refused as ever, and those of upstream's cache say what would serve") {
    const unsure_context own("asrkf,pool=256", true), upstream("full", true);
    for (llama_context * ctx : { own.ctx, upstream.ctx }) {
        CHECK(decode(ctx, { 3, 4 }) == 0);
        for (const int32_t row : { 0, 2, -2 }) {
            output_of(ctx, row, ASRKF_INVALID_ARGUMENT);
        }
    }
    output_of(own.ctx, 1);
    output_of(upstream.ctx, 1, ASRKF_UNSUPPORTED);
    CHECK(std::strstr(asrkf_last_error(), "set a kv_policy") != nullptr);
}

TEST(lost_row, "a row that could not be read is none: the step is good, and the next row comes") {
    const unsure_context own("asrkf,pool=256,recovery=soft", true);
    CHECK(decode(own.ctx, { 3, 4 }) == 0);
    asrkf_clear_error();
    asrkf::fail_output_in = 1;
    CHECK(decode(own.ctx, { 5, 6 }) == 0);
    CHECK(asrkf::fail_output_in == 0 && std::strstr(asrkf_last_error(), "a test asked for") != nullptr);
    output_of(own.ctx, -1, ASRKF_INTERNAL);
    CHECK(std::strstr(asrkf_last_error(), "could not be read") != nullptr);
    CHECK(decode(own.ctx, { 7, 8 }) == 0);
    CHECK(stats_of(own.ctx).outputs_total == 1);
    output_of(own.ctx, -1);
    CHECK(decode(own.ctx, { 9 }) == 0 && stats_of(own.ctx).outputs_total == 2);
}

TEST(looks, "entropy may start a second look; with a backend sampler, which would draw twice, there is none") {
    for (const bool on_device : { false, true }) {
        const unsure_context own("asrkf,pool=256,recovery=second_look,look_share=0.25,look_trigger=entropy", on_device);
        llama_context * ctx = own.ctx;
        for (int i = 0; i < 400; ++i) {
            CHECK(decode(ctx, { llama_token(i*37 % 200) }) == 0);
        }
        const asrkf_stats s = stats_of(ctx);
        CHECK(s.frozen_cells > 100 && (on_device ? s.second_looks_total == 0 : s.second_looks_total > 10 && s.second_looks_total <= 100));
    }
}

int main() { return run_all_tests(); }
