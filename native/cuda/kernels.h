// CUDA kernels for what is computed portably elsewhere: relevance (called by scorer.cpp), the entropy of an output (by outputs.cpp) and
// moves of rows (by copier.cpp). They know pointers and a stream, no tensor and no model.
//
// Every function queues its work on the stream and returns at once: nullptr, or why nothing could be queued, text that lives as
// long as the program. All pointers are the device's, or host memory that the device sees (pinned). A fault while a kernel runs
// is told by whatever waits for the stream.
#pragma once

#ifdef ASRKF_CUDA_SHIM
#    include "cuda_shim.h"
#else
#    include <cuda_runtime_api.h>
#endif

#include "store/row_slice.h"

#include <cstddef>
#include <cstdint>

namespace asrkf::cuda {

using failure = const char *; // nullptr: none

// Relevance of one scoring layer; scoring/relevance.h says what it means. Layers add up in the order of their launches.
enum class row_type : int32_t { f16, q8_0, q4_0 };

struct relevance_layer {
    row_type        type;
    const void *    index;      // for each KV head a contiguous matrix of rows of `head` elements,
    size_t          head_bytes; //   so far apart
    const float *   ring;       // query rows [n_head, head]
    const int32_t * scoring;    // [n_queries]: rows of the ring
    const float *   mask;       // [n_queries, n_rows]: added to logits; for magnitudes a factor; nullptr: none
    const float *   frozen;     // [n_rows]: 1 for rows that this layer's attention does not see, else 0; nullptr: not asked for
    uint32_t        head;       // elements: a multiple of 16, of 32 in the quantised types, at most MAX_HEAD
    uint32_t        n_head;
    uint32_t        n_head_kv;
    uint32_t        n_rows;
    uint32_t        n_queries;
    uint32_t        n_layers;   // all of them: the mean is over layers, too
    float           scale;
    float           soft_cap;   // 0: none
    bool            magnitude;  // |q.k| instead of attention
    bool            prompt_end; // the peak is the highest of all queries, not the highest mean of a head
    bool            is_first;   // of the scoring layers: results are set, not added to
    float *         mean;       // [n_rows]
    float *         peak;       // [n_rows]
    float *         missed;     // [n_head]: share of each head's attention on frozen rows; with `frozen` only
    void *          scratch;    // relevance_scratch_bytes(), 16-byte aligned; one stream's at a time
    uint32_t *      finished;   // [n_head_kv]: zero before its first use, and again after each; one stream's at a time
};

constexpr uint32_t MAX_HEAD = 256;

size_t  relevance_scratch_bytes(uint32_t n_head, uint32_t n_rows, uint32_t n_queries);
// Why layers of this kind have no kernel, and whether the current device has the one they need; nullptr: it has.
failure refuses_heads(row_type type, uint32_t head, uint32_t n_head, uint32_t n_head_kv);
failure lacks_kernel(row_type type);
failure add_relevance(const relevance_layer & layer, cudaStream_t stream);

// Rows of many tensors, all in one launch. crossing: memory that the device sees, which begins with row_slice [n_slices] and holds the
// cells' numbers and the rows; it stays as it is until the work is done. most_rows: of a slice. From there (to_crossing = false) no cell
// may be there twice. lacks_row_kernel: whether the current device has the kernel.
failure lacks_row_kernel();
failure move_rows(uint8_t * crossing, uint32_t n_slices, uint32_t most_rows, bool to_crossing, cudaStream_t stream);

// Of n_rows rows of n logits, row_stride elements apart: log-sum-exp, entropy in nats and top probability, three numbers a row, as
// policy/entropy.h has them.
failure output_entropy(const float * logits, size_t row_stride, uint32_t n, uint32_t n_rows, double * out, cudaStream_t stream);

} // namespace asrkf::cuda
