// What a context was created with, and stays: the policy's configuration, the model, and sizes.
#pragma once

#include "common.h"
#include "scoring/query_rings.h"

#include "llama-cparams.h"
#include "llama-model.h"

namespace asrkf {

struct settings : asrkf_config {
    settings(const llama_model & model, const llama_cparams & cparams, const asrkf_config & config);

    // The index: tokens that share a row, rows, and the type of a key.
    uint32_t  index_tokens_per_row() const;
    uint32_t  n_index_rows() const;
    ggml_type index_type() const;
    uint32_t  n_ring_rows() const { return n_seq_max*(score_queries + PROMPT_END_QUERIES); }

    const llama_model &   model;
    const llama_cparams & cparams;     // of the context that owns the memory
    const uint32_t        n_seq_max;
    const uint32_t        n_ctx;       // all sequences together,
    const uint32_t        n_ctx_seq;   // and each
    const uint32_t        n_ubatch;
    const bool            unified;     // all sequences in one set of cells; else each has its own (streams)
    const bool            no_alloc;    // a trial: sizes only, no memory
    const bool            is_windowed; // some layers may have a sliding window: the last group is theirs
};

} // namespace asrkf
