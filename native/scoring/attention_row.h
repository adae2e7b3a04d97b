// The attention of one query over all tokens of its sequence, wherever their keys are: what flash attention does not show. Knows
// ggml, neither a model nor a policy.
//
// Each step's graph keeps its newest queries, of every layer, on the layer's device. Later, beside the model's graphs, a query is
// multiplied with the keys as the cache stores them: rows of the pool by their numbers, others uploaded from the host. Keys are
// taken to F32 in pieces of a fixed number of tokens, in room that is reserved when this is created. The products come back, and
// the softmax over all pieces is the host's: so pool and host are one distribution.
#pragma once

#include "common.h"
#include "scoring/attention_layer.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace asrkf {

constexpr uint32_t ROW_PIECE_TOKENS = 512;

struct row_layer : attention_layer {
    ggml_type          type;        // of the cache's keys
    std::vector<float> sink_logits; // of each head, of a model that has learned some; else empty
};

// Where a token's key is.
struct key_place {
    int32_t         row;  // of the layer's keys on the device; below 0:
    const uint8_t * host; // here
};

class attention_rows {
public:
    // n_ring_rows: of queries, all sequences together. no_alloc: sizes only. Throws error(ASRKF_UNSUPPORTED) where a device lacks an
    // operation, error(ASRKF_INTERNAL) without memory.
    attention_rows(std::vector<row_layer> layers, uint32_t n_ring_rows, float soft_cap, bool no_alloc);
    ~attention_rows();

    const std::vector<row_layer> & layers() const { return specs; }
    using sizes = std::vector<std::pair<ggml_backend_buffer_type_t, size_t>>;
    sizes ring_bytes() const;
    sizes room_bytes() const;

    // The inputs of one graph of the model: tokens of the step whose queries are kept, and their rows in the rings.
    struct branch {
        uint32_t      n_kept     = 0;
        ggml_tensor * queries    = nullptr; // I32 [n_kept]
        ggml_tensor * query_rows = nullptr; // I64 [n_kept]
    };
    branch new_branch(ggml_context * ctx, uint32_t n_kept) const;
    // Add layer i to a graph: q [head, n_head, n_tokens] of this step, as the cache's keys see it.
    void build(ggml_context * ctx, ggml_cgraph * gf, const branch & b, size_t i, ggml_tensor * q, float kq_scale);

    // The backends that compute the model's graphs. They must outlive every later call but destruction.
    void attach(const std::vector<ggml_backend_t> & backends);
    bool is_attached() const;

    // Attention probabilities of the query in ring row `query` of layer i over these tokens, [head][token] into out. keys: the layer's,
    // [elements, cells] or [elements, cells, streams]. Waits for the device. Throws error(ASRKF_INTERNAL).
    void probabilities(size_t i, int32_t query, ggml_tensor * keys, const std::vector<key_place> & tokens, std::vector<float> & out);

private:
    struct graph; // of one piece of one layer
    struct part;  // a device's layers
    struct state {
        part *        on;
        ggml_tensor * ring;         // F32 [head*n_head, n_ring_rows]
        float         kq_scale = 1; // known once a graph of the model has been built
    };

    void   allocate_ring(part & p, uint32_t n_ring_rows, bool no_alloc);
    void   reserve(part & p, bool no_alloc);
    void   multiply(size_t i, int32_t query, ggml_tensor * keys, const std::vector<key_place> & tokens, const std::vector<uint32_t> & which, std::vector<float> & out);
    void   soften(size_t i, uint32_t n_tokens, std::vector<float> & logits) const;

    const std::vector<row_layer>       specs;
    const float                        soft_cap; // of the logits, 0 for none
    std::vector<std::unique_ptr<part>> parts;
    std::vector<state>                 states;   // by layer
};

} // namespace asrkf
