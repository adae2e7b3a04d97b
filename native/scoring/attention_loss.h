// What a layer's output loses when its queries attend to a part of their history only, computed beside a flash attention that
// has just run. Knows ggml, neither a model nor a policy.
#pragma once

#include "common.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

namespace asrkf {

constexpr uint32_t CALIBRATION_CHUNK_TOKENS = 8;   // queries that share a choice of what they attend to
constexpr int64_t  CALIBRATION_BLOCK_TOKENS = 128; // queries at a time, which bounds the memory: heads x cells x these

// From the attention's output to what is added to the residual stream: a matrix, then steps by element.
struct output_path {
    struct step {
        ggml_op             op;     // RMS_NORM and NORM (value: epsilon), SCALE (value: factor), MUL and ADD (weights)
        const ggml_tensor * weights;
        float               value;
    };
    ggml_tensor *     matrix = nullptr;
    std::vector<step> steps;
};

class attention_loss {
public:
    // Attention of n queries from `first` on, of a GGML_OP_FLASH_ATTN_EXT that has been computed on backend: for each chunk of
    // queries the mean over heads and queries, [n / chunk][cells] into out. n is a multiple of a chunk, at most a block.
    // Throws error(ASRKF_INTERNAL) without memory.
    void probabilities(ggml_backend_t backend, ggml_tensor * attention, int64_t first, int64_t n, std::vector<float> & out);

    // For the same queries: by how much the layer's output changes if only `kept` cells ([n / chunk][cells], 1 or 0) are attended
    // to, and the residual stream between attention and feed-forward; two squared norms a query, appended to out. input: the
    // residual stream before the attention.
    void losses(const std::vector<float> & kept, const output_path & path, const ggml_tensor * input, std::vector<float> & out);

private:
    void compute(ggml_cgraph * graph) const;

    ggml_context_ptr holder;               // of the tensors of probabilities(), which losses() goes on with
    ggml_gallocr_ptr first_memory, second_memory;
    ggml_backend_t   backend   = nullptr;
    ggml_tensor *    attention = nullptr;
    ggml_tensor *    probability = nullptr; // [cells, n, heads]
    int64_t          first = 0;
};

} // namespace asrkf
