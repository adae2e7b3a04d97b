// Relevance: which tokens the newest queries attend to, computed in the model's own graph from ggml ops, so that every
// backend has it. Knows ggml only.
//
// Scoring layers keep two things on the device beside the pool: an index, the K row of every token of the sequence,
// frozen or not, in a small type; and a ring of queries. Each step writes its rows; a scoring step adds the
// attention of the ring over the whole index. So frozen tokens have fresh and exact scores (but for the index type's
// rounding), and the queries of all steps since the last decision count, at the price of reading K once.
#pragma once

#include "config.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <vector>

namespace asrkf {

struct scoring_layer {
    uint32_t                   il;
    uint32_t                   group;
    int64_t                    head; // elements of one head's key
    int64_t                    n_head;
    int64_t                    n_head_kv;
    ggml_backend_buffer_type_t buft; // where the layer's cache is
};

class relevance {
public:
    // soft_cap: of the attention logits, 0 for none. no_alloc: sizes only. Throws error(ASRKF_UNSUPPORTED) if the type
    // does not divide a head, error(ASRKF_INTERNAL) without memory.
    relevance(const std::vector<scoring_layer> & layers, uint32_t n_rows, uint32_t n_queries, ggml_type type, score_kind kind,
            float soft_cap, bool no_alloc);

    const std::vector<scoring_layer> & layers() const { return specs; }
    size_t   device_bytes() const { return n_bytes; }
    uint32_t rows() const { return n_rows; }
    uint32_t queries() const { return n_queries; }
    const std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> & breakdown() const { return sizes; }

    // One graph's inputs and outputs.
    struct branch {
        uint32_t      n_scored   = 0;        // rows that are scored, 0 in a graph that only writes
        ggml_tensor * rows       = nullptr;  // I64 [n_tokens]: index row of each token
        ggml_tensor * queries    = nullptr;  // I32 [n_queries]: tokens of this step whose queries are kept; null: all
        ggml_tensor * query_rows = nullptr;  // I64 [min(n_tokens, n_queries)]: their rows in the ring
        ggml_tensor * mask       = nullptr;  // F32 [n_scored, n_queries]: 0 or -inf
        std::vector<ggml_tensor *> means;    // by group, F32 [n_scored]: averaged over queries, heads and the group's scoring layers; may be null
        ggml_tensor * peak       = nullptr;  // F32 [n_scored]: averaged over queries, highest of all heads of all scoring layers
        uint32_t      n_built    = 0;
    };
    branch new_branch(ggml_context * ctx, uint32_t n_tokens, uint32_t n_scored) const;

    // Add scoring layer i: q [head, n_head, n_tokens] and k [head, n_head_kv, n_tokens] of this step, as the cache sees
    // them. Layers in order; the last one completes the outputs.
    void build(ggml_context * ctx, ggml_cgraph * gf, branch & b, size_t i, ggml_tensor * q, ggml_tensor * k, float kq_scale) const;

    void set_row(size_t i, uint32_t row, const void * bytes); // of scoring layer i: a key in the index type

private:
    struct state { ggml_tensor * index; ggml_tensor * ring; };

    const std::vector<scoring_layer>     specs;
    const uint32_t                       n_rows;
    const uint32_t                       n_queries;
    const score_kind                     kind;
    const float                          soft_cap;
    std::vector<ggml_context_ptr>        contexts;
    std::vector<ggml_backend_buffer_ptr> buffers;
    std::vector<state>                   states; // by scoring layer
    std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> sizes;
    size_t                               n_bytes = 0;
};

} // namespace asrkf
