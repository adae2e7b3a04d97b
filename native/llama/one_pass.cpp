#include "llama/one_pass.h"

#include "llama/engine.h"
#include "llama/refusal.h"
#include "policy/budgets.h"
#include "scoring/attention_loss.h"
#include "scoring/projection.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>

namespace asrkf {

namespace {

constexpr uint32_t STEP_TOKENS = 256; // whole blocks; what the first step reads has too little history to be measured
constexpr float    KEPT_RATIO  = 0.2f;

bool is_view(const ggml_tensor * t) {
    return t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_TRANSPOSE || t->op == GGML_OP_CONT;
}

bool is_norm(const ggml_tensor * t) { return t->op == GGML_OP_RMS_NORM || t->op == GGML_OP_NORM; }

float parameter(const ggml_tensor * t, size_t i) {
    float value;
    std::memcpy(&value, reinterpret_cast<const char *>(t->op_params) + i*sizeof(float), sizeof(float));
    return value;
}

// The residual stream that a layer's queries are made of: up from q to the matrix that makes it, and over the norm before
// that, if there is one.
ggml_tensor * input_of(const ggml_tensor * attention) {
    ggml_tensor * input = projected_input(attention->src[0]);
    ggml_tensor * up    = input;
    while (up && (is_view(up) || is_norm(up) || ((up->op == GGML_OP_MUL || up->op == GGML_OP_ADD) && is_weights(up->src[1])))) {
        if (is_norm(up)) {
            return up->src[0];
        }
        up = up->src[0];
    }
    return input;
}

// The layer in whose cache the keys of this attention lie, -1: in none.
int32_t layer_of(const ggml_tensor * attention) {
    const ggml_tensor * k = attention->src[1];
    while (k && k->view_src) {
        k = k->view_src;
    }
    const char * number = k ? std::strstr(k->name, "k_l") : nullptr;
    return number && std::strncmp(k->name, "cache_", 6) == 0 ? int32_t(std::atoi(number + 3)) : -1;
}

// What the graph says of one layer, learned while its first step is evaluated.
struct layer_facts {
    output_path         path;
    const ggml_tensor * at    = nullptr; // as far as the output has been followed; null: to its end
    const ggml_tensor * input = nullptr; // null once it has been seen to be used behind the attention, so that it was still there
};

class pass {
public:
    pass(llama_model & model, size_t n_tokens, const std::function<bool(size_t, size_t)> & progress) : model(model), n_tokens(n_tokens), progress(progress) {
        for (uint32_t il = 0; il < model.hparams.n_layer_all; ++il) {
            if (model.hparams.has_kv(il) && !model.hparams.is_swa(il)) {
                facts[il] = {};
            }
        }
    }
    void read(const std::vector<int32_t> & tokens, int32_t n_threads);
    layer_losses result() const;

private:
    static bool on_node(ggml_tensor * t, bool ask, void * self) { return static_cast<pass *>(self)->on_node(t, ask); }
    bool on_node(ggml_tensor * t, bool ask);
    void learn(const ggml_tensor * t);
    void follow(layer_facts & layer, const ggml_tensor * t);
    void check_facts() const;
    void measure(uint32_t il, ggml_tensor * attention);
    void keep_input_of(uint32_t il, const ggml_tensor * input);

    llama_model &                           model;
    const size_t                            n_tokens;
    const std::function<bool(size_t, size_t)> & progress;
    llama_context *                         ctx = nullptr;
    std::map<uint32_t, layer_facts>         facts;
    std::map<uint32_t, chunk_attention>     attention;
    std::map<uint32_t, std::vector<float>>  norms;     // two of each query: what is lost, and the residual stream after the attention
    std::map<uint32_t, std::vector<float>>  inputs;    // of each query: the residual stream before the layer
    attention_loss                          computing;
    size_t                                  n_read = 0, n_done = 0; // tokens; layers of all steps
    std::exception_ptr                      failure;
};

// llama.cpp calls this in the middle of C code: nothing may be thrown through it.
bool pass::on_node(ggml_tensor * t, bool ask) {
    try {
        if (failure) {
            return false;
        }
        if (ask && n_read == 0) {
            learn(t);
        }
        const int32_t il = t->op == GGML_OP_FLASH_ATTN_EXT ? layer_of(t) : -1;
        const bool is_measured = il >= 0 && facts.count(uint32_t(il)), follows_one = il > 0 && n_read > 0 && facts.count(uint32_t(il - 1));
        if (ask) {
            return is_measured || follows_one;
        }
        if (follows_one) {
            keep_input_of(uint32_t(il), input_of(t));
        }
        if (is_measured) {
            measure(uint32_t(il), t);
        }
        return true;
    } catch (...) {
        failure = std::current_exception();
        return false;
    }
}

void pass::learn(const ggml_tensor * t) {
    for (auto & [il, layer] : facts) {
        if (layer.at) {
            follow(layer, t);
        }
        for (const ggml_tensor * src : t->src) {
            if (src && src == layer.input && layer.path.matrix) {
                layer.input = nullptr;
            }
        }
    }
    const int32_t il = t->op == GGML_OP_FLASH_ATTN_EXT ? layer_of(t) : -1;
    if (const auto found = facts.find(uint32_t(il)); found != facts.end()) {
        found->second.at    = t;
        found->second.input = input_of(t);
        if (!found->second.input || found->second.input->type != GGML_TYPE_F32 || !ggml_is_contiguous(found->second.input)) {
            unsupported(format("the input of layer %d is not found in its graph", il));
        }
    }
}

// One node further on the way of the attention's output to the residual stream.
void pass::follow(layer_facts & layer, const ggml_tensor * t) {
    if (t->src[0] != layer.at && t->src[1] != layer.at) {
        return;
    }
    const ggml_tensor * other = t->src[0] == layer.at ? t->src[1] : t->src[0];
    auto & path = layer.path;
    if (is_view(t) || (path.matrix && t->op == GGML_OP_GET_ROWS)) {
        layer.at = t;
    } else if (!path.matrix) {
        if (t->op != GGML_OP_MUL_MAT || !is_weights(t->src[0])) {
            unsupported(format("its attention's output goes through %s before a matrix", ggml_op_name(t->op)));
        }
        path.matrix = t->src[0];
        layer.at = t;
    } else if (is_norm(t) || t->op == GGML_OP_SCALE) {
        path.steps.push_back({ t->op, nullptr, parameter(t, 0) });
        layer.at = t;
    } else if ((t->op == GGML_OP_MUL || t->op == GGML_OP_ADD) && is_weights(other)) {
        path.steps.push_back({ t->op, other, 0 });
        layer.at = t;
    } else {
        layer.at = nullptr;
    }
}

void pass::check_facts() const {
    for (const auto & [il, layer] : facts) {
        if (!layer.path.matrix || layer.input) {
            unsupported(format("layer %u has no attention that is added to the layer's input", il));
        }
    }
}

void pass::measure(uint32_t il, ggml_tensor * t) {
    ggml_backend_t backend = ggml_backend_sched_get_tensor_backend(ctx->get_sched(), t);
    const int64_t n = t->src[0]->ne[1];
    std::vector<float> sums;
    chunk_attention & own = attention[il];
    for (int64_t first = 0; first < n; first += CALIBRATION_BLOCK_TOKENS) {
        const int64_t n_block = std::min(CALIBRATION_BLOCK_TOKENS, n - first);
        computing.probabilities(backend, t, first, n_block, sums);
        const size_t n_cells = sums.size() / size_t(n_block / CALIBRATION_CHUNK_TOKENS), first_chunk = own.size();
        for (auto row = sums.begin(); row != sums.end(); row += std::ptrdiff_t(n_cells)) {
            own.emplace_back(row, row + std::ptrdiff_t(CALIBRATION_CHUNK_TOKENS*(own.size() + 1)));
        }
        if (n_read > 0) {
            std::vector<float> kept;
            for (size_t chunk = first_chunk; chunk < own.size(); ++chunk) {
                const std::vector<float> of_chunk = kept_tokens(own, chunk, CALIBRATION_CHUNK_TOKENS, KEPT_RATIO);
                kept.insert(kept.end(), of_chunk.begin(), of_chunk.end());
                kept.resize((chunk - first_chunk + 1)*n_cells, 0);
            }
            computing.losses(kept, facts[il].path, input_of(t), norms[il]);
        }
    }
    if (!progress(++n_done, facts.size()*(n_tokens / STEP_TOKENS))) {
        throw error(ASRKF_INTERNAL, "stopped");
    }
}

void pass::keep_input_of(uint32_t il, const ggml_tensor * input) {
    std::vector<float> values(size_t(ggml_nelements(input)));
    ggml_backend_tensor_get(input, values.data(), 0, ggml_nbytes(input));
    for (auto row = values.begin(); row != values.end(); row += input->ne[0]) {
        inputs[il].push_back(std::inner_product(row, row + input->ne[0], row, 0.0f));
    }
}

void pass::read(const std::vector<int32_t> & tokens, int32_t n_threads) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = uint32_t(n_tokens);
    params.n_batch = params.n_ubatch = STEP_TOKENS;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.swa_full = false;
    params.cb_eval = on_node;
    params.cb_eval_user_data = this;
    if (n_threads > 0) {
        params.n_threads = params.n_threads_batch = n_threads;
    }
    const struct upstreams_cache { // whatever the next context of this thread is to have, and LLAMA_KV_POLICY
        upstreams_cache() { set_own_context(true); }
        ~upstreams_cache() { set_own_context(false); }
    } upstreams;
    std::unique_ptr<llama_context, void (*)(llama_context *)> context(llama_init_from_model(&model, params), llama_free);
    if (!context) {
        throw error(ASRKF_INTERNAL, "no context for the calibration: is there memory for it?");
    }
    ctx = context.get();
    for (; n_read < n_tokens; n_read += STEP_TOKENS) {
        std::vector<llama_token> step(tokens.begin() + std::ptrdiff_t(n_read), tokens.begin() + std::ptrdiff_t(n_read + STEP_TOKENS));
        const int status = llama_decode(ctx, llama_batch_get_one(step.data(), int32_t(step.size())));
        if (failure) {
            std::rethrow_exception(failure);
        }
        if (status) {
            throw error(ASRKF_INTERNAL, format("llama_decode failed with %d", status));
        }
        if (n_read == 0) {
            check_facts();
        }
    }
}

// A change of the attention's output goes on in two ways: past the feed-forward, where it is small or large beside the residual
// stream after the layer; and through it, which sees the stream before it. Relative to the geometric mean of both: in a first
// layer, where the stream grows a hundredfold, the one is far too little and the other far too much; elsewhere they hardly differ.
layer_losses pass::result() const {
    layer_losses found;
    for (const auto & [il, own] : norms) {
        const auto next = inputs.find(il + 1);
        double sum = 0;
        for (size_t i = 0; 2*i < own.size(); ++i) {
            const double after = double(own[2*i + 1]);
            sum += double(own[2*i]) / std::sqrt(after*(next != inputs.end() ? double(next->second[i]) : after));
        }
        const double loss = sum / double(own.size() / 2);
        if (!std::isfinite(loss)) {
            unsupported(format("layer %u has no finite attention", il));
        }
        found.layers.push_back(il);
        found.losses.push_back(loss);
    }
    return found;
}

} // namespace

layer_losses measure_losses(llama_model & model, const std::vector<int32_t> & tokens, int32_t n_threads, const std::function<bool(size_t, size_t)> & progress) {
    if (tokens.size() < 2*STEP_TOKENS) {
        throw error(ASRKF_INVALID_ARGUMENT, format("a text of %zu tokens is too short to calibrate with: give at least %u", tokens.size(), 2*STEP_TOKENS));
    }
    const size_t n_tokens = tokens.size() / STEP_TOKENS*STEP_TOKENS;
    if (n_tokens > model.hparams.n_ctx_train) {
        throw error(ASRKF_INVALID_ARGUMENT, format("the model was trained on %u tokens, %zu are too many to calibrate with", model.hparams.n_ctx_train, n_tokens));
    }
    pass one(model, n_tokens, progress);
    one.read(tokens, n_threads);
    return one.result();
}

measured_layers measure_layers(llama_model & model, const std::vector<int32_t> & tokens, int32_t n_threads, const std::function<bool(size_t, size_t)> & progress) {
    const layer_losses found = measure_losses(model, tokens, n_threads, progress);
    measured_layers made = { found.losses, {} };
    const double least = 1e-9 + 1e-6* *std::max_element(found.losses.begin(), found.losses.end()); // a budget is for every layer
    for (double & sensitivity : made.sensitivities) {
        sensitivity = std::max(sensitivity, least);
    }
    for (const uint32_t i : default_scoring_layers(uint32_t(found.layers.size()))) {
        made.score_layers.push_back(found.layers[i]);
    }
    return made;
}

} // namespace asrkf
