// What a decode step costs on the host, whatever the device takes: processor seconds of llama_decode() for one token, with a
// device that computes nothing. For scripts/bench_decisions. Arguments: model, policy, tokens. Prints one line of figures.
//
// This program has ggml's functions that compute a graph, and the libraries call these: ggml's own are never reached. So what is
// left is what the processor does between two graphs: batches, decisions, moves, books, inputs.
#include "text_scores.h"

#include "asrkf.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>

namespace {

constexpr int32_t N_UBATCH = 512, N_FIRST = 64;

scores_of_a_text * scores = nullptr;
double device_seconds = 0; // what the pretended one took

double now() { return double(std::clock()) / CLOCKS_PER_SEC; } // of this process: others may run beside it

void fail(const char * what) {
    std::fprintf(stderr, "bench_steps: %s: %s\n", what, asrkf_last_error());
    std::exit(1);
}

// A scoring graph has three outputs: means, peaks, and what each head missed.
void give_scores(ggml_cgraph * graph) {
    const double begin = now();
    std::vector<ggml_tensor *> outputs;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        if (ggml_graph_node(graph, i)->flags & GGML_TENSOR_FLAG_OUTPUT) {
            outputs.push_back(ggml_graph_node(graph, i));
        }
    }
    if (outputs.size() == 3) {
        const uint32_t n = uint32_t(outputs[0]->ne[0]);
        scores->ask(std::min<uint32_t>(n, uint32_t(scores->mean.size())));
        std::copy_n(scores->mean.begin(), n, static_cast<float *>(outputs[0]->data));
        std::copy_n(scores->peak.begin(), n, static_cast<float *>(outputs[1]->data));
        std::fill_n(static_cast<float *>(outputs[2]->data), outputs[2]->ne[0], 0.0f);
    }
    device_seconds += now() - begin;
}

} // namespace

extern "C" {
ggml_status ggml_backend_sched_graph_compute_async(ggml_backend_sched_t, ggml_cgraph *) { return GGML_STATUS_SUCCESS; }
ggml_status ggml_backend_graph_compute_async(ggml_backend_t, ggml_cgraph * graph) {
    give_scores(graph);
    return GGML_STATUS_SUCCESS;
}
}

namespace {

llama_context * make_context(const char * model_path, const char * policy, uint32_t n_ctx) {
    llama_log_set([](ggml_log_level level, const char * text, void *) { if (level == GGML_LOG_LEVEL_ERROR) { std::fputs(text, stderr); } }, nullptr);
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = 0;
    llama_model * model = llama_model_load_from_file(model_path, model_params);
    asrkf_config config;
    config.struct_size = sizeof(config);
    if (!model || asrkf_config_parse(policy, &config) != ASRKF_OK || asrkf_next_context(&config) != ASRKF_OK) {
        fail("model or policy");
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = n_ctx;
    params.n_batch         = params.n_ubatch = N_UBATCH;
    params.n_threads       = params.n_threads_batch = 1;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        fail("context");
    }
    return ctx;
}

void decode(llama_context * ctx, int32_t n) {
    static std::vector<llama_token> tokens(N_UBATCH, 1);
    if (llama_decode(ctx, llama_batch_get_one(tokens.data(), n)) != 0) {
        fail("llama_decode");
    }
}

asrkf_stats stats_of(llama_context * ctx) {
    asrkf_stats s = {};
    s.struct_size = sizeof(s);
    asrkf_get_stats(ctx, &s);
    return s;
}

} // namespace

int main(int argc, char ** argv) {
    if (argc != 4) {
        std::printf("bench_steps MODEL POLICY TOKENS\n");
        return 2;
    }
    const int32_t n_tokens = std::atoi(argv[3]), n_steps = n_tokens > 300000 ? 64 : 256;
    const uint32_t n_ctx = uint32_t(n_tokens + 255) / 256*256;
    scores_of_a_text text(n_ctx);
    scores = &text;
    llama_context * ctx = make_context(argv[1], argv[2], n_ctx);
    for (int32_t n_left = n_tokens - n_steps - N_FIRST; n_left > 0; n_left -= N_UBATCH) {
        decode(ctx, std::min(n_left, N_UBATCH));
    }
    for (int32_t i = 0; i < N_FIRST; ++i) {
        decode(ctx, 1);
    }
    const asrkf_stats before = stats_of(ctx);
    device_seconds = 0;
    const double begin = now();
    for (int32_t i = 0; i < n_steps; ++i) {
        decode(ctx, 1);
    }
    const double seconds = now() - begin - device_seconds;
    const asrkf_stats after = stats_of(ctx);
    const double n_decisions = double(after.decisions_total - before.decisions_total);
    const auto restores = [](const asrkf_stats & s) { return double(s.restores_recall_total + s.restores_refill_total + s.restores_window_total); };
    std::printf("%.0f,%.3f,%.3f,%.3e,%.3e,,%.3e,%.3e\n", n_decisions, double(after.freezes_total - before.freezes_total) / n_decisions,
            (restores(after) - restores(before)) / n_decisions, (after.scoring_seconds - before.scoring_seconds) / n_steps,
            (after.policy_seconds - before.policy_seconds) / n_steps, (after.moves_seconds - before.moves_seconds) / n_steps, seconds / n_steps);
    return 0;
}
