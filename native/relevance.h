// The side branch of the graph that scores cells: composed of ggml ops, so every backend has it. Knows ggml only.
#pragma once

#include "config.h"

#include "ggml.h"

namespace asrkf {

struct attention_inputs {
    ggml_tensor * q;        // [head, n_head, n_tokens]
    ggml_tensor * k;        // [head, n_head_kv, n_kv], a view of the cache, after this step's rows were written
    ggml_tensor * kq_mask;  // F16 [n_kv, n_tokens]
    float         kq_scale;
    float         soft_cap; // of the attention logits; 0: none
};

// Relevance of each cell, F32 [n_kv]: averaged over heads and over the last min(n_queries, n_tokens) queries, either the
// attention probability (SCORE_ATTENTION) or |q.k| * kq_scale, unmasked (SCORE_MAGNITUDE: cells that hold no token
// get a meaningless value). Not yet in the graph.
ggml_tensor * build_relevance(ggml_context * ctx, const attention_inputs & in, score_kind kind, uint32_t n_queries);

} // namespace asrkf
