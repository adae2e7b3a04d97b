#include "llama/outputs.h"

#include "llama/engine.h"
#include "llama/refusal.h"
#include "policy/entropy.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>

namespace asrkf {

void sampled_rows::fetch(llama_context & ctx, const llm_graph_result & res, const llama_ubatch & ubatch) {
    for (uint32_t i = 0, row = 0; i < ubatch.n_tokens; row += ubatch.output[i++] != 0) {
        const auto is_sampled = [&](const std::vector<ggml_tensor *> & by_row) { return row < by_row.size() && by_row[row]; };
        if (!ubatch.output[i] || !(is_sampled(res.t_sampled) || is_sampled(res.t_sampled_logits) || is_sampled(res.t_sampled_probs))) {
            continue;
        }
        auto & kept = rows[size_t(ubatch.seq_id[i][0])];
        kept.logits.resize(size_t(res.t_logits->ne[0]));
        kept.fetched = true;
        ggml_backend_tensor_get_async(ggml_backend_sched_get_tensor_backend(ctx.get_sched(), res.t_logits), res.t_logits, kept.logits.data(),
                row*res.t_logits->nb[1], kept.logits.size()*sizeof(float));
    }
}

void sampled_rows::clear() {
    for (row & r : rows) {
        r.fetched = false;
    }
}

bool goes_to_sampler(const llm_graph_result & res) {
    const auto is_any = [](const std::vector<ggml_tensor *> & by_row) { return std::any_of(by_row.begin(), by_row.end(), [](const ggml_tensor * t) { return t; }); };
    return is_any(res.t_sampled) || is_any(res.t_sampled_logits) || is_any(res.t_sampled_probs);
}

double first_entropy(llama_context & ctx, const llm_graph_result & res) {
    std::vector<float> logits(size_t(res.t_logits->ne[0]));
    ggml_backend_sched_synchronize(ctx.get_sched());
    ggml_backend_tensor_get(res.t_logits, logits.data(), 0, logits.size()*sizeof(float));
    return entropy_of(logits.data(), logits.size()).entropy;
}

asrkf_output output_of(llama_context * ctx, int32_t i) {
    ctx->synchronize();
    const float * logits = ctx->get_logits_ith(i);
    if (!logits) {
        throw error(ASRKF_INVALID_ARGUMENT, format("the last llama_decode() has no output row %d: ask for its logits in the batch, and count as llama_get_logits_ith() does", i));
    }
    if (ctx->get_sampled_token_ith(i) != LLAMA_TOKEN_NULL || ctx->get_sampled_logits_ith(i) || ctx->get_sampled_probs_ith(i)) {
        unsupported(format("output row %d went to a backend sampler, which leaves no logits: sample on the CPU (llama_set_sampler() with NULL)", i));
    }
    const size_t n = ctx->get_model().vocab.n_tokens();
    const asrkf_output output = entropy_of(logits, n);
    if (std::isnan(output.entropy)) {
        size_t at = 0;
        while (at + 1 < n && !std::isnan(logits[at])) {
            at++;
        }
        throw error(ASRKF_INTERNAL, format("output row %d has a NaN, at token %zu: the model's weights or the device are at fault", i, at));
    }
    return output;
}

} // namespace asrkf
