// How much each layer's history matters, from one pass of the model over a text. Needs no seam in llama.cpp: the callback that
// llama.h offers for a graph's evaluation sees q, k and v at each flash attention, and from there the graph leads to the
// layer's input and to what its output is multiplied with.
#pragma once

#include "common.h"
#include "policy/kept_attention.h"

#include <cstdint>
#include <functional>
#include <vector>

struct llama_model;

namespace asrkf {

struct layer_losses {
    std::vector<uint32_t> layers; // that have a cache and no sliding window, ascending
    std::vector<double>   losses; // of each, mean over queries: squared norm of what its output loses with a fifth of its history,
                                  // relative to the residual stream
};

// The model reads the tokens with upstream's cache in a context of its own. progress(done, all) may return false to stop. Throws error:
// INVALID_ARGUMENT for too few tokens or more than the model's context, UNSUPPORTED for a model whose graph is another one,
// INTERNAL without memory or if stopped.
layer_losses measure_losses(llama_model & model, const std::vector<int32_t> & tokens, int32_t n_threads, const std::function<bool(size_t, size_t)> & progress);

} // namespace asrkf
