// The gates of a model on its devices (gate_file.h), as part of the model's graph: each step's tokens are scored where their
// hidden states are, once, and never again. Knows ggml only.
//
// Of KV head h, with G query heads g: q = norm(Wq x + b), k = norm(Wk x), both of `dim` elements; a token's own key against
// learned sinks: score = mean over g of softmax([q.k/sqrt(dim) + bias, q.sink_m/sqrt(dim), ...])[0], between 0 and 1. That is the
// published inference; x is what the layer's queries are made of.
#pragma once

#include "scoring/gate_file.h"

#include "ggml-backend.h"

#include <memory>
#include <utility>
#include <vector>

namespace asrkf {

struct gated_layer {
    uint32_t                   il;
    int64_t                    n_embd;
    int64_t                    n_head;
    int64_t                    n_head_kv;
    ggml_backend_buffer_type_t buft; // where the layer's queries are computed
};

class gates {
public:
    // host: where scores are read to. no_alloc: sizes only. Throws error(ASRKF_INVALID_ARGUMENT) where the file has not these layers in
    // these shapes, error(ASRKF_UNSUPPORTED) where a device lacks an operation, error(ASRKF_INTERNAL) without memory.
    gates(const gate_file & file, std::vector<gated_layer> layers, uint32_t n_tokens_most, ggml_backend_buffer_type_t host, bool no_alloc);
    ~gates();

    const std::vector<gated_layer> & layers() const { return specs; }
    using sizes = std::vector<std::pair<ggml_backend_buffer_type_t, size_t>>;
    sizes breakdown() const; // weights and scores, on devices

    // Add layer i to a graph of the model: x [n_embd, n_tokens].
    void build(ggml_context * ctx, ggml_cgraph * gf, size_t i, ggml_tensor * x);

    // The backends that compute the model's graphs. They must outlive every later call but destruction.
    void attach(const std::vector<ggml_backend_t> & backends);
    bool is_attached() const;
    // The scores of a step whose graph has been queued, read behind it; and until they are there.
    void read(uint32_t n_tokens);
    void wait();
    // Of layer i and a token of that step: the KV head that scores it highest.
    float score(size_t i, uint32_t token) const;

private:
    struct part; // a device's layers
    struct state {
        part *       on;
        gate_tensors weights;
        size_t       first_head; // in a token's row of the part
    };

    void   check(const gate_file & file, size_t i) const;
    void   check_operations(part & p);
    ggml_tensor * build_scores(ggml_context * ctx, const state & s, ggml_tensor * x) const;

    const std::vector<gated_layer>     specs;
    const uint32_t                     dim;
    const float                        norm_eps;
    std::vector<std::unique_ptr<part>> parts;
    std::vector<state>                 states; // by layer
};

} // namespace asrkf
