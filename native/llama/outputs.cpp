#include "llama/outputs.h"

#include "llama/engine.h"
#include "llama/refusal.h"
#include "policy/entropy.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>

namespace asrkf {

thread_local uint32_t fail_output_in = 0;

namespace {

class host_reader final : public output_reader {
public:
    explicit host_reader(uint32_t n_slots) : rows(n_slots) {}

    bool beats_host() const override { return false; }
    void read(ggml_backend_t backend, const ggml_tensor * logits, uint32_t row, uint32_t slot) override;
    asrkf_output of(uint32_t slot) override;

private:
    struct copy { ggml_backend_t backend = nullptr; std::vector<float> logits; };
    std::vector<copy> rows; // by slot; the context waits for its backends before it ends
};

void host_reader::read(ggml_backend_t backend, const ggml_tensor * logits, uint32_t row, uint32_t slot) {
    if (fail_output_in > 0 && --fail_output_in == 0) {
        throw error(ASRKF_INTERNAL, "a fault that a test asked for");
    }
    copy & c = rows[slot];
    c.backend = backend;
    c.logits.resize(size_t(logits->ne[0]));
    ggml_backend_tensor_get_async(backend, logits, c.logits.data(), row*logits->nb[1], c.logits.size()*sizeof(float));
}

asrkf_output host_reader::of(uint32_t slot) {
    const copy & c = rows[slot];
    ggml_backend_synchronize(c.backend);
    return entropy_of(c.logits.data(), c.logits.size());
}

} // namespace

std::unique_ptr<output_reader> make_host_reader(uint32_t n_slots) { return std::make_unique<host_reader>(n_slots); }

output_reader & output_rows::reader_of(ggml_backend_t backend) {
    ggml_backend_dev_t device = ggml_backend_get_device(backend);
    std::unique_ptr<output_reader> & reader = readers[device];
    if (!reader) {
        std::string why_not;
        reader = make_device_reader(device, uint32_t(rows.size()), why_not);
        if (!why_not.empty()) {
            LLAMA_LOG_WARN("asrkf: %s\n", why_not.c_str());
        }
    }
    if (!reader) {
        reader = make_host_reader(uint32_t(rows.size()));
    }
    return *reader;
}

void output_rows::fetch(llama_context & ctx, const llm_graph_result & res, const llama_ubatch & ubatch, bool is_read) {
    if (!res.t_logits) {
        return;
    }
    const auto is_sampled = [&](uint32_t at) {
        const auto is_taken = [&](const std::vector<ggml_tensor *> & by_row) { return at < by_row.size() && by_row[at]; };
        return is_taken(res.t_sampled) || is_taken(res.t_sampled_logits) || is_taken(res.t_sampled_probs);
    };
    std::map<uint32_t, uint32_t> last; // output row of a sequence
    for (uint32_t i = 0, at = 0; i < ubatch.n_tokens; at += ubatch.output[i++] != 0) {
        if (ubatch.output[i] && (is_read || is_sampled(at))) {
            last[uint32_t(ubatch.seq_id[i][0])] = at;
        }
    }
    ggml_backend_t backend = ggml_backend_sched_get_tensor_backend(ctx.get_sched(), res.t_logits);
    for (const auto & [seq, at] : last) {
        const bool sampled = is_sampled(at);
        rows[seq] = { sampled ? row::lost : row::none, nullptr };
        try {
            output_reader & reader = reader_of(backend);
            if (sampled || reader.beats_host()) {
                reader.read(backend, res.t_logits, at, seq);
                rows[seq] = { sampled ? row::sampled : row::plain, &reader };
            }
        } catch (const std::exception & e) {
            refuse(e);
        }
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
        asrkf_output output = { sizeof(asrkf_output), NAN, NAN, NAN };
        engine * with_policy = engine_of(ctx);
        if (!with_policy || !with_policy->get_sampled_output(i, output)) {
            unsupported(format("output row %d went to a backend sampler, which leaves no logits: %s, or sample on the CPU (llama_set_sampler() with NULL)", i,
                    with_policy ? "ask for the last row of a sequence, before its tokens are removed" : "set a kv_policy"));
        }
        if (std::isnan(output.entropy)) {
            throw error(ASRKF_INTERNAL, format("output row %d has a NaN: the model's weights or the device are at fault", i));
        }
        return output;
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
