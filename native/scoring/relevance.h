// What relevance is made of: which tokens the newest queries attend to. Knows ggml only.
//
// Scoring layers keep this on the device beside the pool: an index of the whole sequence, frozen or not, and the
// newest queries. Each step's graph writes its rows, in the same shape whether the step scores or not. A scoring step then
// computes the attention of the kept queries over the whole index, apart from that graph (device_scorer.h).
// So frozen tokens have fresh scores, and the queries of all steps since the last decision count, at the price of reading
// the index once. Where a prompt ends more queries score: a question is longer than a few tokens, and any of its words
// may be the one that asks. The index holds
// - exact: the K row of every token in a small type;
// - mean_key: one row for a block of tokens, the mean of their K rows, in F16. Its attention is the block's: a logit
//   counts as often as the block has tokens.
// It lies head by head, [head, rows, key heads]: devices multiply quantised matrices that are contiguous over two dimensions,
// and a step's row numbers serve all heads.
#pragma once

#include "common.h"
#include "scoring/attention_layer.h"
#include "scoring/seen_rows.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <vector>

namespace asrkf {

struct scoring_layer : attention_layer {
    uint32_t set = 0; // layers of one set have the same tokens frozen
};

// A query that scores: it sees the first n_tokens of its sequence, none if it is gone.
struct scoring_query {
    seen_rows * sequence;
    uint32_t    n_tokens;
};

// The shape of what one graph of the model writes.
struct branch_shape {
    uint32_t n_tokens  = 0;
    uint32_t n_written = 0; // index rows
    uint32_t n_kept    = 0; // queries
    bool operator==(const branch_shape & o) const { return n_tokens == o.n_tokens && n_written == o.n_written && n_kept == o.n_kept; }
};

// The shape of a step's scoring.
struct scoring_shape {
    uint32_t n_scored   = 0;     // index rows
    uint32_t n_scoring  = 0;     // by so many queries
    bool     prompt_end = false; // which are those of a prompt's end
    bool     several    = false; // sequences: each query sees its own
    bool operator==(const scoring_shape & o) const {
        return n_scored == o.n_scored && n_scoring == o.n_scoring && prompt_end == o.prompt_end && several == o.several;
    }
};

class relevance {
public:
    // n_ring_rows: of queries, all sequences together. no_alloc: sizes only.
    // Throws error(ASRKF_UNSUPPORTED) if the type does not divide a head, error(ASRKF_INTERNAL) without memory. With more
    // than one token a row, rows are means of keys.
    relevance(const std::vector<scoring_layer> & layers, uint32_t n_rows, uint32_t tokens_per_row, uint32_t n_ring_rows, ggml_type type,
            score_kind kind, float soft_cap, bool no_alloc);

    const std::vector<scoring_layer> & layers() const { return specs; }
    uint32_t n_sets() const; // numbered from 0 on
    size_t   n_heads() const; // of all scoring layers
    size_t   device_bytes() const { return n_bytes; }
    uint32_t rows() const { return n_rows; }
    const std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> & breakdown() const { return sizes; }

    // Index rows that a step writes which gives a sequence so many tokens: it may begin and end within a block.
    uint32_t n_written(uint32_t n_tokens) const { return is_mean() ? (n_tokens + tokens_per_row - 2) / tokens_per_row + 1 : n_tokens; }

    // The inputs of one graph of the model.
    struct branch {
        branch_shape  shape;
        ggml_tensor * rows       = nullptr;  // I64 [n_written]: index row of each token, or the rows of the step's blocks
        ggml_tensor * read_rows  = nullptr;  // I32 [n_written, key heads]: the same rows for each head, where a row is a mean
        ggml_tensor * keep       = nullptr;  // F32 [1, n_written]: part of a mean that stays
        ggml_tensor * weights    = nullptr;  // F32 [n_tokens, n_written]: part that each token gets
        ggml_tensor * queries    = nullptr;  // I32 [n_kept]: tokens of this step whose queries are kept
        ggml_tensor * query_rows = nullptr;  // I64 [n_kept]: their rows in the rings
    };
    branch new_branch(ggml_context * ctx, const branch_shape & shape) const;
    // What a branch of this shape writes for these records, one for each of the step's tokens; and what scoring masks, nothing
    // if it masks nothing. Made before the step is computed: what runs out of memory must do so where the step can still be refused.
    struct written {
        std::vector<int64_t> rows;      // as the branch's inputs of these names
        std::vector<int32_t> read_rows;
        std::vector<float>   keep;
        std::vector<float>   weights;
    };
    written written_by(const branch_shape & shape, const index_rows & index, const std::vector<uint32_t> & records) const;
    // Of rows that the same tokens are written to again: their means have them.
    static void keep_means(written & w);
    void    write_mask(const scoring_shape & shape, const std::vector<scoring_query> & queries, std::vector<float> & mask) const;
    void set_written(const branch & b, const written & w) const;

    // Add scoring layer i to a graph: q [head, n_head, n_tokens] and k [head, n_head_kv, n_tokens] of this step, as the cache
    // sees them.
    void build(ggml_context * ctx, ggml_cgraph * gf, const branch & b, size_t i, ggml_tensor * q, ggml_tensor * k, float kq_scale);

    // Of scoring layer i: n rows from first_row on, in the index type, one head's keys after the other's.
    void set_rows(size_t i, uint32_t first_row, uint32_t n, const uint8_t * keys);

    struct state { // of a scoring layer
        ggml_tensor * index;        // [head, rows, n_head_kv]
        ggml_tensor * ring;         // F32 [head*n_head, n_ring_rows]
        float         kq_scale = 1; // known once a graph of the model has been built
    };
    const std::vector<state> & states() const { return by_layer; }
    bool has_mask(const scoring_shape & shape) const { return kind == SCORE_ATTENTION || shape.several; }

    const score_kind kind;
    const float      soft_cap; // of the attention logits, 0 for none

private:
    bool is_mean() const { return tokens_per_row > 1; }
    int64_t most_heads() const; // that have keys, of any scoring layer

    const std::vector<scoring_layer>     specs;
    const uint32_t                       n_rows;
    const uint32_t                       tokens_per_row;
    const uint32_t                       n_ring_rows;
    std::vector<ggml_context_ptr>        contexts;
    std::vector<ggml_backend_buffer_ptr> buffers;
    std::vector<state>                   by_layer;
    std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> sizes;
    size_t                               n_bytes = 0;
};

} // namespace asrkf
