// How much the newest query of each layer attends to the tokens in its pool: what a layer itself makes of what it sees, beside the
// relevance that a few scoring layers find for all. Knows ggml, neither a model nor a policy.
//
// Each step's graph leaves the last query of every layer, of each sequence that it brings, on the layer's device. After a step that scores,
// a graph of its own multiplies them with all keys of their pools. It runs on the backend of the model's graphs: behind that step, and before
// anything that writes to cells or queries again.
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

struct own_layer : attention_layer {
    ggml_type type;    // of the cache's keys
    uint32_t  set;     // layers of one set have the same tokens in the same cells
    uint32_t  n_cells; // of the set
};

class own_attention {
public:
    // no_alloc: sizes only. Throws error(ASRKF_UNSUPPORTED) where a device lacks an operation,
    // error(ASRKF_INTERNAL) without memory.
    own_attention(std::vector<own_layer> layers, uint32_t n_seqs, float soft_cap, bool no_alloc);
    ~own_attention();

    const std::vector<own_layer> & layers() const { return specs; }
    using sizes = std::vector<std::pair<ggml_backend_buffer_type_t, size_t>>;
    sizes kept_bytes() const; // the queries
    sizes room_bytes() const; // what is found, and what it is found in

    // The input of one graph of the model, where there are several sequences: I32 [n_seqs], the step's token that is the last of
    // each; null for one, whose is the step's last.
    ggml_tensor * new_input(ggml_context * ctx) const;
    // Add layer i to a graph: q [head, n_head, n_tokens] of this step, as the cache's keys see it.
    void build(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * last_tokens, size_t i, ggml_tensor * q, float kq_scale);

    // The backends that compute the model's graphs, and the keys of each layer, [elements, cells] or [elements, cells, streams]. Both must
    // outlive every later call but destruction.
    void attach(const std::vector<ggml_backend_t> & backends, std::vector<ggml_tensor *> keys);
    bool is_attached() const { return !keys.empty(); }

    // What a run needs: the sequences that ask, and for each set in turn which cells each of them sees, 0 or -INFINITY,
    // [cells, sequences].
    struct inputs {
        std::vector<int32_t>            seqs;
        std::vector<std::vector<float>> masks; // by set
    };
    // The graph for so many sequences: what can fail for lack of memory does so here. Throws error(ASRKF_INTERNAL).
    void prepare(uint32_t n_asking);
    // Of the graph that was prepared. Until wait() or settle() is over, `in` stays, and nothing else may be asked.
    void run(const inputs & in);
    void wait();   // for what is found
    void settle(); // until a run that nobody waited for is over
    // Attention probability of each cell of a set, averaged over its layers, their heads, and the sequences.
    const std::vector<float> & of_set(uint32_t set) const { return found[set]; }

private:
    struct graph;
    struct part; // a device's layers

    void allocate(part & p, bool no_alloc);
    void reserve(part & p, bool no_alloc);
    float weight(size_t i) const; // of one head's probability

    const std::vector<own_layer>       specs;
    const uint32_t                     n_seqs;
    const float                        soft_cap; // of the logits, 0 for none
    std::vector<std::unique_ptr<part>> parts;
    std::vector<ggml_tensor *>         queries;   // by layer, F32 [head*n_head, n_seqs]
    std::vector<float>                 kq_scales; // by layer; known once a graph of the model has been built
    std::vector<ggml_tensor *>         keys;      // by layer; none before attach()
    std::vector<std::vector<float>>    found;     // by set
    bool                               is_running = false;
};

} // namespace asrkf
