// Whether a context can have a policy, and the layers that it is for. Refusals come with their reason, before anything is
// allocated.
#pragma once

#include "llama/settings.h"
#include "scoring/attention_layer.h"

#include "llama-memory.h"

namespace asrkf {

// Throws error(ASRKF_UNSUPPORTED) with the reason why this context cannot be served. Everything that runs through
// llm_graph_input_attn_kv on a plain cache can.
void check_context(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

// Layers with a KV cache, in order: those that see everything, and those with a sliding window. Throws
// error(ASRKF_UNSUPPORTED), also where flash attention on a layer's device does not take the cache's types.
struct cached_layers { std::vector<uint32_t> plain, windowed; };
cached_layers layers_with_cache(const settings & config, const llama_memory_params & params);

// Of one of them. Its cache is on the CPU unless its context gives it to the layer's device.
attention_layer attention_of(const settings & config, uint32_t il);

// Of all attention logits of the model; 0 for none.
float logit_soft_cap(const llama_model & model);

// What a calibration, and a state, are for: shape, size and the norm weights, which no two trainings share.
std::string fingerprint(const llama_model & model);

} // namespace asrkf
