// The side file of `asrkf gates`: for each layer a small network that tells from a token's normalised hidden state alone how much
// it will be attended to (Fast KVzip, arXiv 2601.17668). GGUF, as asrkf_gguf/gates/file.py writes it. Knows ggml only.
#pragma once

#include "common.h"

#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <string>
#include <vector>

namespace asrkf {

// The tensors of one layer. D: elements of a hidden state, H: KV heads, G: query heads of each.
struct gate_tensors {
    ggml_tensor * q_weight; // [D, H*G*dim], any type
    ggml_tensor * q_bias;   // F32 [H*G*dim]
    ggml_tensor * k_weight; // [D, H*dim], any type
    ggml_tensor * q_norm;   // F32 [dim]
    ggml_tensor * k_norm;   // F32 [dim]
    ggml_tensor * sinks;    // F32 [dim, n_sinks, H]
    ggml_tensor * bias;     // F32 [G, H]
};

struct gate_file {
    std::string                path;
    std::string                fingerprint; // of the model
    uint32_t                   dim      = 0;
    uint32_t                   n_sinks  = 0;
    float                      norm_eps = 0;
    std::vector<uint32_t>      layers;  // that have gates, ascending
    std::vector<gate_tensors>  tensors; // of each, in host memory
    ggml_context_ptr           holder;
};

// Throws error(ASRKF_INVALID_ARGUMENT) if the file cannot be read or is not such a file, and says what is wrong with it.
// no_alloc: tensors without their data.
gate_file read_gates(const std::string & path, bool no_alloc);

} // namespace asrkf
